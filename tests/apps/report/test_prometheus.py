"""GET /metrics, read with Prometheus' own client."""

from __future__ import annotations

import json
import re
from datetime import datetime, timezone
from pathlib import Path

import pytest

from internlm_lite.apps.report.prometheus import FAMILIES, PREFIX, render_metrics
from internlm_lite.apps.report.run import RunReader
from tests.apps.report import made
from tests.apps.report.small import BEGIN, event, line, run_folder
from tests.apps.report.test_server import TOKEN, serving

parser = pytest.importorskip(
    "prometheus_client.parser", reason="needs prometheus_client: pip install prometheus_client"
)
Labels = tuple[tuple[str, str], ...]


def parsed(text: str) -> dict[tuple[str, Labels], float]:
    """(name without prefix, labels) -> value. No sample occurs twice, every family has its help and type."""
    found: dict[tuple[str, Labels], float] = {}
    for family in parser.text_string_to_metric_families(text):
        name = family.name.removeprefix(PREFIX)
        assert (family.type, family.documentation) == FAMILIES[name]
        for sample in family.samples:
            assert sample.name == family.name
            key = name, tuple(sample.labels.items())
            assert key not in found
            found[key] = sample.value
    return found


def read(*folders: Path, names: tuple[str, ...] = ()) -> dict[tuple[str, Labels], float]:
    names = names or tuple(folder.name for folder in folders)
    readers = [RunReader(folder, name).read_all() for folder, name in zip(folders, names, strict=True)]
    return parsed(render_metrics(readers, datetime.now(timezone.utc)))


LINES = [
    line(step, lr=1e-3, tgs=5.0, mfu=0.4, tflops=2.0, inf_nan_skip_batches=1, memory_bytes=7, eta_seconds=3.0)
    for step in range(4)
]
EVALUATION = {
    "step": 3, "loss": 2.5, "acc": 0.25, "bits_per_byte": 1.5, "ema": {"loss": 2.4}, "folders": {"v": [5, 2.5, 0.25]},
    "tasks": {"cloze": {"acc": 0.75}},
}  # fmt: skip
START = event("start", 0, step=0, total_steps=9, folders=["code", "docs"])


def test_every_figure(tmp_path: Path) -> None:
    found = read(
        run_folder(tmp_path / "run", LINES, [START, event("evaluation", 4, **EVALUATION), event("done", 5, step=4)])
    )
    run = ("run", "run")
    assert {key: value for key, value in found.items() if key[0] != "state"} == {
        ("step", (run,)): 4, ("total_steps", (run,)): 9, ("tokens", (run,)): 40, ("loss", (run,)): 2.0,
        ("learning_rate", (run,)): 1e-3, ("batch_tokens", (run,)): 10, ("tokens_per_second", (run,)): 10,
        ("tokens_per_device_second", (run,)): 5.0, ("tflops", (run,)): 2.0, ("mfu", (run,)): 0.4,
        ("gradient_norm", (run,)): 1.0, ("memory_bytes", (run,)): 7, ("skipped_steps", (run,)): 1,
        ("restarts", (run,)): 0, ("last_line_timestamp_seconds", (run,)): BEGIN.timestamp() + 5,
        ("folder_loss", (run, ("folder", "code"))): 2.0, ("folder_accuracy", (run, ("folder", "code"))): 0.5,
        ("folder_tokens", (run, ("folder", "code"))): 40, ("folder_tokens", (run, ("folder", "docs"))): 0,
        ("validation_step", (run,)): 3, ("validation_loss", (run, ("weights", "model"))): 2.5,
        ("validation_loss", (run, ("weights", "ema"))): 2.4, ("validation_accuracy", (run, ("weights", "model"))): 0.25,
        ("validation_bits_per_byte", (run, ("weights", "model"))): 1.5,
        ("validation_folder_loss", (run, ("folder", "v"))): 2.5,
        ("task", (run, ("task", "cloze"), ("metric", "acc"))): 0.75,
    }  # fmt: skip
    states = {dict(labels)["state"]: value for (name, labels), value in found.items() if name == "state"}
    assert [name for name, value in states.items() if value] == ["done"] and len(states) == 10


@pytest.mark.parametrize(
    "name", [*made.HOSTILE, 'a\\b"c\nd', "\\", "\\n", 'x"} 1\ninternlm_lite_loss{run="y', "é\r\x00"]
)
def test_odd_names_come_back_as_they_are(tmp_path: Path, name: str) -> None:
    lines = [{**line(0), "folders": {name: [10, 1.5, 0.5]}}]
    found = read(run_folder(tmp_path / "run", lines), names=(name,))
    assert found["folder_loss", (("run", name), ("folder", name))] == 1.5


def test_half_a_surrogate_pair_is_written_out(tmp_path: Path) -> None:
    """A page can be sent, all escapes in it are of the format, and two such names are not one."""
    half, other = (json.loads(f'"\\ud80{n}"') for n in (0, 1))
    lines = [{**line(0), "folders": {half: [10, 1.5, 0.5], other: [10, 2.5, 0.5]}}]
    with serving(run_folder(tmp_path / "run", lines)) as ask:
        reply = ask("/metrics")
    text = reply.body.decode()
    assert reply.status == 200 and not re.search(r"\\[^\\n\"]", text.replace("\\\\", ""))
    losses = {dict(labels)["folder"]: value for (name, labels), value in parsed(text).items() if name == "folder_loss"}
    assert losses == {"\\ud800": 1.5, "\\ud801": 2.5}


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    folders = [run_folder(tmp_path / part / "run", LINES) for part in "ab"]
    found = read(*folders)
    assert {dict(labels)["run"] for _, labels in found} == {str(folder) for folder in folders}


def test_unknown_figures_and_no_runs(tmp_path: Path) -> None:
    found = read(run_folder(tmp_path / "run", [line(0, loss=None)]))
    assert ("loss", (("run", "run"),)) not in found and ("step", (("run", "run"),)) in found
    assert render_metrics([], datetime.now(timezone.utc)) == ""


def test_a_run_that_cannot_be_read_does_not_hide_others(tmp_path: Path) -> None:
    good, bad = (RunReader(run_folder(tmp_path / name, LINES), name).read_all() for name in ("good", "bad"))
    bad.error = "no permission"
    found = parsed(render_metrics([bad, good], datetime.now(timezone.utc)))
    assert found["state", (("run", "bad"), ("state", "unreadable"))] == 1
    assert found["step", (("run", "good"),)] == 4


def test_over_http(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "JOB/run", LINES, [START])
    with serving(run) as ask:
        reply = ask("/metrics")
        assert reply.status == 200 and reply.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
        assert parsed(reply.body.decode())["step", (("run", "JOB/run"),)] == 4
        assert ask("/metrics", "HEAD").body == b"" and ask("/metrics", "POST").status == 405
        assert ask("/metrics", Host="evil.example").status == 403


def test_a_program_sends_the_token_in_a_header(tmp_path: Path) -> None:
    with serving(run_folder(tmp_path / "run", LINES), token=TOKEN) as ask:
        assert ask("/metrics").status == 403
        assert ask("/metrics", Authorization="Bearer wrong").status == 403
        assert ask("/metrics", Authorization=f"Bearer {TOKEN}").status == 200
