"""metrics.jsonl and events.jsonl: shape, segments, torn lines, full disks."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from internlm_lite.monitor.jsonl import (
    EventsFile,
    JsonlWriter,
    MetricsFile,
    SamplesFile,
    finite,
    has_ended,
    next_segment,
    read_objects,
)
from internlm_lite.monitor.record import FolderFigures, Sample
from tests.monitor.test_line import SEED


def test_step_objects(tmp_path):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, 0)
    folders = {"code": FolderFigures(60571, 11.5, 0.25), "docs": FolderFigures(0, math.nan, 0.0)}
    file.step(dataclasses.replace(SEED[0], folders=folders, perplexity=math.inf))
    (value,) = [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]
    assert value["folders"] == {"code": [60571, 11.5, 0.25]}
    assert (value["seg"], value["step"], value["loss"], value["perplexity"]) == (0, 0, 11.542577743530273, None)
    assert (value["tgs"], value["tgs_sma"], value["mfu"]) == (246.32, 246.32, None)
    assert value["grad_norm"] == {"0_default": 87.3189924662012, "1_fp32": 0.0}
    assert value["time"] == "2023-11-10T11:46:16.409+08:00"
    file.close()


def test_all_numbers_of_record_are_written(tmp_path):
    names = {field.name for field in dataclasses.fields(SEED[0])} - {"speed", "origin", "stage", "in_pass"}
    names |= {field.name for field in dataclasses.fields(SEED[0].speed)} | {"seg"}
    file = MetricsFile(tmp_path / "m", 0)
    file.step(SEED[0])
    assert set(next(read_objects(tmp_path / "m"))) == names


def test_few_of_many_folders_cost_few_bytes(tmp_path):
    """50,000 steps of 200 folders, of which 40 have tokens in a step, stay under 200 MB."""
    file = MetricsFile(tmp_path / "m", 0)
    some = FolderFigures(10_000, math.pi, 1 / 3, seen=10_000)
    folders = {f"source_{n:03d}_code": FolderFigures(0, math.nan, 0.0, seen=0) if n % 5 else some for n in range(200)}
    file.step(dataclasses.replace(SEED[0], folders=folders))
    assert (tmp_path / "m").stat().st_size < 200e6 / 50_000


def test_next_segment(tmp_path):
    metrics, events = tmp_path / "metrics.jsonl", tmp_path / "events.jsonl"
    assert next_segment(metrics, events) == 0
    for segment in range(2):
        MetricsFile(metrics, segment).step(SEED[0])
    assert (next_segment(metrics, events), next_segment(events)) == (2, 0)
    for segment in (2, 3):  # starts that failed before a step was done
        EventsFile(events, segment).event("failed", {"why": '{"seg":9}', "folder": {"seg": [7]}})
    with events.open("a") as file:
        file.write('{"time":"2026", "seg": 40')
    assert next_segment(metrics, events) == 41


@pytest.mark.parametrize(
    ("kinds", "ended"),
    [
        ([], False),
        (["start"], False),
        (["start", "done", "checkpoint_done", "alert_over"], True),
        (["start", "done", "start"], False),
        (["start", "stopped"], False),
        (["start", "done", "failed"], False),
        (["start", "stopped", "start", "done"], True),
        (["start", "start 1", "done", "start 1"], False),
        (["start", "start 1", "done 1", "failed"], True),
    ],
)
def test_has_ended(kinds, ended, tmp_path):
    for text in kinds:
        kind, _, segment = text.partition(" ")
        EventsFile(tmp_path / "events.jsonl", int(segment or 0)).event(kind, {})
    assert has_ended(tmp_path / "events.jsonl") is ended


def test_truncated_last_line(tmp_path):
    path = tmp_path / "m"
    for step in range(2):
        file = MetricsFile(path, 0)
        file.step(dataclasses.replace(SEED[0], step=step, folders={}))
        file.close()
    whole = path.read_bytes()
    first_end = whole.index(b"\n") + 1
    for cut in range(first_end, len(whole) - 1):
        path.write_bytes(whole[:cut])
        assert [value["step"] for value in read_objects(path)] == [0]
    file = MetricsFile(path, 0)  # the next process ends the torn line before it writes
    file.step(dataclasses.replace(SEED[0], step=7))
    assert [value["step"] for value in read_objects(path)] == [0, 7]
    assert len(path.read_bytes().splitlines()) == 3


def test_lines_are_unbuffered(tmp_path):
    writer = JsonlWriter(tmp_path / "m")
    for n in range(3):
        writer.write({"n": n})
        assert [value["n"] for value in read_objects(tmp_path / "m")] == list(range(n + 1))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_disk_is_logged_once(caplog):
    writer = JsonlWriter(Path("/dev/full"))
    for n in range(3):
        writer.write({"n": n})
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "No space left on device" in caplog.text


def test_temporarily_full_disk(tmp_path, monkeypatch, caplog):
    writer = JsonlWriter(tmp_path / "m")
    writer.write({"n": 0})
    real = os.write

    def nearly_full(descriptor: int, line: bytes) -> int:
        if len(line) < 8:
            raise OSError(28, "No space left on device")
        return real(descriptor, line[:4])

    monkeypatch.setattr(os, "write", nearly_full)
    writer.write({"number": 1})
    writer.write({"number": 2})
    monkeypatch.setattr(os, "write", real)
    writer.write({"n": 3})
    assert [value.get("n") for value in read_objects(tmp_path / "m")] == [0, 3]
    assert len(caplog.records) == 1


def test_missing_folder_is_logged(tmp_path, caplog):
    JsonlWriter(tmp_path / "absent" / "m").write({"n": 0})
    assert "cannot write" in caplog.text


def test_events(tmp_path):
    events = EventsFile(tmp_path / "events.jsonl", segment=2)
    events.event("checkpoint", {"step": 50, "seconds": 1.5, "loss": math.nan})
    (value,) = read_objects(tmp_path / "events.jsonl")
    assert (value["event"], value["seg"], value["step"], value["loss"]) == ("checkpoint", 2, 50, None)
    assert value["time"][:2] == "20"
    events.close()


def test_samples(tmp_path):
    samples = SamplesFile(tmp_path / "samples.jsonl", segment=1)
    samples.sample(Sample(50, "Once\n", "upon \ud800"))
    (value,) = read_objects(tmp_path / "samples.jsonl")
    assert (value["seg"], value["step"], value["prompt"], value["time"][:2]) == (1, 50, "Once\n", "20")
    samples.close()


def test_finite():
    assert finite({"a": (1.0, math.nan, [math.inf]), 2: "x", "b": True}) == {
        "a": [1.0, None, [None]], "2": "x", "b": True,
    }  # fmt: skip


def test_readers_do_not_import_torch():
    """A dashboard or a report must start at once."""
    modules = ["record", "line", "jsonl", "speed", "flops"]
    code = "import sys\n" + "".join(f"import internlm_lite.monitor.{name}\n" for name in modules)
    code += "import internlm_lite.runtime.dist_env\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
