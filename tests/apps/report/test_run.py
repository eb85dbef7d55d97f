"""Run folders read while they grow, and found under the paths that people give."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from internlm_lite.apps.report import tail
from internlm_lite.apps.report.discover import MAX_RUNS, find_runs, omitted_runs, require_runs, run_name
from internlm_lite.apps.report.run import RunReader
from internlm_lite.errors import ConfigError
from internlm_lite.monitor.jsonl import EventsFile, JsonlWriter
from tests.apps.report.small import event, line, run_folder, write


def test_a_run_is_read_as_it_grows(tmp_path: Path) -> None:
    run_folder(tmp_path, [line(0)], [event("start", 0)])
    run = RunReader(tmp_path, "x").read_all()
    assert (run.columns.n, len(run.events), run.parsed) == (1, 1, True)
    version = run.version
    assert not run.advance()
    assert run.version == version
    write(tmp_path / "metrics.jsonl", [line(1)], "a")
    write(tmp_path / "samples.jsonl", [{"step": 1, "prompt": "a", "text": "b"}])
    assert run.read_all().version > version
    assert (run.columns.n, len(run.samples)) == (2, 1)


def test_what_training_writes_after_a_crash_is_read(tmp_path: Path) -> None:
    """A torn line is closed by the next writer, and counted."""
    (tmp_path / "events.jsonl").write_text('{"time": "2026-11-21T10:00:00+00:00", "ev')
    run = RunReader(tmp_path, "x").read_all()
    assert (run.events, run.bad_lines) == ([], 0)
    EventsFile(tmp_path / "events.jsonl", 1).event("start", {"step": 3})
    run.read_all()
    assert [event["event"] for event in run.events] == ["start"]
    assert run.bad_lines == 1


def test_files_written_anew_are_read_anew(tmp_path: Path) -> None:
    run_folder(tmp_path, [line(step) for step in range(5)], [event("start", 0), event("done", 9)])
    run = RunReader(tmp_path, "x").read_all()
    run_folder(tmp_path, [line(0)], [event("start", 0)])
    run.read_all()
    assert (run.columns.n, len(run.events)) == (1, 1)
    (tmp_path / "metrics.jsonl").unlink()
    assert run.read_all().columns.n == 0


def test_step_lines_wait_for_the_starts_in_a_long_file_of_events(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The third start goes on beyond the steps that the first meant to do; the second had no line."""
    starts = [event("start", 0, 0, step=0, total_steps=2), event("start", 1, 1, step=1, total_steps=2)]
    starts.append(event("start", 2, 2, step=2, total_steps=4))
    filler = event("alarm", 0, why="x" * 300)
    run_folder(tmp_path, [line(0), line(1), line(2, 2), line(3, 2)], [part for one in starts for part in (one, filler)])
    monkeypatch.setattr(tail, "CHUNK_BYTES", 1000)
    run = RunReader(tmp_path, "x").read_all()
    assert (run.columns.step.tolist(), run.columns.bad, len(run.events)) == ([0, 2, 3], 0, 6)


def test_events_that_are_none_are_counted(tmp_path: Path) -> None:
    lines = ["[]", '{"event": "x"}', '{"time": "t"}', '{"time": "t", "event": "done", "seg": "x", "loss": NaN}', ""]
    (tmp_path / "events.jsonl").write_text("\n".join(lines) + "\n")
    run = RunReader(tmp_path, "x").read_all()
    assert run.events == [{"time": "t", "event": "done", "seg": 0, "loss": None}]
    assert run.bad_lines == 3


def test_config_with_origins_and_without(tmp_path: Path) -> None:
    (tmp_path / "config.resolved.yaml").write_text("adam:\n  lr: 0.001\n  betas: [0.9, 0.95]\nseed: 1\nckpt: {}\n")
    run = RunReader(tmp_path, "x").read_all()
    assert [(row["key"], row["value"], row["origin"]) for row in run.config] == [
        ("adam.lr", "0.001", None),
        ("adam.betas", "[0.9, 0.95]", None),
        ("seed", "1", None),
        ("ckpt", "{}", None),
    ]
    rows = [
        {"key": "adam", "value": {"lr": 0.001}, "origin": "a.py:1"},
        {"key": "adam.lr", "value": 0.001, "origin": "command line"},
        {"value": 1},
    ]
    (tmp_path / "config.origins.json").write_text(json.dumps(rows))
    assert run.read_all().config == [{"key": "adam.lr", "value": "0.001", "origin": "command line"}]


@pytest.mark.parametrize("text", ["", "{", "[1", "a: [", "7", "null", "\x00"])
def test_documents_that_are_broken_say_nothing(tmp_path: Path, text: str) -> None:
    for name in ("config.resolved.yaml", "config.origins.json", "env.json", "FAILED.json"):
        (tmp_path / name).write_text(text)
    run = RunReader(tmp_path, "x").read_all()
    assert run.environment == {}
    assert run.failed is not None and list(run.failed) == ["modified"]
    (tmp_path / "FAILED.json").unlink()
    assert run.read_all().failed is None


def test_a_file_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(ConfigError, match=r"cannot read .*metrics.jsonl: Is a directory"):
        RunReader(tmp_path, "x").read_all()


@pytest.mark.parametrize("name", ["metrics.jsonl", "events.jsonl", "FAILED.json"])
def test_what_is_no_file_holds_nothing_up_and_loses_nothing(tmp_path: Path, name: str) -> None:
    """A pipe that never says anything, a device that never ends."""
    run_folder(tmp_path, [line(0)], [event("start", 0, step=0)])
    kept, odd = tmp_path / "kept", tmp_path / name
    if odd.exists():
        odd.rename(kept)
    for make in (os.mkfifo, lambda path: path.symlink_to("/dev/zero")):
        make(odd)
        run = RunReader(tmp_path, "x")
        with pytest.raises(ConfigError, match=rf"cannot read .*{name}: not a regular file"):
            run.read_all()
        odd.unlink()
    if kept.exists():
        kept.rename(odd)
    run.read_all()
    assert (run.columns.n, len(run.events), run.parsed) == (1, 1, True)


def test_a_segment_that_only_an_event_tells_of_is_no_damage(tmp_path: Path) -> None:
    """A start that failed before its first line, and one whose own event is not written yet."""
    events = [event("start", 0, step=0), event("failed", 3, 1)]
    run_folder(tmp_path, [line(0), line(1), line(1, 2), line(2, 7), line(2, 2)], events)
    run = RunReader(tmp_path, "x").read_all()
    assert (run.columns.step.tolist(), run.columns.bad) == ([0, 1, 2], 1)


def test_a_small_file_that_is_huge_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "env.json").touch()
    os.truncate(tmp_path / "env.json", 1 << 40)
    with pytest.raises(ConfigError, match=r"cannot read .*env.json: more than 16 MiB"):
        RunReader(tmp_path, "x").read_all()


def test_lines_written_anew_begin_where_the_events_say(tmp_path: Path) -> None:
    run_folder(tmp_path, [line(step) for step in range(5)], [event("start", 0, step=0), event("start", 9, 1, step=2)])
    run = RunReader(tmp_path, "x").read_all()
    assert run.columns.step.tolist() == [0, 1]
    write(tmp_path / "metrics.jsonl", [line(0), line(3)])
    assert run.read_all().columns.step.tolist() == [0]


def wrote(folder: Path, seconds: float) -> None:
    """Set when a run last wrote."""
    for file in folder.iterdir():
        os.utime(file, (seconds, seconds))


def test_runs_of_a_job_as_last_active_and_of_all_jobs(tmp_path: Path) -> None:
    old, new = tmp_path / "job" / "2026-11-20_10-00-00", tmp_path / "job" / "2026-11-21_10-00-00"
    other = tmp_path / "other" / "2026-11-20_12-00-00"
    for seconds, folder in enumerate((old, new, other)):
        run_folder(folder, [line(0)])
        wrote(folder, seconds)
    (tmp_path / "job" / "latest").symlink_to(new.name)
    (tmp_path / "job" / "notes").mkdir()
    assert find_runs([tmp_path / "job"]) == [new, old]
    assert find_runs([tmp_path]) == [other, new, old]
    wrote(old, 9)
    (other / "metrics.jsonl").write_bytes(b"")  # active, but without a step
    assert find_runs([tmp_path]) == [old, new, other]
    wrote(old, 0)
    assert find_runs([tmp_path / "job" / "latest"]) == [new]
    assert find_runs([old, tmp_path / "job", old]) == [old, new]
    assert run_name(tmp_path / "job" / "latest") == "job/2026-11-21_10-00-00"


def test_links_to_runs_are_runs_each_once(tmp_path: Path) -> None:
    runs = [run_folder(tmp_path / job / "t", []) for job in ("a", "b")]
    (tmp_path / "both").mkdir()
    for name, folder in zip("xyz", [*runs, runs[0]], strict=True):
        (tmp_path / "both" / name).symlink_to(folder)
    assert sorted(find_runs([tmp_path / "both"])) == sorted(runs)


def test_only_the_last_active_runs_of_a_job_are_taken(tmp_path: Path) -> None:
    folders = [run_folder(tmp_path / f"{number:02d}", []) for number in range(MAX_RUNS + 3)]
    for folder in folders:
        wrote(folder, 1)  # then by name
    assert find_runs([tmp_path]) == folders[: -MAX_RUNS - 1 : -1]
    assert omitted_runs([tmp_path, folders[0]]) == [
        f"{tmp_path}: the last active {MAX_RUNS} of {MAX_RUNS + 3} runs; name others to see them"
    ]


def test_a_path_without_runs_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"found no run in .*; expected a run folder RUN/JOB/TIME"):
        require_runs([tmp_path])
    with pytest.raises(ConfigError, match=r"cannot read .*gone: No such file or directory"):
        require_runs([tmp_path / "gone"])
    JsonlWriter(tmp_path / "file").write({})
    with pytest.raises(ConfigError, match=r"cannot read .*file: Not a directory"):
        require_runs([tmp_path / "file"])


@pytest.mark.parametrize("name", ["metrics.jsonl", "events.jsonl", "config.resolved.yaml"])
def test_what_makes_a_folder_a_run(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    assert find_runs([tmp_path]) == [Path(os.path.realpath(tmp_path))]
