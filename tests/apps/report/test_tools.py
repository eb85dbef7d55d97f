"""tools/report.py and tools/dashboard.py as a user runs them."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from internlm_lite.apps.report import figure, payload
from internlm_lite.apps.report.run import RunReader
from internlm_lite.cli import dashboard, write_report
from tests.apps.report.small import event, line, run_folder, write

ROOT = Path(__file__).parents[3]
SEED = ROOT / "tests" / "monitor" / "data" / "seed.log"


def run(tool, capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    code = tool.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return code, captured.out + captured.err


def payload_in(page: Path) -> dict:
    data = re.search(r'id="payload">(.*?)</script>', page.read_text("utf-8"), re.DOTALL)
    assert data is not None
    return json.loads(data[1])


def png_size(path: Path) -> tuple[int, int]:
    head = path.read_bytes()[:24]
    assert head.startswith(b"\x89PNG")
    width, height = struct.unpack(">II", head[16:])
    return width, height


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if matplotlib were not installed."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(write_report, "can_draw", lambda: False)


def test_a_run_gets_its_report(tmp_path: Path, capsys: pytest.CaptureFixture[str], plain: None) -> None:
    folder = run_folder(tmp_path / "job" / "run", [line(0), line(1)])
    (tmp_path / "job" / "latest").symlink_to("run")
    code, output = run(write_report, capsys, tmp_path / "job" / "latest")
    assert (code, output) == (0, f"wrote {folder / 'report.html'}\n")
    (found,) = payload_in(folder / "report.html")["runs"]
    assert (found["name"], found["series"]["step"]) == ("job/run", [0, 1])


def test_several_runs_are_overlaid_here(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], plain: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seconds, name in enumerate("ab"):
        run_folder(tmp_path / "job" / name, [line(seconds)])
    monkeypatch.chdir(tmp_path)
    assert run(write_report, capsys, "job")[0] == 0
    assert [found["name"] for found in payload_in(tmp_path / "report.html")["runs"]] == ["job/b", "job/a"]
    assert write_report.places(write_report.parse_arguments(["job"]), [None, None]) == (
        Path("report.html"),
        Path("loss.png"),
    )
    assert run(write_report, capsys, "job/a", "--from-log", SEED, "-o", "x.html")[0] == 0
    assert [found["name"] for found in payload_in(tmp_path / "x.html")["runs"]] == ["job/a", "seed.log"]


def test_the_seeds_log_becomes_a_page_beside_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], plain: None
) -> None:
    log = tmp_path / "seed.log"
    log.write_text("other\n" + SEED.read_text())
    code, output = run(write_report, capsys, "--from-log", log)
    assert (code, output.splitlines()[0]) == (0, f"{log}: 6 steps; 1 other lines skipped")
    (found,) = payload_in(tmp_path / "seed.html")["runs"]
    losses = found["series"]["folders"][".git"]["loss"]
    assert (len(losses), losses[0], losses[-1]) == (6, 11.5552, 7.0646)


def test_a_folder_whose_name_is_no_text(tmp_path: Path, capsys: pytest.CaptureFixture[str], plain: None) -> None:
    folder = run_folder(Path(os.fsdecode(os.fsencode(tmp_path) + b"/job\xff")) / "run", [line(0)])
    code, output = run(write_report, capsys, folder)
    assert (code, output) == (0, f"wrote {tmp_path}/job\ufffd/run/report.html\n")
    assert payload_in(folder / "report.html")["runs"][0]["name"] == "job\ufffd/run"
    assert sorted(path.name for path in folder.iterdir()) == ["events.jsonl", "metrics.jsonl", "report.html"]


def test_a_run_that_cannot_be_shown_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], plain: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = [run_folder(tmp_path / name, [line(0)]) for name in "ab"]
    original = payload.run_payload

    def fail(identity: str, reader: RunReader, *rest: Any) -> Any:
        if reader.name.endswith("/b") and reader.columns.n:
            raise OverflowError("too large")
        return original(identity, reader, *rest)

    monkeypatch.setattr(payload, "run_payload", fail)
    told = f"{folders[1]} cannot be shown: OverflowError: too large\n"
    code, output = run(write_report, capsys, *folders, "-o", tmp_path / "ab.html")
    assert (code, output) == (0, f"wrote {tmp_path / 'ab.html'}\n{told}")
    code, output = run(write_report, capsys, folders[1])
    assert (code, output) == (2, f"{told}ConfigError: nothing to show; repair or remove the file that is damaged\n")


def test_of_many_runs_it_says_which_are_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str], plain: None) -> None:
    for number in range(10):
        run_folder(tmp_path / f"run-{number}", [])
    _, output = run(write_report, capsys, tmp_path, "-o", tmp_path / "x.html")
    assert output.splitlines()[0] == f"{tmp_path}: the last active 8 of 10 runs; name others to see them"


def test_a_token_is_no_path_and_may_stand_in_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run_folder(tmp_path / "run", [])
    code, output = run(dashboard, capsys, folder, "--token", folder)
    assert (code, output) == (
        2,
        f"ConfigError: --token {folder} is a file or folder; put runs first, or use --token-file\n",
    )
    file = tmp_path / "token"
    file.write_text("long enough\n")
    arguments = dashboard.parse_arguments([str(folder), "--token-file", str(file)])
    assert dashboard.read_token(arguments) == "long enough"
    assert len(str(dashboard.read_token(dashboard.parse_arguments([str(folder), "--token"])))) > 20
    assert dashboard.read_token(dashboard.parse_arguments([str(folder)])) is None
    code, output = run(dashboard, capsys, folder, "--token-file", tmp_path / "gone")
    assert (code, output) == (
        2,
        f"ConfigError: cannot read --token-file {tmp_path / 'gone'}: No such file or directory\n",
    )


def test_the_figure_is_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["$x_{", "</b>", "数据", "code"]
    lines = [line(step, folders={name: [1, 2.0, 0.5] for name in names}) for step in range(40)]
    for name in "ab":
        run_folder(tmp_path / name, lines)
    code, _ = run(write_report, capsys, tmp_path / "a", tmp_path / "b", "-o", tmp_path / "ab.html", "--png")
    assert code == 0
    width, height = png_size(tmp_path / "ab.png")
    assert width > height > 300
    run_folder(tmp_path / "empty", [])
    assert run(write_report, capsys, tmp_path / "empty", "--png")[0] == 0
    assert (tmp_path / "empty" / "loss.png").exists()


def test_the_figure_over_epochs_has_the_tokens_above(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Points of evaluations, also of the one before the first step, and perplexities."""
    lines = [line(step, num_consumed_tokens=100 * (step + 1), perplexity=7.0) for step in range(40)]
    checks = [
        {"time": lines[0]["time"], "seg": 0, "event": "evaluation", "step": step, "loss": loss, "acc": 0, **more}
        for step, loss, more in [(-1, 2.0, {"train_loss": 3.0}), (19, 1.0, {"folders": {"a": [1, 4.0, 0]}})]
    ]
    start = {"time": lines[0]["time"], "seg": 0, "event": "start", "step": 0, "folder_tokens": {"a": 1500, "b": 500}}
    folder = run_folder(tmp_path / "run", lines, [start, *checks])
    assert run(write_report, capsys, folder, "--png", "--over", "epoch")[0] == 0
    (drawn,) = payload.make_payload([("r0", RunReader(folder, "run").read_all())], live=False)["runs"]
    assert drawn["epoch_tokens"] == 2000
    made = figure._figure([drawn], "epoch")
    loss, ppl = made.axes[:2]
    curves = {line.get_linestyle(): line.get_xydata().tolist() for line in loss.get_lines()}
    assert curves["-."] == [[0.0, 2.0], [1.0, 1.0]] and curves[":"] == [[0.0, 3.0]]
    assert curves["-"][-1][0] == 2.0
    ((_, first), (_, second)) = next(li for li in ppl.get_lines() if li.get_linestyle() == "-.").get_xydata()
    assert (first, second) == pytest.approx((math.exp(2), math.e))
    assert loss.child_axes[0].get_xlabel() == "tokens"
    assert loss.child_axes[0]._functions[0](2.0) == 4000
    run_folder(tmp_path / "old", lines)
    code, output = run(write_report, capsys, tmp_path / "old", "--png", "--over", "epoch")
    assert code == 2 and "does not say how many tokens its data have; take --over tokens" in output


def test_smoothing_begins_at_the_first_value() -> None:
    assert figure.smoothed([4.0, 4.0, 4.0]) == pytest.approx([4.0, 4.0, 4.0])
    assert figure.smoothed([]) == []


def test_the_figure_without_matplotlib_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], plain: None
) -> None:
    folder = run_folder(tmp_path, [line(0)])
    code, output = run(write_report, capsys, folder, "--png")
    assert code == 2
    assert output.splitlines()[-1] == (
        "MissingPackageError: loss.png needs matplotlib: pip install internlm_lite[report]"
    )


def test_bad_input_is_one_line_and_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "words.log").write_text("nothing\n")
    for tool, arguments in [
        (write_report, [tmp_path / "gone"]),
        (write_report, [tmp_path / "empty"]),
        (write_report, ["--from-log", tmp_path / "words.log"]),
        (write_report, ["--from-log", tmp_path / "empty"]),
        (dashboard, [tmp_path / "gone"]),
        (dashboard, [tmp_path / "empty"]),
        (dashboard, [run_folder(tmp_path / "run", []), "--bind", "0.0.0.0"]),
        (dashboard, [tmp_path / "run", "--bind", "nowhere.invalid", "--token", "long enough"]),
        (dashboard, [tmp_path / "run", "--token", "short"]),
    ]:
        code, output = run(tool, capsys, *arguments)
        assert code == 2
        assert len(output.splitlines()) == 1
        assert output.startswith("ConfigError: ")
    for tool, arguments in [(write_report, []), (dashboard, []), (dashboard, ["x", "--port", "70000"])]:
        with pytest.raises(SystemExit, match="2"):
            tool.main(arguments)


def test_a_report_that_cannot_be_written_is_code_6(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, output = run(write_report, capsys, run_folder(tmp_path, [line(0)]), "-o", tmp_path / "gone" / "x.html")
    assert (code, len(output.splitlines())) == (6, 1)


def test_a_dashboard_from_start_to_ctrl_c(tmp_path: Path) -> None:
    """Its one line has the address; it shows what is appended; Ctrl-C ends it with 0."""
    folder = run_folder(tmp_path / "run", [line(0)], [event("start", 0, step=0)])
    command = [sys.executable, str(ROOT / "tools" / "dashboard.py"), str(folder), "--port", "0"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=tmp_path,
        # As in a terminal: what a shell starts in the background, such as these tests, is deaf to Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    timer = threading.Timer(60, process.kill)
    timer.start()
    try:
        assert process.stdout is not None
        first = process.stdout.readline()
        address = re.fullmatch(r"dashboard: (http://127\.0\.0\.1:\d+/)  \(Ctrl-C ends it\)\n", first)
        assert address is not None, first
        write(folder / "metrics.jsonl", [line(1)], "a")
        steps: list[int] = []
        while steps != [0, 1]:
            with urllib.request.urlopen(f"{address[1]}api/runs", timeout=60) as reply:
                steps = json.load(reply)["runs"][0]["series"]["step"]
        os.kill(process.pid, signal.SIGINT)
        rest, _ = process.communicate(timeout=60)
        assert (process.returncode, rest.strip()) == (0, "")
    finally:
        timer.cancel()
        process.kill()
        process.wait(10)


def test_a_port_in_use_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run_folder(tmp_path, [line(0)])
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, output = run(dashboard, capsys, folder, "--port", port)
    assert code == 2
    assert output == (
        f"ConfigError: cannot listen on 127.0.0.1 port {port}: Address already in use; "
        "choose another --port (0: any free one)\n"
    )


def test_a_terminal_obeys_no_name_of_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run_folder(tmp_path / "job\x1b[31m" / "run\x07\n\u202e", [line(0)])
    (folder / "FAILED.json").mkdir()
    for arguments in ([folder], [tmp_path / "no\x1b[2J"], ["--from-log", folder / "metrics.jsonl"]):
        text = run(write_report, capsys, *arguments)[1]
        assert text and text.replace("\n", "").isprintable()
