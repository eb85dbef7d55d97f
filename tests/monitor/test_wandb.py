"""What wandb's own reader finds in the offline file."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import wandb

from internlm_lite.config.schema import Config
from internlm_lite.monitor.record import Sample
from internlm_lite.monitor.scalars import step_scalars
from internlm_lite.monitor.wandb import Wandb, restricted_settings
from tests.monitor.test_line import SEED
from tests.monitor.test_sinks import VALID
from tests.train.runs import tiny

HOOK = "https://chat.example/hush"
SETTINGS: dict[str, Any] = {"project": "p", "name": "n", "group": "g", "tags": ["t"]}
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def config() -> Config:
    return tiny(None, monitor={"wandb": SETTINGS, "alerts": {"webhook": HOOK, "format": "slack"}})


def write(folder: Path, steps: slice) -> None:
    whole = config()
    assert whole.monitor.wandb is not None
    sink = Wandb(folder, whole, whole.monitor.wandb)
    for record in SEED[steps]:
        sink.step(record)
    sink.validation(VALID)
    sink.sample(Sample(6, "def", " f(x):"))
    sink.event("done", {})
    sink.close()


def inspect(file: Path, *options: str) -> Any:
    """The output of `wandb leet inspect`: wandb's own reader of its file."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", *options, str(file)]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder: three lines, a stop, and three more of the same run."""
    folder = tmp_path_factory.mktemp("run")
    handlers = [signal.getsignal(number) for number in SIGNALS]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_DATA_DIR", str(tmp_path_factory.mktemp("data")))  # tables are staged there
        write(folder, slice(0, 3))
        write(folder, slice(3, 6))
    assert [signal.getsignal(number) for number in SIGNALS] == handlers
    return folder


@pytest.fixture(scope="module")
def records(written: Path) -> list[list[dict[str, Any]]]:
    """All records of each of the two files."""
    files = sorted(written.glob("wandb/offline-run-*/*.wandb"), key=lambda file: file.stat().st_mtime_ns)
    return [[json.loads(line) for line in inspect(file).splitlines()] for file in files]


def history(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [record["history"]["item"] for record in records if record["type"] == "history"]


def test_the_series_of_every_folder(records: list[list[dict[str, Any]]]) -> None:
    rows = [row for file in records for row in history(file) if "train/loss" in row]
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4, 5]
    for row, record in zip(rows, SEED, strict=True):
        expected = step_scalars(record)
        assert {name: row.get(name) for name in expected} == pytest.approx(expected)
        assert row["loss/.git"] == record.folders[".git"].loss
        assert row["perplexity/.git"] == pytest.approx(math.exp(record.folders[".git"].loss))


def test_one_run_one_axis(written: Path, records: list[list[dict[str, Any]]]) -> None:
    ids = {record["run"]["run_id"] for file in records for record in file if record["type"] == "run"}
    assert ids == {(written / "wandb-id").read_text().strip()} and len(records) == 2
    for file in records:
        metrics = [record["metric"] for record in file if record["type"] == "metric"]
        assert any(m.get("glob_name") == "*" and m["step_metric"] == "step" for m in metrics)


def test_validation_samples_and_summary(written: Path, records: list[list[dict[str, Any]]]) -> None:
    rows = history(records[1])
    assert [row["val_loss/.git"] for row in rows if "valid/loss" in row] == [VALID.folders[".git"].loss]
    (table,) = [row["samples.path"] for row in rows if "samples.path" in row]
    file = next(written.glob(f"wandb/offline-run-*/files/{table}"))
    assert json.loads(file.read_text()) == {"columns": ["step", "prompt", "text"], "data": [[6, "def", " f(x):"]]}
    last = max(written.glob("wandb/offline-run-*/*.wandb"), key=lambda file: file.stat().st_mtime_ns)
    shown = json.loads(inspect(last, "--summary"))
    assert (shown["project"], shown["name"], shown["tags"], shown["state"]) == ("p", "n", ["t"], "finished")
    assert shown["summary"]["ended"] == "done" and shown["summary"]["step"] == 5
    losses = [record.loss for record in SEED[3:]]
    assert shown["summary"]["train/loss"] == {"last": losses[-1], "min": min(losses)}


def test_the_config_is_there_and_the_secret_is_not(written: Path, records: list[list[dict[str, Any]]]) -> None:
    (update,) = [record["run"]["config"]["update"] for record in records[0] if record["type"] == "run"]
    assert update["adam"]["lr"] == 1e-2 and update["monitor"]["alerts"]["webhook"] == "***"
    files = [file for file in written.rglob("*") if file.is_file()]
    assert files and all(b"hush" not in file.read_bytes() for file in files)


def test_a_click_on_stop_does_not_stop_the_run(caplog: pytest.LogCaptureFixture) -> None:
    stop = restricted_settings().stop_fn
    assert stop is not None
    stop()
    assert "wandb asks to stop the run, which goes on" in caplog.text


def test_online_without_a_login_writes_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(wandb, "login", lambda prompt: False)
    whole = tiny(None, monitor={"wandb": {"mode": "online"}})
    assert whole.monitor.wandb is not None
    Wandb(tmp_path, whole, whole.monitor.wandb).close()
    assert "found no login, so it writes offline" in caplog.text
    assert list(tmp_path.glob("wandb/offline-run-*"))


def test_offline_looks_nothing_up(tmp_path: Path) -> None:
    """No name is resolved and no connection made outside this machine, up to the end of the process."""
    code = (
        "import socket, sys\n"
        "from pathlib import Path\n"
        "from internlm_lite.monitor.wandb import Wandb\n"
        "from tests.train.runs import tiny\n"
        "def refuse(*args, **kwargs):\n"
        "    print('LOOKED UP', args[:2], flush=True)\n"
        "    raise OSError('no network')\n"
        "socket.getaddrinfo = refuse\n"
        "config = tiny(None, monitor={'wandb': {}})\n"
        "sink = Wandb(Path(sys.argv[1]), config, config.monitor.wandb)\n"
        "sink._run.log({'step': 0})\n"
        "sink.close()\n"
    )
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", code, str(tmp_path)]
    found = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True, timeout=120)
    assert found.stdout + found.stderr == ""
