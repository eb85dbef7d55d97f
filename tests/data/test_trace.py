"""Which documents are in which step, compared with a search through every token of 2,000 steps."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import pytest

from internlm_lite.batch import Position
from internlm_lite.config.schema import Config, DataConfig, StageConfig
from internlm_lite.data.data_loader import TrainingData, open_training_data
from internlm_lite.data.demand import check_caps, stage_uses, with_total_steps
from internlm_lite.data.trace import documents_of_step, steps_of_document
from internlm_lite.errors import ConfigError, DataError
from tests.cli import Ended, run
from tests.data.corpora import data_config, write_native
from tests.train.runs import tiny

STEPS = 2000
LENGTHS = {"code": [30, 7, 64, 1, 50, 90, 23, 57, 3], "docs": [300, 20, 41, 24, 16], "long": [512, 480, 333]}
STAGES = {
    "one": [],
    "lengths": [{"until": 300}, {"until": 777, "seq_len": 5}, {"until": 1200, "seq_len": 20}, {"micro_bsz": 1}],
    "mixes": [
        {"until": 150, "weights": {"code": 2, "docs": 1}},
        {"until": 900},
        {"weights": {"long": 3, "docs": 1}, "seq_len": 6},
    ],
}
Place = tuple[int, int, int, int, int]
"""(step, rank, row of the global batch, first token, the one after the last)"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every token has an id of its own, in the order of folders, files and documents."""
    root, first = tmp_path_factory.mktemp("trace"), 1
    for name, lengths in LENGTHS.items():
        documents = []
        for length in lengths:
            documents.append(list(range(first, first + length)))
            first += length
        write_native(root / name / "a.bin", documents[:2])
        write_native(root / name / "b.bin", documents[2:])
    return root


def opened(corpus: Path, kind: str, dp_rank: int = 0) -> tuple[DataConfig, TrainingData]:
    changes = {"total_steps": STEPS, "skip_batches": "3,298-303,776,1500-1502", "rampup_batch_size": "1 1 40"}
    config = data_config(corpus, micro_num=3, micro_bsz=2, seq_len=7, min_length=2, **changes)
    stages = [StageConfig(**stage) for stage in STAGES[kind]]
    return config, open_training_data(config, 100_000, dp_rank, 2, 3, stages)


def search(data: TrainingData) -> dict[tuple[str, int], list[Place]]:
    """Every document's places, from the tokens of the batches of both ranks."""
    owner: dict[int, tuple[str, int, int]] = {}
    first = 1
    for name, lengths in LENGTHS.items():
        for document, length in enumerate(lengths):
            owner.update({first + at: (name, document, at) for at in range(length)})
            first += length
    places: dict[tuple[str, int], list[Place]] = defaultdict(list)
    position, ranks = Position(), [replace(data, dp_rank=rank) for rank in range(2)]
    for step in range(STEPS):
        batches = [rank.build(position) for rank in ranks]
        position = batches[0].after
        for rank, batch in enumerate(batches):
            for micro, tokens in enumerate(batch.tokens.tolist()):
                run: list[int] = []
                for token in [*tokens, 0]:
                    name, document, at = owner.get(token, ("", 0, 0))
                    if run and owner[run[-1]] != (name, document, at - 1):
                        start = owner[run[0]]
                        places[start[:2]].append((step, rank, micro * 2 + rank, start[2], start[2] + len(run)))
                        run = []
                    run.append(token)
    return places


@pytest.mark.parametrize("kind", STAGES)
def test_find_and_step_agree_with_a_search_through_all_tokens(corpus: Path, kind: str) -> None:
    config, data = opened(corpus, kind)
    places = search(data)
    of_step = defaultdict(list)
    for name, lengths in LENGTHS.items():
        for document, length in enumerate(lengths):
            found = steps_of_document(config, data, name, document)
            trained = [(o.step, o.rank, o.row, o.start, o.stop) for o in found if o.step is not None]
            assert sorted(trained) == sorted(places[name, document]), (name, document)
            assert bool(trained) == (length > 1), "documents shorter than min_length are in no step"
            assert {o.batch for o in found if o.step is None} <= {3, *range(298, 304), 776, 1500, 1501, 1502}
            for step, *place in places[name, document]:
                of_step[step].append((name, document, *place))
    for step in (0, 1, 2, 39, 292, 293, 294, 295, 770, 1190, STEPS - 1):
        found = documents_of_step(config, data, step)
        assert sorted((o.folder, o.document, o.rank, o.row, o.start, o.stop) for o in found) == sorted(of_step[step])
        assert all(o.step == step and o.micro * 2 + o.rank == o.row for o in found)
    assert found[0].file.endswith(".bin")


@pytest.mark.parametrize("kind", STAGES)
def test_tokens_and_epochs_of_stages_agree_with_the_batches(corpus: Path, kind: str) -> None:
    config, data = opened(corpus, kind)
    config = config.model_copy(update={"skip_batches": ""})
    data = open_training_data(config, 100_000, 0, 2, 3, [StageConfig(**stage) for stage in STAGES[kind]])
    read: dict[tuple[int, str], int] = defaultdict(int)
    steps: dict[int, int] = defaultdict(int)
    position, ranks = Position(), [replace(data, dp_rank=rank) for rank in range(2)]
    for _ in range(STEPS):
        batches = [rank.build(position) for rank in ranks]
        position = batches[0].after
        steps[batches[0].stage] += 1
        for batch in batches:
            for row in batch.folders.tolist():
                read[batch.stage, data.folders[row[0]]] += len(row)
    uses = stage_uses(config, data)
    assert {use.stage.number: use.steps for use in uses} == steps
    for use in uses:
        for name, folder in use.folders.items():
            assert folder.tokens == read[use.stage.number, name]
        assert use.tokens == sum(folder.tokens for folder in use.folders.values())
    for name, folder in uses[-1].folders.items():
        size = sum(length for length in LENGTHS[name] if length > 1)
        total = sum(read[use.stage.number, name] for use in uses)
        assert folder.epochs == pytest.approx(total / size, rel=0.06), "passes leave out what fills no row"


def test_caps_on_epochs_are_checked_before_the_start(corpus: Path) -> None:
    """A folder of a small weight whose rows run out is no surprise in the middle: cap 1 and a need of 1.01."""
    weights = {"code": 1.0, "docs": 1.0, "long": 8.0}
    for steps, fits in ((160, True), (240, False)):
        config = data_config(corpus, micro_num=1, micro_bsz=1, seq_len=16, total_steps=steps, weights=weights)
        data = open_training_data(config, 100_000, 0, 1, 3)
        epochs = stage_uses(config, data)[0].folders["code"].epochs
        assert (epochs <= 1) == fits
        check_caps(config.model_copy(update={"max_epochs": {"code": epochs}}), data)
        for caps, named in (({"code": epochs - 0.01}, "'code'"), (0.01, "'docs'")):
            with pytest.raises(DataError, match=rf"data.max_epochs: in {steps} steps .*{named}.* times .allowed"):
                check_caps(config.model_copy(update={"max_epochs": caps}), data)
    with pytest.raises(DataError, match=r"data.max_epochs: 'cod' is no folder"):
        check_caps(config.model_copy(update={"max_epochs": {"cod": 1.0}}), data)


def lengths_of(corpus: Path, stages: list[dict], **data: object) -> tuple[Config, TrainingData]:
    config = tiny(corpus, data={"seq_len": 8, "micro_bsz": 2, "micro_num": 2, "total_steps": 0, **data})
    curve = config.lr_scheduler.model_copy(update={"total_steps": 0, "warmup_ratio": 0.25})
    given = [StageConfig(**stage) for stage in stages]
    config = config.model_copy(update={"lr_scheduler": curve, "stages": given})
    return config, open_training_data(config.data, 100_000, 0, 1, 3, given)


def test_the_number_of_steps_follows_from_tokens_or_epochs(corpus: Path) -> None:
    """No placeholder feeds the decay: the schedule gets the same number."""
    cases = [
        ([], {"total_tokens": 640}, 20),
        ([], {"total_tokens": 641}, 21),
        ([], {"total_tokens": 640, "rampup_batch_size": "1 1 4"}, 22),
        ([], {"total_tokens": 640, "skip_batches": "2-7"}, 20),
        ([{"until": 4}, {"seq_len": 4}], {"total_tokens": 640}, 4 + 32),
        ([], {"epochs": 1.0}, 63),
        ([], {"epochs": 2.5}, 157),
        ([{"until": 4}, {"seq_len": 4}], {"epochs": 1}, 4 + 121),
    ]
    for stages, given, steps in cases:
        config, data = lengths_of(corpus, stages, **given)
        found = with_total_steps(config, data)
        assert (found.data.total_steps, found.lr_scheduler.total_steps) == (steps, steps), (stages, given)
        assert found.data.epochs == given.get("epochs")
    config, data = lengths_of(corpus, [], epochs=1.0)
    assert data.epoch(Position(63, 126)) == 1 and data.epoch(Position(62, 124)) == 0


def test_a_derived_length_that_other_keys_do_not_fit(corpus: Path) -> None:
    config, data = lengths_of(corpus, [{"until": 4}, {"until": 6}], total_tokens=640)
    with pytest.raises(
        ConfigError, match=r"with data.total_steps=20, from data.total_tokens=640:\nstages\[1\].until: found 6"
    ):
        with_total_steps(config, data)
    config, data = lengths_of(corpus, [], epochs=0.001)
    with pytest.raises(ConfigError, match=r"data.epochs=0.001 is 0 steps, expected at least 1"):
        with_total_steps(config, data)


def test_the_command_prints_what_is_found(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "c.py").write_text(
        f"data = dict(seq_len=8, micro_bsz=2, micro_num=2, epochs=3, train_folder={str(corpus)!r})\n"
        "model = dict(num_attention_heads=4, hidden_size=32, num_layers=2, vocab_size=4000)\n"
    )

    def asked(*options: str) -> Ended:
        return run("tools/inspect_data.py", "--config", "c.py", *options, folder=tmp_path)

    found = asked("--json", "--find", "docs:2", "--dp", "2")
    rows = [json.loads(line) for line in found.output.splitlines()]
    assert found.code == 0 and sum(row["stop"] - row["start"] for row in rows) == 3 * 41
    step = asked("--json", "--step", str(rows[0]["step"]), "--dp", "2")
    assert rows[0] in [json.loads(line) for line in step.output.splitlines()]
    assert "docs:2" in asked("--find", "docs:2").output
    short = asked("--find", "long:2", "data.epochs=None", "data.total_steps=1")
    assert short.code == 0 and short.output.strip() == "long:2: in none of the 1 steps"
    bad = {
        ("--find", "docs:5"): "docs has documents 0 to 4",
        ("--find", "doc:1"): "'doc' is no folder with data",
        ("--find", "docs"): "expected a data folder and a document's index",
        ("--step", "3", "stages=[dict(until=9), dict(until=5), dict()]"): "stages neither overlap nor go back",
        ("--steps", "3", "stages=[dict(until=9), dict(weights={})]"): "expected the share of at least one data folder",
        ("--step", "100000"): "there is no step 100000: the run has steps 0 to",
    }
    for options, message in bad.items():
        ended = asked(*options)
        assert ended.code == 2 and message in ended.output and "Traceback" not in ended.output
