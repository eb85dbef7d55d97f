"""What metrics may do to training: a collective per line, one read per line on rank 0, no read between lines."""

from __future__ import annotations

import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from internlm_lite.mesh.mesh import Mesh
from internlm_lite.train.trainer import Trainer
from tests.apps.planner.counting import Calls, Key
from tests.corpus import FOLDERS, write_corpus
from tests.train.runs import run_training, tiny
from tests.world import run_world

STEPS, EVERY = 12, 4
METRICS: Key = ("world", "allreduce_", 8 * (4 * len(FOLDERS) + 1))
"""The all-reduce of all folders' sums."""


class Reads(Calls):
    """Collectives, and reads of tensors by the host: [(module that reads, how)]."""

    def __init__(self, mesh: Mesh) -> None:
        super().__init__(mesh)
        self.reads: Counter[tuple[str, str]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._opname in ("_local_scalar_dense", "equal", "nonzero"):
            self.reads["an operator", func._opname] += 1
        return super().__torch_dispatch__(func, types, args, kwargs)


def counted(mesh: Mesh, corpus: Path, folder: Path) -> list[tuple[Counter[Key], Counter[tuple[str, str]]]]:
    """(collectives, reads) of each step with what follows it, on this rank."""
    steps: list[tuple[Counter[Key], Counter[tuple[str, str]]]] = []
    original_step, original_list = Trainer.step, torch.Tensor.tolist
    reads = Reads(mesh)

    def next_step(*args: Any, **hooks: Any) -> Any:
        steps.append((reads.counted.copy(), reads.reads.copy()))
        return original_step(*args, **hooks)

    def tolist(tensor: torch.Tensor) -> Any:  # no operator on a CPU tensor
        frame: Any = sys._getframe(1)
        if frame.f_globals["__name__"] == "internlm_lite.mesh.comm":  # comm.read
            frame = frame.f_back
        reads.reads[frame.f_globals["__name__"].removeprefix("internlm_lite."), "tolist"] += 1
        return original_list(tensor)

    config = tiny(corpus, data={"total_steps": STEPS, "micro_num": 2}, monitor={"log_every": EVERY})
    with pytest.MonkeyPatch.context() as patch, reads:
        patch.setattr(Trainer, "step", next_step)
        patch.setattr(torch.Tensor, "tolist", tolist)
        run_training(mesh, config, folder)
    steps.append((reads.counted, reads.reads))
    return [(b[0] - a[0], b[1] - a[1]) for a, b in pairwise(steps)]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    folder = tmp_path_factory.mktemp("cost")
    return run_world(counted, 2, (write_corpus(folder / "corpus"), folder / "run"))


@pytest.mark.parametrize("rank", [0, 1])
def test_one_collective_a_line(ranks: list[Any], rank: int) -> None:
    quiet = ranks[rank][1][0]
    assert quiet[METRICS] == 0 and quiet.total() > 0
    for step, (collectives, _) in enumerate(ranks[rank][1 : STEPS - 1], 1):
        assert collectives == quiet + Counter({METRICS: int((step + 1) % EVERY == 0)}), step


@pytest.mark.parametrize("rank", [0, 1])
def test_no_read_between_lines(ranks: list[Any], rank: int) -> None:
    signals = ("train.control", "tolist")  # of the step before: see control.py
    checked = ("an operator", "_local_scalar_dense")  # layers/loss.py, on the CPU alone, once a micro-batch
    for step, (_, reads) in enumerate(ranks[rank][1 : STEPS - 1], 1):
        line = {("train.reporter", "tolist"): 1} if rank == 0 and (step + 1) % EVERY == 0 else {}
        assert reads == {signals: 1, checked: 2, **line}, step
