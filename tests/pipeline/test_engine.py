"""Micro-batches through stages: gradients of one process, each loss once, and what is raised when something breaks."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import nn

from internlm_lite.errors import DataError, InternLMError
from internlm_lite.mesh.mesh import Mesh
from internlm_lite.pipeline.engine import HiddenShape, OneRank, Pipeline
from internlm_lite.pipeline.split import rank_to_stages
from tests.torches import HAS_ZBV
from tests.world import Leaves, run_world

WIDTH, ROWS = 4, 3
SCHEDULES = {"1f1b": 1, "interleaved": 2, **({"zbv": 2} if HAS_ZBV else {})}
"""Schedule -> stages on a rank."""


def layer(stage: int) -> nn.Linear:
    made = nn.Linear(WIDTH, WIDTH, dtype=torch.float64)
    generator = torch.Generator().manual_seed(stage)
    with torch.no_grad():
        for param in made.parameters():
            param.normal_(generator=generator)
    return made


def rows(micro: int) -> torch.Tensor:
    return torch.randn(ROWS, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(100 + micro))


@dataclass
class Linears:
    """A task of one linear layer a stage. `before` is called first in every forward pass."""

    layers: dict[int, nn.Linear]
    before: Callable[[int, int], None] = lambda stage, micro: None
    losses: list[tuple[int, float]] = field(default_factory=list)

    def forward(self, stage: int, micro: int, hidden: torch.Tensor | None) -> torch.Tensor:
        self.before(stage, micro)
        return torch.tanh(self.layers[stage](rows(micro) if hidden is None else hidden))

    def loss(self, micro: int, hidden: torch.Tensor) -> torch.Tensor:
        loss = (micro + 1) * hidden.square().sum()
        self.losses.append((micro, loss.item()))
        return loss


class Whole(Linears):
    """All stages as one."""

    def forward(self, stage: int, micro: int, hidden: torch.Tensor | None) -> torch.Tensor:
        hidden = rows(micro)
        for number in range(len(self.layers)):
            hidden = torch.tanh(self.layers[number](hidden))
        return hidden


def pipeline(mesh: Mesh, schedule: str, layers: dict[int, nn.Linear], early_receive: bool = True) -> Pipeline:
    return Pipeline(
        layers,
        mesh.pp,
        schedule=schedule,
        shape=HiddenShape(ROWS, WIDTH, torch.float64, mesh.device),
        early_receive=early_receive,
        pop_deferred=lambda: lambda: None,
    )


def layers_on(mesh: Mesh, schedule: str) -> dict[int, nn.Linear]:
    return {n: layer(n) for n in rank_to_stages(mesh.pp.rank, mesh.pp.size, SCHEDULES[schedule], schedule)}


MICRO_NUMS = (1, 4, 2, 3, 6)
"""Up and down, as in a ramp-up: fewer and more than there are stages."""


def trained(mesh: Mesh) -> dict:
    found = {}
    for schedule in SCHEDULES:
        for early_receive in (True, False) if schedule == "interleaved" and HAS_ZBV else (True,):
            task = Linears(layers_on(mesh, schedule))
            engine = pipeline(mesh, schedule, task.layers, early_receive)
            for micro_num in MICRO_NUMS:
                for module in task.layers.values():
                    module.zero_grad()
                task.losses.clear()
                engine.train(task, micro_num)
                losses = sorted(task.losses)
                task.losses.clear()
                with torch.no_grad():
                    engine.evaluate(task, micro_num)
                assert sorted(task.losses) == losses, "evaluation goes through the same stages"
                grads = {n: [p.grad.clone() for p in module.parameters()] for n, module in task.layers.items()}  # type: ignore[union-attr]
                found[schedule, early_receive, micro_num] = grads, losses
    return found


@pytest.mark.parametrize("size", [2, 3])
def test_the_gradients_of_one_process(size: int) -> None:
    ranks = run_world(trained, size, pipeline=size)
    assert len(ranks[0]) == (4 if HAS_ZBV else 2) * len(MICRO_NUMS)
    for key in ranks[0]:
        schedule, _, micro_num = key
        whole = Whole({n: layer(n) for n in range(size * SCHEDULES[schedule])})
        OneRank().train(whole, micro_num)
        grads = {n: tensors for rank in ranks for n, tensors in rank[key][0].items()}
        assert grads.keys() == whole.layers.keys()
        for number, module in whole.layers.items():
            for ours, param in zip(grads[number], module.parameters(), strict=True):
                torch.testing.assert_close(ours, param.grad, rtol=1e-12, atol=1e-12)
        losses = [loss for rank in ranks for loss in rank[key][1]]
        assert losses == [(micro, pytest.approx(loss)) for micro, loss in whole.losses], key


def failing(mesh: Mesh, schedule: str, evaluation: bool) -> tuple[str, str] | Leaves:
    """Stage 1 finds something wrong in micro-batch 1."""

    def before(stage: int, micro: int) -> None:
        if (stage, micro) == (1, 1):
            raise DataError("part.bin: found id 99")

    task = Linears(layers_on(mesh, schedule), before)
    engine = pipeline(mesh, schedule, task.layers)
    try:
        (engine.evaluate if evaluation else engine.train)(task, 4)
    except InternLMError as error:
        return Leaves((type(error).__name__, str(error)))
    return "nothing", ""


@pytest.mark.parametrize(
    ("schedule", "evaluation"), [*((name, False) for name in SCHEDULES), *[("zbv", True)] * HAS_ZBV]
)
def test_an_error_of_ours_surfaces_as_itself(schedule: str, evaluation: bool) -> None:
    waiting, failed = run_world(failing, 2, (schedule, evaluation), pipeline=2)
    assert failed == ("DataError", "part.bin: found id 99")
    # The neighbour cannot know more than that its peer is gone. (In evaluation it may have sent all and be done.)
    name, message = waiting
    assert name == "PeerLostError" or (evaluation and name == "nothing"), waiting
    assert name == "nothing" or message.startswith("rank 0 lost a peer of its pp group (ranks [0, 1]): "), message


def broken(mesh: Mesh) -> str | Leaves:
    """A mistake of the program itself in stage 1: no user error."""

    def before(stage: int, micro: int) -> None:
        if (stage, micro) == (1, 1):
            raise ValueError("a bug")

    task = Linears(layers_on(mesh, "interleaved"), before)
    try:
        pipeline(mesh, "interleaved", task.layers).train(task, 4)
    except Exception as error:
        return Leaves(type(error).__name__)
    return "nothing"


def test_a_bug_is_no_lost_peer() -> None:
    waiting, failed = run_world(broken, 2, pipeline=2)
    assert failed in ("ValueError", "RuntimeError")
    assert waiting == "PeerLostError"


def killed(mesh: Mesh, schedule: str, folder: Path) -> None:
    def before(stage: int, micro: int) -> None:
        if (stage, micro) == (1, 1):
            os._exit(9)

    task = Linears(layers_on(mesh, schedule), before)
    try:
        pipeline(mesh, schedule, task.layers).train(task, 4)
    except InternLMError as error:
        (folder / str(mesh.rank)).write_text(f"{type(error).__name__}: {error}")


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_killed_neighbour_is_a_lost_peer(schedule: str, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="rank 1: died without a word"):
        run_world(killed, 2, (schedule, tmp_path), pipeline=2)
    printed = (tmp_path / "0").read_text()
    assert printed.startswith("PeerLostError: rank 0 lost a peer of its pp group (ranks [0, 1]): ")
    assert printed.endswith("; the log of the rank that failed first says why")
