"""Every layout trains the same model: fixed layouts that cover all pairs of options, and layouts drawn at random."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.corpus import FOLDERS, write_corpus
from tests.train.layout_runs import Job, Seen, check, run_layouts, run_references
from tests.train.layouts import (
    BOUND,
    FREE,
    LIMIT,
    MAX_RANKS,
    Layout,
    all_pairs,
    bound_choices,
    build,
    config_of,
    feasible,
    feasible_pairs,
    fixed_layouts,
    fixed_layouts_on,
    pairs_of,
)

RANDOM_LAYOUTS = int(os.environ.get("LAYOUT_EXAMPLES", "8"))
"""`LAYOUT_EXAMPLES=200 pytest tests/train/test_layouts.py -k random` looks further."""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("layouts") / "corpus", documents=200)


@pytest.fixture(scope="module")
def references(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[Layout, Seen]:
    """One process for every model among the fixed layouts."""
    models = dict.fromkeys(layout.same_model for layout in fixed_layouts())
    return run_references([Job(model, config_of(model, corpus)) for model in models], tmp_path_factory.mktemp("single"))


def test_the_fixed_layouts_cover_every_pair_of_options() -> None:
    layouts = fixed_layouts()
    assert len(set(layouts)) == len(layouts) >= 40
    assert [layout for layout in layouts if not feasible(layout)] == []
    assert {layout.world for layout in layouts} == set(range(1, MAX_RANKS + 1))
    covered = set().union(*(pairs_of(layout) for layout in layouts))
    assert feasible_pairs() - covered == set()
    assert {pair for layout in layouts for pair in pairs_of(layout)} & all_pairs() <= feasible_pairs()


def test_what_cannot_be_paired_breaks_a_rule() -> None:
    """The left-out pairs are exactly those the trainer, the number of ranks or the rows refuse in any company."""

    def rule(pair: tuple) -> bool:
        options = dict(pair)
        dp, tp, pp, rows = (options.get(name, 1) for name in ("dp", "tp", "pp", "rows"))
        chunks, schedule = options.get("chunks"), options.get("schedule")
        many = pp * max(dp, 2 if options.get("zero1") == 2 and "dp" not in options else 1) * tp > MAX_RANKS
        uneven = {"dp", "rows"} <= options.keys() and rows % dp != 0
        shards = options.get("zero1") == 2 and dp % 2 != 0 and "dp" in options
        alone = options.get("pp") == 1 or dp == 8
        no_pipeline = alone and (schedule is not None or (chunks or 1) > 1)
        wanted = {"1f1b": (1,), "interleaved": (2, 3), "zbv": (2,)}
        chunked = schedule is not None and chunks is not None and chunks not in wanted[schedule]
        rows_of_eight = dp == 8 and rows % 8 != 0 and "rows" in options
        late = schedule == "zbv" and options.get("early_receive") is False
        deep = pp * (chunks or 1) > 16
        return many or uneven or shards or no_pipeline or chunked or rows_of_eight or late or deep

    left_out = all_pairs() - feasible_pairs()
    assert left_out == {pair for pair in all_pairs() if rule(pair)}


@pytest.mark.parametrize("ranks", range(1, MAX_RANKS + 1))
def test_every_layout_gives_the_curve_of_one_process(
    ranks: int, corpus: Path, references: dict[Layout, Seen], tmp_path: Path
) -> None:
    layouts = fixed_layouts_on(ranks)
    results = run_layouts([Job(layout, config_of(layout, corpus)) for layout in layouts], tmp_path)
    worst = {}
    for layout, seen in zip(layouts, results, strict=True):
        worst[layout] = check(layout, seen, references[layout.same_model], LIMIT)
        check_overlap(layout, seen)
    print(f"{len(layouts)} layouts on {ranks} ranks, worst relative error {max(worst.values()):.1e}")


def check_overlap(layout: Layout, ranks: list[Seen]) -> None:
    """With overlap_sync_grad all buckets start inside the last backward passes, in every schedule; without it, none."""
    for seen in ranks:
        blocks = {name.split(".")[1] for name, *_ in seen.before if name.startswith("layers.")}
        for started in seen.reduced:
            assert len(started) == (seen.buckets if layout.overlap_grad else 0), layout
            # The first one while gradients of others are still missing. (One large bucket is complete at the very end;
            # what layers add themselves counts when the backward pass leaves their block.)
            assert not started or seen.buckets < 4 or len(blocks) < 2 or started[0] > 0, layout


def test_the_loss_falls_and_every_folder_is_seen(references: dict[Layout, Seen]) -> None:
    metrics = references[Layout().same_model].metrics
    assert metrics[0]["loss_from_metric"] == pytest.approx(4.56, abs=0.1)  # ln(96)
    assert metrics[-1]["loss"] < 0.99 * metrics[0]["loss"]
    for name in FOLDERS:
        assert sum(step["folders"].get(name, [0])[0] for seen in references.values() for step in seen.metrics) > 0


def test_the_references_differ(references: dict[Layout, Seen]) -> None:
    """Else a layout could pass against the wrong one."""
    base = Layout()
    curves = {str(model): tuple(seen.curve()) for model, seen in references.items()}
    same = [(a, b) for a in curves for b in curves if a < b and curves[a] == curves[b]]
    assert all("fp32_norm" in a or "fp32_norm" in b for a, b in same), same  # all of it is fp64 here
    assert base.same_model in references


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    ranks = draw(st.sampled_from(sorted({math.prod(values[:3]) for values in bound_choices()})))  # else nearly all: 8
    values = draw(st.sampled_from([values for values in bound_choices() if math.prod(values[:3]) == ranks]))
    free = {name: draw(st.sampled_from(choices)) for name, choices in FREE.items()}
    return build({**dict(zip(BOUND, values, strict=True)), **free})


@settings(
    max_examples=RANDOM_LAYOUTS,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(layout=layouts())
def test_a_random_layout_gives_the_curve_of_one_process(
    layout: Layout, corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("random")
    (seen,) = run_layouts([Job(layout, config_of(layout, corpus))], folder / "layout")
    single = run_references([Job(layout.same_model, config_of(layout.same_model, corpus))], folder / "single")
    check(layout, seen, single[layout.same_model], LIMIT)
    check_overlap(layout, seen)
