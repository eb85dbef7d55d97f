"""Start a world of gloo ranks for a test and hand back what each rank returned.

    results = run_world(fn, 4, args)      # fn(mesh, *args) on each rank, fn at module level of a test file

Ranks come from one fork server that has imported everything already, so a fresh world costs about half a second. A rank
that raises fails the test with its traceback; a world that hangs is killed after `timeout_seconds`. A rank that has
answered stays until all have: one that ends while another still connects to it would break that one's process group.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from internlm_lite.mesh.mesh import build_mesh, sizes_of

TIMEOUT = timedelta(seconds=60)
"""For process groups that a test builds itself."""

fork_context = multiprocessing.get_context("forkserver")
fork_context.set_forkserver_preload(["torch", "torch.distributed", "internlm_lite.train.job"])


@dataclass(frozen=True)
class Leaves:
    """Returned by a rank that is to end at once, as one does that fails: others wait for it."""

    value: Any


def _rank_main(pipe: Any, fn: Callable[..., Any], rank: int, size: int, layout: dict[str, int], file: str, args: tuple):
    torch.set_num_threads(1)
    code = 0
    try:
        if size > 1:
            dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=size, timeout=TIMEOUT)
        mesh = build_mesh(sizes_of(size, **layout), rank, torch.device("cpu"), TIMEOUT)
        value = fn(mesh, *args)
        leaves = isinstance(value, Leaves)
        # Plain pickle copies tensors into the message; the pipe's own would share memory of a process about to end.
        pipe.send_bytes(pickle.dumps(("ok", value.value if leaves else value)))
        if not leaves:
            pipe.poll(None)  # until the test has all answers and closes its end, or has died
    except BaseException:
        code = 1
        pipe.send_bytes(pickle.dumps(("error", traceback.format_exc())))
    pipe.close()
    os._exit(code)  # half-closed gloo pairs abort at interpreter exit


def run_world(
    fn: Callable[..., Any],
    size: int,
    args: tuple = (),
    *,
    tensor: int = 1,
    pipeline: int = 1,
    zero1: int = -1,
    timeout_seconds: float = 120,
) -> list[Any]:
    """fn(mesh, *args) on `size` ranks; the ranks' return values in rank order. Values must pickle (tensors do)."""
    layout = {"tensor": tensor, "pipeline": pipeline, "zero1": zero1}
    with tempfile.TemporaryDirectory() as folder:
        ranks = []
        for rank in range(size):
            ours, theirs = fork_context.Pipe()
            process = fork_context.Process(
                target=_rank_main, args=(theirs, fn, rank, size, layout, f"{folder}/store", args), daemon=True
            )
            process.start()
            theirs.close()
            ranks.append((process, ours))
        try:
            return _collect(ranks, timeout_seconds)
        finally:
            for process, ours in ranks:
                ours.close()
                process.kill()
                process.join(10)


def _collect(ranks: list, timeout_seconds: float) -> list[Any]:
    deadline = time.monotonic() + timeout_seconds
    results: list[Any] = []
    errors = []
    for rank, (_, pipe) in enumerate(ranks):
        if not pipe.poll(30 if errors else max(0, deadline - time.monotonic())):
            errors.append(f"rank {rank}: no answer after {timeout_seconds} s")
            continue
        try:
            status, value = pickle.loads(pipe.recv_bytes())
        except EOFError:
            status, value = "error", "died without a word"
        if status == "error":
            errors.append(f"rank {rank}: {value}")
        results.append(value)
    assert not errors, "\n".join(errors)
    return results
