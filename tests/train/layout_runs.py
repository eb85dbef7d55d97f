"""Runs of many layouts in one world of ranks, with what each rank saw: figures, weights, tokens."""

from __future__ import annotations

import hashlib
import logging
import math
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from internlm_lite.batch import Batch, Position
from internlm_lite.config.schema import Config
from internlm_lite.data.data_loader import TrainingData
from internlm_lite.faults.signals import StopSignals
from internlm_lite.mesh.layout import Box, Parameter
from internlm_lite.mesh.mesh import Mesh, Sizes, build_mesh, single_process_mesh
from internlm_lite.models.stages import Stages
from internlm_lite.monitor.jsonl import read_objects
from internlm_lite.optim.reduce import GradReducer
from internlm_lite.train.build import build_run
from internlm_lite.train.loop import train
from tests.steps import read_metrics
from tests.train.layouts import Layout
from tests.world import TIMEOUT, run_world

Weights = dict[tuple[str, tuple[int, ...], Box], bytes]
"""(name, shape of the whole, this rank's box of it) -> digest of the values."""


@dataclass(frozen=True)
class Job:
    """One run: a layout, and the config made of it."""

    layout: Layout
    config: Config
    keeps_weights: bool = False
    """Each rank also returns its weights after the last step."""


@dataclass
class Seen:
    """What one rank saw of a run."""

    dp_rank: int
    metrics: list[dict[str, Any]] = field(default_factory=list)
    """Step objects; on rank 0."""
    events: list[dict[str, Any]] = field(default_factory=list)
    """Objects of events.jsonl; on rank 0."""
    before: Weights = field(default_factory=dict)
    after: Weights = field(default_factory=dict)
    fed: list[list[bytes]] = field(default_factory=list)
    """By step and micro-batch, a digest of tokens, labels, positions and folder."""
    reduced: list[list[int]] = field(default_factory=list)
    """By step and gradient bucket that started in the backward passes, how many gradients were still to come then."""
    buckets: int = 0

    last: list[tuple[str, Box, torch.Tensor]] = field(default_factory=list)
    """(name, this rank's box of the whole, weights) after the last step, if the job keeps them."""
    initial: dict[str, torch.Tensor] = field(default_factory=dict)
    """Whole weights before the first step, in a run of one process."""

    def digest_of(self, name: str, box: Box) -> bytes:
        return digest(self.initial[name][tuple(slice(*side) for side in box)])

    def curve(self) -> list[tuple[float, float]]:
        return [(step["loss"], step["grad_norm"]["0_default"] + step["grad_norm"]["1_fp32"]) for step in self.metrics]


def digest(*tensors: torch.Tensor) -> bytes:
    state = hashlib.sha256()
    for tensor in tensors:
        copy = tensor.detach().clone(memory_format=torch.contiguous_format)  # a view in numpy pins the storage's size
        state.update(copy.view(torch.uint8).numpy().tobytes())
    return state.digest()


def params_of(stages: Stages) -> list[Parameter]:
    return [cast(Parameter, param) for stage in stages.values() for param in stage.parameters()]


def weights_of(stages: Stages) -> Weights:
    return {(p.shard_spec.name, p.shard_spec.shape, p.shard_spec.box): digest(p) for p in params_of(stages)}


class _Watched:
    """Training data that notes what it hands out."""

    def __init__(self, data: TrainingData, seen: Seen) -> None:
        self._data, self._seen = data, seen

    def __getattr__(self, name: str) -> Any:
        return getattr(self._data, name)

    def batches(self, position: Position, pin: bool = False) -> Generator[Batch, None, None]:
        with closing(self._data.batches(position, pin=pin)) as batches:
            for batch in batches:
                rows = zip(batch.tokens, batch.labels, batch.positions, batch.folders, strict=True)
                self._seen.fed.append([digest(*row) for row in rows])
                yield batch


def _watch(reducer: GradReducer, seen: Seen) -> None:
    """Note what `reducer` starts between `expect` and `finish`."""
    expect, start, finish = reducer.expect, reducer._start_next, reducer.finish
    inside = False

    def expected(micro_num: int) -> None:
        nonlocal inside
        inside = True
        seen.reduced.append([])
        expect(micro_num)

    def started() -> None:
        if inside:
            seen.reduced[-1].append(sum(reducer._missing))
        start()

    def finished() -> None:
        nonlocal inside
        inside = False
        finish()

    reducer.expect, reducer._start_next, reducer.finish = expected, started, finished  # type: ignore[method-assign]


def run_one(mesh: Mesh, job: Job, folder: Path) -> Seen:
    """Train in this layout; goes on from a checkpoint of the config's folders, if there is one."""
    config = job.config
    folder.mkdir(parents=True, exist_ok=True)
    seen = Seen(mesh.dp.rank)
    run = build_run(config, mesh, folder, "auto")
    optimizer, stages = run.trainer.optimizer, run.trainer.stages
    seen.buckets = len(optimizer.buckets)
    with optimizer.whole_weights():
        seen.before = weights_of(stages)
        if mesh.world.size == 1:
            seen.initial = {p.shard_spec.name: p.detach().clone() for p in params_of(stages)}
    if isinstance(optimizer._reducer, GradReducer):
        _watch(optimizer._reducer, seen)
    try:
        train(replace(run, data=_Watched(run.data, seen)), StopSignals())  # type: ignore[arg-type]
    finally:
        run.reporter.close()
    with optimizer.whole_weights():
        seen.after = weights_of(stages)
        if job.keeps_weights:
            seen.last = [(p.shard_spec.name, p.shard_spec.box, p.detach().clone()) for p in params_of(stages)]
    if mesh.is_main:
        seen.metrics = read_metrics(folder / "metrics.jsonl")
        seen.events = list(read_objects(folder / "events.jsonl"))
    return seen


def _run_in_world(world: Mesh, jobs: list[Job], folder: Path) -> list[Seen]:
    logging.disable(logging.WARNING)
    meshes: dict[Sizes, Mesh] = {}
    results = []
    for number, job in enumerate(jobs):
        sizes = job.layout.sizes
        if sizes not in meshes:
            meshes[sizes] = build_mesh(sizes, world.rank, world.device, TIMEOUT)
        try:
            results.append(run_one(meshes[sizes], job, folder / str(number)))
        except Exception as error:
            raise AssertionError(f"layout: {job.layout}") from error
    return results


def check(layout: Layout, ranks: Sequence[Seen], single: Seen, rel: float, norm_rel: float | None = None) -> float:
    """Everything a layout has in common with one process; the worst relative error of loss and norm.

    `ranks`: what each rank saw. `rel` bounds losses, and gradient norms unless `norm_rel` does; tokens, weights at the
    start and batches are the same.
    """
    for (step, ours), expected in zip(enumerate(ranks[0].curve()), single.curve(), strict=True):
        assert ours[0] == pytest.approx(expected[0], rel=rel), f"{layout}: loss of step {step}"
        assert ours[1] == pytest.approx(expected[1], rel=norm_rel or rel), f"{layout}: gradient norm of step {step}"
    for ours, expected in zip(ranks[0].metrics, single.metrics, strict=True):
        assert ours["num_consumed_tokens"] == expected["num_consumed_tokens"], layout
        check_folders(layout, ours["folders"], expected["folders"], rel)
    check_weights(layout, ranks, single)
    check_batches(layout, ranks, single)
    pairs = zip(ranks[0].curve(), single.curve(), strict=True)
    return max(abs(a - b) / abs(b) for ours, expected in pairs for a, b in zip(ours, expected, strict=True))


def check_folders(layout: Layout, ours: dict[str, Any], expected: dict[str, Any], rel: float) -> None:
    """[tokens, loss, accuracy] of every folder. With `rel` too wide for fp32 a near tie may be decided otherwise."""
    assert ours.keys() == expected.keys(), layout
    for name, (tokens, loss, acc) in expected.items():
        near = None if loss is None else pytest.approx(loss, rel=rel)
        right = acc if rel <= 1e-5 else pytest.approx(acc, abs=4.5 / max(tokens, 1))
        assert ours[name] == [tokens, near, right], f"{layout}: {name}"


def check_weights(layout: Layout, ranks: Sequence[Seen], single: Seen) -> None:
    """At the start every rank has its box of the single process's weights, bit by bit, and the boxes make up the whole.
    At the end ranks that hold the same box still hold the same bits."""
    shapes = {name: shape for name, shape, _ in single.before}
    held: dict[str, set[Box]] = defaultdict(set)
    for rank in ranks:
        for (name, shape, box), found in rank.before.items():
            assert shape == shapes[name], (layout, name)
            assert found == single.digest_of(name, box), f"{layout}: {name} {box} is not what one process starts with"
            held[name].add(box)
    volumes = {name: sum(math.prod(b - a for a, b in box) for box in boxes) for name, boxes in held.items()}
    assert volumes == {name: math.prod(shape) for name, shape in shapes.items()}, layout
    last: Weights = {}
    for rank in ranks:
        for key, found in rank.after.items():
            assert last.setdefault(key, found) == found, f"{layout}: copies of {key} have drifted apart"


def weights_apart(ranks: Sequence[Seen], single: Seen) -> float:
    """Of all weights that jobs kept, the largest difference to those of one process, over the largest number of its
    tensor."""
    whole = {name: tensor for name, _, tensor in single.last}
    assert whole.keys() == {name for rank in ranks for name, _, _ in rank.last}
    return max(
        ((ours - whole[name][tuple(slice(*side) for side in box)]).abs().max() / whole[name].abs().max()).item()
        for rank in ranks
        for name, box, ours in rank.last
    )


def check_batches(layout: Layout, ranks: Sequence[Seen], single: Seen) -> None:
    """Row j of rank i of `dp` is row j * dp + i of the global batch, on every rank of its pipeline and tensor group."""
    for rank in ranks:
        assert rank.fed == [step[rank.dp_rank :: layout.dp] for step in single.fed], layout


def run_layouts(jobs: Iterable[Job], folder: Path) -> list[list[Seen]]:
    """For each job what every rank of its world saw. All jobs have worlds of one size, and share one world."""
    jobs = list(jobs)
    (size,) = {job.layout.world for job in jobs}
    by_rank = run_world(_run_in_world, size, (jobs, folder), timeout_seconds=800)
    return [list(ranks) for ranks in zip(*by_rank, strict=True)]


def _run_alone(world: Mesh, jobs: list[Job], folder: Path) -> dict[Layout, Seen]:
    logging.disable(logging.WARNING)
    mine = list(enumerate(jobs))[world.rank :: world.world.size]
    return {job.layout: run_one(single_process_mesh(), job, folder / str(number)) for number, job in mine}


def run_references(jobs: Iterable[Job], folder: Path) -> dict[Layout, Seen]:
    """Layouts of one process, two at a time."""
    first, second = run_world(_run_alone, 2, (list(jobs), folder), timeout_seconds=800)
    return {**first, **second}


def check_layouts_of_one_size(
    layouts: Sequence[Layout], config_of: Callable[[Layout], Config], rel: float, folder: Path
) -> None:
    """All of `layouts`, which have worlds of one size, against one process each, their weights after the last step,
    too; prints the worst errors."""

    def jobs(of: Iterable[Layout]) -> list[Job]:
        return [Job(layout, config_of(layout), keeps_weights=True) for layout in of]

    singles = run_references(jobs(dict.fromkeys(layout.same_model for layout in layouts)), folder / "single")
    figures, weights = 0.0, 0.0
    for layout, seen in zip(layouts, run_layouts(jobs(layouts), folder / "layouts"), strict=True):
        single = singles[layout.same_model]
        figures = max(figures, check(layout, seen, single, rel))
        apart = weights_apart(seen, single)
        assert apart < rel, f"{layout}: weights are {apart:.1e} apart"
        weights = max(weights, apart)
    ranks = layouts[0].world
    print(f"{len(layouts)} layouts on {ranks} ranks, worst error of figures {figures:.1e}, of weights {weights:.1e}")
