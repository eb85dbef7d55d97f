"""Layouts with ZeRO stages 2 and 3, and short runs of them: losses, gradient norms and all weights of each rank."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch

from internlm_lite.batch import Position
from internlm_lite.config.cross import cross_problems
from internlm_lite.config.schema import Config
from internlm_lite.data.data_loader import open_training_data
from internlm_lite.mesh.layout import Box
from internlm_lite.mesh.mesh import Mesh, Sizes, build_mesh, single_process_mesh
from internlm_lite.train.trainer import Trainer
from tests.torches import HAS_ZBV
from tests.train.layouts import LIMIT, Layout, config_of
from tests.world import TIMEOUT, run_world

STEPS = 4
OPTIONS: dict[str, tuple[Any, ...]] = {
    "dp": (2, 4, 8, 3),
    "tp": (1, 2),
    "pp": (1, 2),
    "schedule": (None, "interleaved", *["zbv"] * HAS_ZBV),
    "zero1": (-1, 1, 2),
    "rows": (8, 12),
    "tied": (False, True),
    "sp": (False, True),
    "checkpoint": (0, 0.5, 1, "selective"),
    "overlap_grad": (True, False),
    "overlap_param": (True, False),
    "bucket": (1 << 29, 1500),
    "stage": (2, 3),
    "reshard": (True, False),
}
MOST_RANKS = 8


@dataclass(frozen=True)
class ZeroLayout:
    """A layout, and how much of it the ranks of `zero` share."""

    layout: Layout
    stage: int = 1
    reshard: bool = True

    def __str__(self) -> str:
        return f"stage={self.stage} reshard={self.reshard} {self.layout}"

    @property
    def alone(self) -> ZeroLayout:
        """One process that trains the same model."""
        return ZeroLayout(self.layout.same_model)

    def config(self, corpus: Path | None, **sections: Any) -> Config:
        config = config_of(self.layout, corpus, **sections)
        shared = {"zero_stage": self.stage, "reshard_after_forward": self.reshard}
        return config.model_copy(update={"parallel": config.parallel.model_copy(update=shared)})


def build(options: dict[str, Any]) -> ZeroLayout:
    options = dict(options)
    stage, reshard = options.pop("stage"), options.pop("reshard")
    chunks = 1 if options["schedule"] is None else 2
    layout = Layout(**options, chunks=chunks, layers=4, split_hidden=not options["tied"])
    return ZeroLayout(layout, stage, reshard)


def feasible(options: dict[str, Any]) -> bool:
    made = build(options)
    layout = made.layout
    if layout.world > MOST_RANKS or layout.rows % layout.dp or layout.dp % max(1, layout.zero1):
        return False
    return not list(cross_problems(made.config(None), layout.world))


def pairs_of(options: dict[str, Any]) -> set[tuple[Any, ...]]:
    return {pair for pair in combinations(options.items(), 2) if "layers" not in pair}


def covering(seed: int = 16, drawn: int = 4000) -> list[dict[str, Any]]:
    """Of layouts drawn at random, those that meet most pairs of options not met yet, for the ranks they cost."""
    dice, candidates = random.Random(seed), list[dict[str, Any]]()
    for _ in range(drawn):
        options = {name: dice.choice(values) for name, values in OPTIONS.items()}
        if feasible(options):
            candidates.append(options)
    left = set().union(*map(pairs_of, candidates))
    chosen = []
    while left:
        best = max(candidates, key=lambda one: len(pairs_of(one) & left) / build(one).layout.world ** 0.5)
        chosen.append(best)
        left -= pairs_of(best)
    return chosen


@dataclass
class Ran:
    """What a rank saw."""

    steps: list[tuple[float, float]] = field(default_factory=list)
    """(loss, gradient norm)."""
    weights: dict[tuple[str, Box], torch.Tensor] = field(default_factory=dict)


def run_one(mesh: Mesh, config: Config, steps: int = STEPS) -> Ran:
    data = open_training_data(config.data, config.model.vocab_size, mesh.dp.rank, mesh.dp.size, config.seed)
    trainer, ran = Trainer(config, mesh, data.folders), Ran()
    with closing(data.batches(Position())) as batches:
        for step in range(steps):
            outcome = trainer.step(next(batches), step)
            norm = (outcome.norm_model_dtype.square() + outcome.norm_fp32.square()).sqrt().item()
            ran.steps.append((trainer.metrics.collect().loss, norm))
    ran.weights = weights_of(trainer)
    return ran


def weights_of(trainer: Trainer) -> dict[tuple[str, Box], torch.Tensor]:
    with trainer.optimizer.whole_weights():
        params: Iterator[Any] = (p for stage in trainer.stages.values() for p in stage.parameters())
        return {(p.shard_spec.name, p.shard_spec.box): p.detach().clone() for p in params}


def _run_in_world(world: Mesh, jobs: Sequence[tuple[ZeroLayout, Config]]) -> list[Ran]:
    logging.disable(logging.WARNING)
    meshes: dict[Sizes, Mesh] = {}
    found = []
    for made, config in jobs:
        sizes = made.layout.sizes
        if sizes not in meshes:
            meshes[sizes] = build_mesh(sizes, world.rank, world.device, TIMEOUT)
        try:
            found.append(run_one(meshes[sizes], config))
        except Exception as error:
            raise AssertionError(f"layout: {made}") from error
    return found


def run_all(jobs: Sequence[tuple[ZeroLayout, Config]]) -> list[list[Ran]]:
    """For each job what every rank of its world saw. All jobs have worlds of one size, and share one world."""
    (size,) = {made.layout.world for made, _ in jobs}
    if size == 1:
        return [[run_one(single_process_mesh(), config)] for _, config in jobs]
    return [list(ranks) for ranks in zip(*run_world(_run_in_world, size, (jobs,), timeout_seconds=800), strict=True)]


def check(made: ZeroLayout, ranks: Sequence[Ran], alone: Ran, rel: float = LIMIT) -> float:
    """Losses, norms and all weights are those of one process; the worst relative error of a loss or norm."""
    for ours, expected in zip(ranks[0].steps, alone.steps, strict=True):
        assert ours == pytest.approx(expected, rel=rel), made
    whole = {name: weight for (name, _), weight in alone.weights.items()}
    for ran in ranks:
        for (name, box), weight in ran.weights.items():
            expected = whole[name][tuple(slice(*side) for side in box)]
            torch.testing.assert_close(weight, expected, rtol=rel, atol=rel, msg=f"{made}: {name} {box}")
    pairs = zip(ranks[0].steps, alone.steps, strict=True)
    return max(abs(a - b) / abs(b) for ours, expected in pairs for a, b in zip(ours, expected, strict=True))


def with_stage(layout: Layout, stage: int, **changes: Any) -> ZeroLayout:
    return ZeroLayout(replace(layout, **changes), stage)
