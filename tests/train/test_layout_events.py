"""What happens around the steps is the same in every layout: ramp-up, skipped batches, evaluation, checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from internlm_lite.data.megatron import writing
from tests.corpus import write_corpus
from tests.train.layout_runs import Job, Seen, check, check_folders, run_layouts, run_references
from tests.train.layouts import LIMIT, Layout, config_of, runnable

ZBV: dict[str, Any] = {"schedule": "zbv", "chunks": 2}
INTERLEAVED: dict[str, Any] = {"schedule": "interleaved", "chunks": 2}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("events") / "corpus", documents=200)


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of unequal size: the last validation batch of each is partly padding."""
    return write_corpus(tmp_path_factory.mktemp("valid") / "corpus", documents=17, seed=1)


EVENTFUL = runnable(
    [
        Layout(dp=2, rows=8),
        Layout(pp=2, rows=8, tied=True),
        Layout(pp=2, rows=8, bucket=1500, **INTERLEAVED),
        Layout(pp=2, rows=8, tied=True, bucket=1500, **ZBV),
        Layout(dp=2, pp=2, rows=8, **INTERLEAVED),
        Layout(tp=2, pp=2, rows=8, sp=True, **ZBV),
        Layout(pp=4, rows=8, zero1=1),
        Layout(dp=2, pp=2, rows=8, **ZBV),
        Layout(tp=4, rows=8, sp=True),
    ]
)


def eventful(layout: Layout, corpus: Path, valid: Path) -> Job:
    """Two rows a step, four after two steps, and so on to eight; batch 1 is never trained on. Ranks that must hold the
    same bits are compared after each."""
    start = 2 // layout.dp
    data = {
        "total_steps": 7,
        "rampup_batch_size": f"{start} {start} 2",
        "skip_batches": "1",
        "valid_every": 3,
        "valid_folder": str(valid),
        "valid_batches": 2,
    }
    return Job(layout, config_of(layout, corpus, data=data, guard={"check_replicas_every": 1}))


@pytest.fixture(scope="module")
def eventful_single(corpus: Path, valid: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[Layout, Seen]:
    models = dict.fromkeys(layout.same_model for layout in EVENTFUL)
    return run_references([eventful(model, corpus, valid) for model in models], tmp_path_factory.mktemp("single"))


@pytest.mark.parametrize("ranks", [2, 4])
def test_ramp_up_skipped_batches_and_evaluation(
    ranks: int, corpus: Path, valid: Path, eventful_single: dict[Layout, Seen], tmp_path: Path
) -> None:
    layouts = [layout for layout in EVENTFUL if layout.world == ranks]
    results = run_layouts([eventful(layout, corpus, valid) for layout in layouts], tmp_path)
    for layout, seen in zip(layouts, results, strict=True):
        single = eventful_single[layout.same_model]
        check(layout, seen, single, LIMIT)
        assert [step["micro_num"] * layout.dp for step in seen[0].metrics] == [2, 4, 4, 6, 6, 8, 8], layout
        ours, expected = evaluations(seen[0]), evaluations(single)
        assert [event["step"] for event in ours] == [event["step"] for event in expected] == [2, 5, 6], layout
        for event, wanted in zip(ours, expected, strict=True):
            assert event["loss"] == pytest.approx(wanted["loss"], rel=LIMIT), layout
            assert event["acc"] == pytest.approx(wanted["acc"], rel=LIMIT), layout
            check_folders(layout, event["folders"], wanted["folders"], LIMIT)


def evaluations(seen: Seen) -> list[dict[str, Any]]:
    return [event for event in seen.events if event["event"] == "evaluation"]


def test_the_evaluations_say_something(eventful_single: dict[Layout, Seen]) -> None:
    for seen in eventful_single.values():
        first, second, _ = evaluations(seen)
        assert second["loss"] < first["loss"]
        assert all(tokens > 0 for tokens, _, _ in first["folders"].values())


MOVES = {
    "two copies of a tied weight to one": (
        Layout(pp=2, tied=True, layers=9, bucket=1500),
        Layout(pp=2, tied=True, layers=9, zero1=1, **ZBV),
    ),
    "one copy of a tied weight to two, split over tensor ranks": (
        Layout(pp=2, tied=True, layers=9, **ZBV),
        Layout(tp=2, pp=2, tied=True, layers=9, split_hidden=False, sp=True, bucket=1500),
    ),
    "interleaved stages to one process": (Layout(pp=4, layers=9, **INTERLEAVED), Layout(layers=9)),
    "one process to a zero bubble with sequence parallelism": (
        Layout(layers=9),
        Layout(tp=2, pp=2, layers=9, sp=True, bucket=1500, **ZBV),
    ),
    "hidden-split embedding to data parallel stages": (
        Layout(tp=4, layers=9, sp=True),
        Layout(dp=2, pp=2, layers=9, bucket=1500, **INTERLEAVED),
    ),
    "tied over tensor ranks to two copies": (
        Layout(dp=2, tp=2, layers=9, tied=True, split_hidden=False, zero1=1),
        Layout(pp=2, tied=True, layers=9, overlap_param=False),
    ),
}
MOVES = {name: pair for name, pair in MOVES.items() if len(runnable(list(pair))) == 2}
"""Layouts that save after three steps, and those that go on."""
SAVED_AT = 3


def run_moves(jobs: dict[str, Job], folder: Path) -> dict[str, list[Seen]]:
    """Jobs by name, one world for each number of ranks."""
    found: dict[str, list[Seen]] = {}
    for ranks in sorted({job.layout.world for job in jobs.values()}):
        names = [name for name, job in jobs.items() if job.layout.world == ranks]
        found |= dict(zip(names, run_layouts([jobs[name] for name in names], folder / str(ranks)), strict=True))
    return found


def test_a_checkpoint_goes_on_in_another_layout(corpus: Path, tmp_path: Path) -> None:
    def job(name: str, layout: Layout, **data: Any) -> Job:
        ckpt = {"enable_save_ckpt": True, "save_ckpt_folder": f"local:{tmp_path / name.replace(' ', '_')}"}
        return Job(layout, config_of(layout, corpus, data=data, ckpt=ckpt))

    models = dict.fromkeys(layout.same_model for layout, _ in MOVES.values())
    singles = run_references([Job(model, config_of(model, corpus)) for model in models], tmp_path / "single")
    saved = run_moves(
        {name: job(name, before, total_steps=SAVED_AT) for name, (before, _) in MOVES.items()}, tmp_path / "saving"
    )
    resumed = run_moves({name: job(name, after) for name, (_, after) in MOVES.items()}, tmp_path / "resuming")
    for name, (before, after) in MOVES.items():
        assert before.same_model == after.same_model
        expected = singles[before.same_model].curve()
        whole = [*saved[name][0].curve(), *resumed[name][0].curve()]
        assert [step["step"] for step in resumed[name][0].metrics] == [SAVED_AT, SAVED_AT + 1], name
        for step, (ours, wanted) in enumerate(zip(whole, expected, strict=True)):
            assert ours == pytest.approx(wanted, rel=LIMIT), f"{name}: step {step}"
        loaded: dict[Any, bytes] = {}
        for rank in resumed[name]:
            for key, found in rank.before.items():
                assert loaded.setdefault(key, found) == found, f"{name}: copies of {key} were loaded with other values"


def test_micro_num_may_be_traded_for_micro_bsz(tmp_path: Path) -> None:
    """256 tokens are all there is, in documents of 32: every step takes them all, in rows of 32, 64 or 128 tokens."""
    rng = np.random.default_rng(0)
    (tmp_path / "corpus" / "all").mkdir(parents=True)
    with writing(tmp_path / "corpus" / "all" / "part.bin", np.dtype(np.uint16)) as out:
        for _ in range(8):
            out.add(rng.integers(1, 96, size=32).astype(np.uint16))
    keys = (("loss.z_loss", 0.05), ("loss.label_smoothing", 0.1))
    split = [
        Layout(dp=2, rows=4, micro_bsz=2, keys=keys),
        Layout(pp=2, rows=2, micro_bsz=4, keys=keys),
        Layout(tp=2, rows=8, sp=True, keys=keys),
    ]
    whole = Layout(rows=8, keys=keys)
    single = run_references([Job(whole, config_of(whole, tmp_path / "corpus"))], tmp_path / "single")[whole]
    results = run_layouts([Job(layout, config_of(layout, tmp_path / "corpus")) for layout in split], tmp_path / "split")
    for layout, seen in zip(split, results, strict=True):
        for ours, expected in zip(seen[0].curve(), single.curve(), strict=True):
            assert ours == pytest.approx(expected, rel=LIMIT), layout
