"""Runs a function on a world of gloo ranks in a test and returns the results of all ranks.

    results = run_world(fn, 4, args)      # fn(mesh, *args) on each rank, fn at module level of a test file

Ranks are forked from one server with all imports done, so a new world takes about half a second. A rank that raises
fails the test with its traceback; a world that hangs is killed after `timeout_seconds`. A rank with a result waits for
all results: if it ended while another rank still connects to it, that rank's process group would break.
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
"""Time-out of process groups that a test creates itself."""

fork_context = multiprocessing.get_context("forkserver")
fork_context.set_forkserver_preload(["torch", "torch.distributed", "internlm_lite.train.job"])


@dataclass(frozen=True)
class Leaves:
    """Returned by a rank that must end at once, like a failing rank, while others wait for it."""

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
        # pickle copies tensors into the message; Connection.send would share memory of a process that is about to end.
        pipe.send_bytes(pickle.dumps(("ok", value.value if leaves else value)))
        if not leaves:
            pipe.poll(None)  # until the test has all results and closes its end, or has ended
    except BaseException:
        code = 1
        pipe.send_bytes(pickle.dumps(("error", traceback.format_exc())))
    pipe.close()
    os._exit(code)  # half-closed gloo pairs abort a normal interpreter exit


def run_world(
    fn: Callable[..., Any],
    size: int,
    args: tuple = (),
    *,
    tensor: int = 1,
    pipeline: int = 1,
    zero1: int = -1,
    context: int = 1,
    timeout_seconds: float = 120,
) -> list[Any]:
    """Run fn(mesh, *args) on `size` ranks; returns their results in rank order, which must pickle (tensors do)."""
    layout = {"tensor": tensor, "pipeline": pipeline, "zero1": zero1, "context": context}
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
