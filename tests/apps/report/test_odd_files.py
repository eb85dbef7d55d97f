"""Whatever stands in the files of a run, the page's data are made of it, and are JSON."""

from __future__ import annotations

import json
import tempfile
import threading
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from internlm_lite.apps.report.page import Assets, render_page
from internlm_lite.apps.report.payload import make_payload
from internlm_lite.apps.report.run import RunReader
from internlm_lite.monitor.jsonl import JsonlWriter
from tests.apps.report.small import at, line, run_folder

ASSETS = Assets("<!--PAYLOAD-->", "", "")
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.sampled_from([at(0), at(90), "code"])
)
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner))
KEYS = (
    *("seg", "step", "time", "loss", "grad_norm", "folders", "event", "name", "checkpoint", "saved", "waited", "why"),
    *("stall_seconds", "total_steps", "folder_tokens", "rule", "text", "prompt", "num_consumed_tokens", "eta_seconds"),
    *("inf_nan_skip_batches", "key", "value", "origin", "acc"),
)
KINDS = (
    *("start", "checkpoint", "checkpoint_done", "alarm", "alert", "alert_over"),
    *("evaluating", "evaluation", "stopped", "done", "failed"),
)
FOLDERS = st.dictionaries(st.sampled_from(["code", "a", ""]), st.lists(SCALARS, min_size=3, max_size=3) | VALUES)
OBJECTS = st.fixed_dictionaries(
    {"step": st.integers(0, 9) | SCALARS, "time": st.just(at(5)) | SCALARS},
    optional={"event": st.sampled_from(KINDS), "seg": st.integers(0, 2) | SCALARS, "folders": FOLDERS},
).flatmap(lambda known: st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=5).map(lambda more: {**more, **known}))
TEXTS = st.lists(st.one_of(OBJECTS.map(json.dumps), VALUES.map(json.dumps), st.text(max_size=20)), max_size=12)


def page_of(folder: Path) -> dict[str, Any]:
    payload = make_payload([("r0", RunReader(folder, "x").read_all())], live=False)
    text = render_page(payload, ASSETS).removeprefix('<script type="application/json" id="payload">')
    return json.loads(text.removesuffix("</script>"))


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.sampled_from(["metrics", "events", "samples"]), TEXTS), VALUES)
def test_any_lines_and_documents(files: dict[str, list[str]], document: Any) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file, texts in files.items():
            (folder / f"{file}.jsonl").write_text("\n".join([*texts, ""]), encoding="utf-8", errors="replace")
        for file in ("config.resolved.yaml", "config.origins.json", "env.json", "FAILED.json"):
            (folder / file).write_text(json.dumps(document))
        (run,) = page_of(folder)["runs"]
    series, odd = run["series"], ("from", "to", "points", "skipped", "folders")
    curves = [values for key, values in series.items() if key not in odd]
    curves += [values for folder in series["folders"].values() for values in folder.values()]
    assert {len(values) for values in curves} == {len(series["step"])}


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=300))
def test_any_bytes(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as name:
        for file in (
            "metrics.jsonl",
            "events.jsonl",
            "samples.jsonl",
            "config.resolved.yaml",
            "env.json",
            "FAILED.json",
        ):
            (Path(name) / file).write_bytes(data)
        page_of(Path(name))


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=60))
def test_any_yaml(text: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "config.resolved.yaml").write_text(text, encoding="utf-8", errors="replace")
        page_of(Path(name))


def test_yaml_that_json_has_not(tmp_path: Path) -> None:
    texts = {"a: 2026-11-21": "2026-11-21", "a: [2026-11-21]": None, "a: 2026-13-45": None, "1: {2: 3}": "3"}
    for text, value in texts.items():
        (tmp_path / "config.resolved.yaml").write_text(text)
        rows = page_of(tmp_path)["runs"][0]["config"]
        assert value is None or [row["value"] for row in rows] == [value]


def test_a_run_is_read_while_it_is_written(tmp_path: Path) -> None:
    """Two thousand lines from another thread, some in two halves: none is lost or read twice."""
    run_folder(tmp_path, [])

    def train() -> None:
        writer = JsonlWriter(tmp_path / "metrics.jsonl")
        for step in range(0, 2000, 2):
            writer.write(line(step))
            text = json.dumps(line(step + 1)) + "\n"
            for part in (text[:50], text[50:]):
                with (tmp_path / "metrics.jsonl").open("a") as file:
                    file.write(part)
        writer.close()

    thread = threading.Thread(target=train, daemon=True)
    thread.start()
    run, looks = RunReader(tmp_path, "x"), 0
    while thread.is_alive():
        run.advance()
        looks += 1
        assert run.columns.step.tolist() == list(range(run.columns.n))
    thread.join(30)
    run.read_all()
    assert (run.columns.n, run.columns.bad) == (2000, 0)
    assert looks > 1
