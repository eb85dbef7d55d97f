"""The step line against the seed's own six lines."""

from __future__ import annotations

import dataclasses
import math
import re
from datetime import datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from internlm_lite.monitor.line import clock, format_step_line, parse_step_line
from internlm_lite.monitor.record import FolderFigures, Origin, SpeedFigures, StepRecord

SEED_LINES = (Path(__file__).parent / "data" / "seed.log").read_text("utf-8").splitlines()
HEADER = re.compile(r"\S+ INFO \[(.*), line (\d+), in (.*)\] - pid=(\d+) : ")


def record_of(line: str) -> StepRecord:
    """The record that `format_step_line` prints as `line`."""
    figures = parse_step_line(line)
    header = HEADER.match(line)
    assert figures is not None and header is not None
    file, number, function, pid = header.groups()
    time = datetime.fromisoformat(figures.pop("time"))
    folders = {
        name: FolderFigures(int(tokens), loss, acc) for name, (tokens, loss, acc) in figures.pop("folders").items()
    }
    speed = SpeedFigures(**{name: figures.pop(name) for name in SpeedFigures.__annotations__})
    origin = Origin(file, int(number), function, int(pid))
    return StepRecord(time=time, origin=origin, speed=speed, folders=folders, **figures)


SEED = [record_of(line) for line in SEED_LINES]


@pytest.mark.parametrize("step", range(6))
def test_seed_lines_round_trip(step):
    assert format_step_line(SEED[step]) == SEED_LINES[step]
    assert SEED[step].step == step


def test_seed_line_values():
    record = SEED[2]
    assert record.time.isoformat() == "2023-11-10T11:46:24.921000+08:00"
    assert record.origin == Origin("training_internlm.py", 600, "record_current_batch_training_metrics", 117775)
    assert (record.loss, record.lr, record.tflops) == (10.111491203308105, 8.000000000000001e-07, 127.02177898638753)
    assert record.grad_norm == {"0_default": 76.99316692997016, "1_fp32": 0.0}
    assert (record.micro_num, record.num_consumed_tokens, record.smallest_batch) == (4, 196608, 3)
    assert (record.perplexity, record.loss_from_metric, record.acc) == (25907.498, 10.1623, 0.0704)
    assert len(record.folders) == 33 and list(record.folders)[:2] == [".git", ".github"]
    assert record.folders[".git"] == FolderFigures(60244, 10.1623, 0.0704)
    empty = record.folders["web_demo_internlm.py"]
    assert (empty.tokens, empty.acc) == (0, 0.0) and math.isnan(empty.loss)
    assert (record.mfu, record.eta_seconds, record.pack_fill, record.memory_bytes) == (None, None, None, None)


def test_perplexity_is_exp_of_the_metrics_loss():
    for record in SEED:
        assert math.exp(record.loss_from_metric) == pytest.approx(record.perplexity, rel=1e-4)


def test_rounding():
    raw = dataclasses.replace(
        SEED[1],
        fwd_bwd_time=3.70312,
        acc=4e-06,
        perplexity=104321.03125,
        loss_from_metric=11.30896,
        loss=11.3379974365,
        folders={"code": FolderFigures(5, 1.234567, 0.56789)},
    )
    line = format_step_line(raw)
    assert " fwd_bwd_time=3.7 acc=0.0 perplexity=104321.0312 acc/code=0.5679 tokens/code=5 " in line
    assert line.endswith(" loss_from_metric=11.309 loss/code=1.2346 ")
    assert " loss=11.3379974365 " in line


def test_new_keys_follow_folders():
    record = dataclasses.replace(
        SEED[1], mfu=0.412345, eta_seconds=93784.6, pack_fill=1.0, memory_bytes=int(71.25 * 2**30)
    )
    line = format_step_line(record)
    assert line == SEED_LINES[1] + "mfu=0.4123 eta=26:03:05 pack_fill=1.0 memory=71.25GiB "
    assert format_step_line(record_of(line)) == line


def test_folder_named_like_a_key():
    folders = {"year=2024": FolderFigures(5, 1.5, 0.25), "a=1=": FolderFigures(7, 2.5, 0.5)}
    line = format_step_line(dataclasses.replace(SEED[1], folders=folders))
    assert record_of(line).folders == folders


def test_numbers_that_are_not_finite():
    record = dataclasses.replace(
        SEED[0], loss=math.nan, perplexity=math.inf, grad_norm={"0_default": math.inf, "1_fp32": math.nan}
    )
    line = format_step_line(record)
    assert "grad_norm={'0_default': inf, '1_fp32': nan} " in line and " perplexity=inf " in line
    assert format_step_line(record_of(line)) == line


def test_block_speeds_before_first_block():
    speed = dataclasses.replace(SEED[0].speed, last_tgs_10=0.0, last_tgs_50=12.345)
    assert " tgs/last_tgs_10=0 tgs/last_tgs_50=12.35 " in format_step_line(dataclasses.replace(SEED[0], speed=speed))


NAMES = st.from_regex(re.compile(r"[\w.()+-]([\w.()+ -]{0,12}[\w.()+-])?", re.ASCII), fullmatch=True)
FLOATS = st.floats(allow_nan=True, allow_infinity=True)


@given(
    st.dictionaries(NAMES, st.builds(FolderFigures, st.integers(0, 10**12), FLOATS, st.floats(0, 1)), max_size=4),
    FLOATS,
    st.floats(0, 1e9),
)
def test_record_round_trip(folders: dict[str, FolderFigures], loss: float, eta: float):
    record: StepRecord = dataclasses.replace(SEED[3], folders=folders, loss=loss, eta_seconds=eta)
    line = format_step_line(record)
    assert format_step_line(record_of(line)) == line
    assert list(record_of(line).folders) == list(folders)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "hello",
        SEED_LINES[0].replace(" loss=", " cost="),
        SEED_LINES[0][:100],
        SEED_LINES[0].replace("step=0", "step=0.5"),
        SEED_LINES[0].replace("step=0", "global_step=0"),
        SEED_LINES[0].replace(" loss=11", " loss=x11"),
        "2024-01-10 10:00:00,123\tINFO evaluation.py:126 in f -- Validation on en: val/en_loss=2.5 val/en_acc=0.5",
    ],
)
def test_no_step_line(text):
    assert parse_step_line(text) is None


def test_origin_is_the_caller():
    origin = Origin.here()
    assert (origin.file, origin.function) == ("test_line.py", "test_origin_is_the_caller")


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00:00"), (59.6, "0:01:00"), (3725, "1:02:05"), (1e6, "277:46:40")]
)
def test_clock(seconds, text):
    assert clock(seconds) == text
