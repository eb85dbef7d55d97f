"""The bandwidth of an all-reduce over all ranks, measured in a thread: a hanging network must not hang the doctor."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import Store  # type: ignore[attr-defined]

from internlm_lite.errors import MeshError, first_line
from internlm_lite.runtime.dist_env import DistEnv
from internlm_lite.runtime.start import connect_ranks

GPU_BYTES, CPU_BYTES = 256 * 2**20, 16 * 2**20
ROUNDS = 5


@dataclass
class AllReduceSpeed:
    """Result of the measurement. `vars` gives its JSON form."""

    backend: str
    n_bytes: int
    seconds: float | None = None
    """Mean over ROUNDS."""
    bytes_per_second: float | None = None
    """Bus bandwidth of a ring: 2 (n - 1) / n * bytes / seconds."""
    problem: str | None = None


@dataclass
class _Probe:
    dist_env: DistEnv
    device: torch.device
    store: Store
    timeout: timedelta
    reduced: AllReduceSpeed = field(init=False)

    def __post_init__(self) -> None:
        on_gpu = self.device.type == "cuda"
        self.reduced = AllReduceSpeed("nccl" if on_gpu else "gloo", GPU_BYTES if on_gpu else CPU_BYTES)

    def run(self) -> None:
        try:
            connect_ranks(self.store, self.dist_env, self.device, self.timeout)
            seconds = self._measure()
        except (MeshError, RuntimeError) as error:  # torch.distributed's errors are RuntimeErrors
            self.reduced.problem = first_line(error)
            return
        n = self.dist_env.world_size
        self.reduced.seconds = seconds
        self.reduced.bytes_per_second = 2 * (n - 1) / n * self.reduced.n_bytes / seconds

    def _measure(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # the current device is per thread
        tensor = torch.ones(self.reduced.n_bytes // 4, device=self.device)
        dist.all_reduce(tensor)
        self._synchronise()
        begin = time.monotonic()
        for _ in range(ROUNDS):
            dist.all_reduce(tensor)
        self._synchronise()
        return (time.monotonic() - begin) / ROUNDS

    def _synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def all_reduce_speed(dist_env: DistEnv, device: torch.device, store: Store, timeout: timedelta) -> AllReduceSpeed:
    """Collective over two or more ranks. Errors, including time-outs, are returned in `problem`.

    A hanging thread is abandoned: end this process with os._exit.
    """
    probe = _Probe(dist_env, device, store, timeout)
    thread = threading.Thread(target=probe.run, name="all-reduce", daemon=True)
    thread.start()
    thread.join(timeout.total_seconds())
    if thread.is_alive():
        late = AllReduceSpeed(probe.reduced.backend, probe.reduced.n_bytes)
        late.problem = f"no answer within {timeout.total_seconds():g} s"
        return late
    return probe.reduced
