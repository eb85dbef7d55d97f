"""(g) Checkpoints of a training state: ours against torch.distributed.checkpoint, and our writer against `dd`.

stall    from the call until training may change the tensors, for a background save with its memory allocated before
total    until the checkpoint exists on the disk, flushed
load     into the same tensors; ours verifies the checksum of every byte it uses
cost     time that a save adds to concurrent steps, at one save every `SAVE_EVERY` steps
"""

from __future__ import annotations

import shutil
import statistics
import subprocess
import time
import warnings
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.staging import AsyncStager, DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save, save

from internlm_lite.apps.bench.shapes import bench_config
from internlm_lite.apps.bench.step import our_training
from internlm_lite.apps.bench.timing import Side, alternate
from internlm_lite.apps.bench.worlds import mesh_of, on_ranks
from internlm_lite.checkpoint.format.tensor_file import TensorFile
from internlm_lite.checkpoint.manager import CheckpointManager
from internlm_lite.checkpoint.storage.local import LocalStorage
from internlm_lite.config.schema import Config
from internlm_lite.mesh.layout import LocalShard
from internlm_lite.mesh.mesh import Mesh
from internlm_lite.runtime.device import device_name

SAVE_EVERY = 100
STEPS_BESIDE = 2
"""Steps in which a save is expected to end; any time beyond them is counted as if training waited for it."""
_MEGABYTE = 10**6

End = Callable[[], object]


class Ours:
    """Saves in the background through `CheckpointManager`, as a training run does."""

    def __init__(self, folder: Path, mesh: Mesh, pieces: list[LocalShard]) -> None:
        self._pieces, self._step = pieces, 0
        self._manager = CheckpointManager(str(folder), mesh)
        self._manager.prepare(pieces)

    def begin(self) -> End:
        self._step += 1
        self._manager.save(self._step, "snapshot", self._pieces, {}, wait=False)
        return self._end

    def _end(self) -> None:
        saved = self._manager.wait()
        if saved is not None and saved.error is not None:
            raise saved.error

    def load(self) -> None:
        found = self._manager.latest()
        assert found is not None
        self._manager.load(found, self._pieces)


class Torch:
    """torch.distributed.checkpoint. Names of pieces differ between ranks, so that each byte is written once."""

    def __init__(self, folder: Path, mesh: Mesh, pieces: list[LocalShard], mode: str) -> None:
        """`mode`: "save"; "async_save"; or "async_save warm", which reuses the memory of the copy."""
        self._folder, self._mode, self._step = folder, mode, 0
        self._state = {f"{piece.role}/{piece.name}/{mesh.rank}": piece.tensor for piece in pieces}
        pinned = mesh.device.type == "cuda"
        self._stager: AsyncStager | None = None
        if mode == "async_save warm":
            self._stager = cast(AsyncStager, DefaultStager(StagingOptions(pinned, False, False, pinned)))

    def begin(self) -> End:
        self._step += 1
        folder = self._folder / str(self._step % 2)  # keeps two checkpoints, as ours does
        if self._mode == "save":
            save(self._state, checkpoint_id=folder)
            return _nothing
        answer = async_save(self._state, checkpoint_id=folder, async_stager=self._stager)
        return cast("Future[Any]", answer).result

    def load(self) -> None:
        load(self._state, checkpoint_id=self._folder / str(self._step % 2))


def _nothing() -> None:
    """The wait after a blocking save: there is nothing to wait for."""


Kind = Ours | Torch


def sides(folder: Path, mesh: Mesh, pieces: list[LocalShard]) -> dict[str, Kind]:
    """The implementations to compare, by name. Collective."""
    modes = ("async_save", "async_save warm", "save")
    theirs = {f"torch {mode}": Torch(folder / mode, mesh, pieces, mode) for mode in modes}
    return {"ours": Ours(folder / "ours", mesh, pieces), **theirs}


@dataclass(frozen=True)
class SaveRow:
    """Medians, in seconds, over all ranks of one machine, and the share of training time."""

    ranks: int
    side: str
    device: str
    megabytes: float
    """Size of the checkpoint over all ranks."""
    stall: float
    total: float
    load: float
    cost_percent: float
    """Cost as a share of training time, at a save every SAVE_EVERY steps of `step_seconds`."""
    step_seconds: float


@dataclass(frozen=True)
class WriterRow:
    """Medians in GB/s: our file with crc32, sha256 and fsync, against `dd conv=fsync` of zeros, in the same folder."""

    folder: str
    megabytes: float
    ours: float
    dd: float
    ratio: float


def bench_saves(size: int, rounds: int, folder: Path, **shape: Any) -> list[SaveRow]:
    """All sides on `size` ranks, alternating."""
    rows: list[SaveRow] = on_ranks(size, _saves, bench_config(**shape), rounds, folder / str(size))
    return rows


def _saves(rank: int, device: torch.device, config: Config, rounds: int, folder: Path) -> list[SaveRow]:
    warnings.filterwarnings("ignore", "Detected an existing checkpoint")  # raised by every save of torch
    mesh = mesh_of(config, rank, device)
    training, optimizer = our_training(config, mesh, seed=1)
    training.step()  # moments that are not all zero
    training.finish()
    pieces = list(optimizer.pieces())
    held = torch.tensor(sum(piece.tensor.nbytes for piece in pieces), device=device)
    dist.all_reduce(held)
    found = sides(folder, mesh, pieces)
    times: dict[str, list[tuple[float, float, float]]] = {name: [] for name in found}
    for number in range(rounds + 1):
        for name, side in found.items():
            measured = _once(side, device)
            if number:  # the first round is a warm-up
                times[name].append(measured)
    costs, step_seconds = _costs(training, found, rounds, device)
    rows, where = [], device_name(device)
    for name, measures in times.items():
        stall, total, load = (statistics.median(values) for values in zip(*measures, strict=True))
        percent = 100 * costs[name] / (SAVE_EVERY * step_seconds)
        size = held.item() / _MEGABYTE
        rows.append(SaveRow(mesh.world.size, name, where, size, stall, total, load, percent, step_seconds))
    return rows


def _once(side: Kind, device: torch.device) -> tuple[float, float, float]:
    """Seconds of stall, save and load of the slowest rank."""
    begin = _now(device)
    end = side.begin()
    stall = _now(device, together=False) - begin
    end()
    total = _now(device) - begin
    begin = _now(device)
    side.load()
    slowest = torch.tensor([stall, total, _now(device) - begin], dtype=torch.float64, device=device)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    stall, total, load = slowest.tolist()
    return stall, total, load


def _now(device: torch.device, together: bool = True) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    if together:
        dist.barrier()
    return time.perf_counter()


def _costs(training: Side, found: dict[str, Kind], rounds: int, device: torch.device) -> tuple[dict[str, float], float]:
    """Seconds that one save adds to the training beside it, by side; and seconds of a step."""

    def steps(begin: Callable[[], End]) -> Callable[[], None]:
        def turn() -> None:
            end = begin()
            for _ in range(STEPS_BESIDE):
                training.step()
            training.finish()
            end()
            dist.barrier()

        return turn

    turns = {name: steps(side.begin) for name, side in found.items()}
    seconds = alternate({"": steps(lambda: _nothing), **turns}, rounds, device)
    alone = seconds.pop("")
    return {name: value - alone for name, value in seconds.items()}, alone / STEPS_BESIDE


def bench_writer(folder: Path, megabytes: int, rounds: int) -> WriterRow:
    """One file of `megabytes` in tensors of 4 MB, in `folder`, which is removed."""
    storage = LocalStorage(folder)
    tensors = {str(number): torch.randn(_MEGABYTE) for number in range(megabytes // 4)}
    size = sum(tensor.nbytes for tensor in tensors.values())
    command = ["dd", "if=/dev/zero", f"of={folder}/dd", f"bs={size // 70}", "count=70", "conv=fsync"]
    both: dict[str, Callable[[], object]] = {
        "ours": lambda: storage.put("ours", TensorFile(tensors)),
        "dd": lambda: subprocess.run(command, check=True, capture_output=True),
    }
    try:
        seconds = alternate(both, rounds, torch.device("cpu"))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    ours, dd = (size / seconds[name] / 10**9 for name in ("ours", "dd"))
    return WriterRow(str(folder.parent), size / _MEGABYTE, ours, dd, ours / dd)
