"""What MLflow's own client finds in its store."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from internlm_lite.config.schema import Config
from internlm_lite.monitor.record import Sink
from internlm_lite.monitor.scalars import step_scalars, validation_scalars
from internlm_lite.monitor.sinks import FanOut
from internlm_lite.runtime.dist_env import set_mlflow_defaults
from tests.monitor.test_line import SEED
from tests.monitor.test_sinks import VALID
from tests.ports import free_port
from tests.train.runs import tiny

set_mlflow_defaults(os.environ)
mlflow = pytest.importorskip("mlflow", reason="needs mlflow: pip install internlm_lite[mlflow]")
from internlm_lite.monitor import mlflow as sinks  # noqa: E402

HOOK = "https://chat.example/hush"
LONG = [f"prompt {number} of many" for number in range(900)]


def config(**more: Any) -> Config:
    monitor = {"mlflow": {"tags": {"team": "t"}}, "alerts": {"webhook": HOOK, "format": "slack"}}
    return tiny(None, monitor={**monitor, "sample_prompts": LONG}, **more)


def opened(folder: Path, whole: Config | None = None) -> Any:
    whole = whole or config()
    assert whole.monitor.mlflow is not None
    return sinks.Mlflow(folder, whole, whole.monitor.mlflow)


def stored(folder: Path) -> tuple[Any, Any]:
    """A client of the store in `folder`, and the one run there."""
    client = mlflow.MlflowClient(str(folder / "mlruns"))
    (experiment,) = client.search_experiments(filter_string="name = 'internlm_lite'")
    (run,) = client.search_runs([experiment.experiment_id])
    return client, run


def history(folder: Path, key: str) -> list[tuple[int, float]]:
    client, run = stored(folder)
    found = [(metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, key)]
    return sorted(found)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder: three lines, a stop, and three more of the same run, with another learning rate."""
    folder = tmp_path_factory.mktemp("run")
    sink = opened(folder)
    for record in SEED[:3]:
        sink.step(record)
    sink.event("stopped", {"step": 3})
    sink.close()
    assert stored(folder)[1].info.status == "KILLED"
    sink = opened(folder, config(adam={"lr": 0.02}))
    assert stored(folder)[1].info.status == "RUNNING"
    for record in SEED[3:]:
        sink.step(record)
    sink.validation(VALID)
    sink.event("tasks", {"step": 5, "tasks": {"cloze, 1": {"acc": 0.25}}})
    sink.event("done", {"step": 6})
    sink.close()
    return folder


def test_series_of_folders_and_evaluations(written: Path) -> None:
    for name in step_scalars(SEED[0]):
        expected = [(record.step, step_scalars(record)[name]) for record in SEED if name in step_scalars(record)]
        assert history(written, sinks.key_of(name)) == [(step, pytest.approx(value)) for step, value in expected]
    assert history(written, "loss/.git") == [(r.step, r.folders[".git"].loss) for r in SEED if r.folders[".git"].tokens]
    for name, value in validation_scalars(VALID).items():
        assert history(written, sinks.key_of(name)) == [(5, pytest.approx(value))]
    assert history(written, sinks.key_of("task/cloze, 1/acc")) == [(5, 0.25)]


def test_one_run_that_a_resume_goes_on_with(written: Path) -> None:
    """MLflow refuses another value of a param: a resume with a changed config must not fail on that."""
    _, run = stored(written)
    assert run.info.run_id == (written / "mlflow-id").read_text().strip()
    assert run.info.status == "FINISHED" and run.info.run_name == f"default/{written.name}"
    assert run.data.params["adam.lr"] == "0.01" and run.data.tags["changed.adam.lr"] == "0.02"
    assert [tag for tag in run.data.tags if tag.startswith("changed.")] == ["changed.adam.lr"]
    assert run.data.tags["team"] == "t"


def test_a_value_that_is_as_it_was_is_no_change(tmp_path: Path) -> None:
    for lr in (0.01, 0.02, 0.01):
        opened(tmp_path, config(adam={"lr": lr})).close()
    _, run = stored(tmp_path)
    assert run.data.params["adam.lr"] == "0.01" and "changed.adam.lr" not in run.data.tags


def test_params_are_cut_stable_and_without_secrets(written: Path) -> None:
    """Values longer than MLflow takes, memory addresses and passwords have no place in params."""
    params = stored(written)[1].data.params
    whole = sinks.params_of(config())
    assert len(whole["monitor.sample_prompts"]) > sinks.PARAM_LIMITS[0]
    assert params == {key: text[: sinks.PARAM_LIMITS[0]] for key, text in whole.items()}
    assert params["monitor.alerts.webhook"] == "***" and params["monitor.wandb"] == "null"
    assert not any(re.search(r" at 0x|<\w+ object", text) for text in params.values())
    files = [file for file in written.rglob("*") if file.is_file()]
    assert files and all(b"hush" not in file.read_bytes() for file in files)
    assert sinks.params_of(config()) == whole


def test_an_older_server_takes_shorter_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = mlflow.MlflowClient.log_batch

    def takes_250(self: Any, run_id: str, **more: Any) -> None:
        if any(len(param.value) > 250 for param in more.get("params", ())):
            raise mlflow.exceptions.MlflowException("Param value had length 6000", 1000)
        real(self, run_id, **more)

    monkeypatch.setattr(mlflow.MlflowClient, "log_batch", takes_250)
    for _ in range(2):
        opened(tmp_path).close()
    _, run = stored(tmp_path)
    assert len(run.data.params["monitor.sample_prompts"]) == 250
    assert not [tag for tag in run.data.tags if tag.startswith("changed.")]


@pytest.mark.parametrize(
    "name",
    [
        "loss/a+b",
        "loss/..",
        "loss/a//b",
        "loss/",
        "/loss",
        "../x",
        "loss/" + 300 * "x",
        "loss/" + 120 * "中",
        "loss/\udc80",
    ],
)
def test_names_that_mlflow_refuses_get_one_that_it_takes(name: str, written: Path) -> None:
    key, other = sinks.key_of(name), sinks.key_of(name + "?")
    assert key != name and key != other and sinks.key_of(key) == key
    client, run = stored(written)
    client.log_metric(run.info.run_id, key, 1.0)


@pytest.mark.parametrize("name", ["train/loss", "loss/.git", "val_loss/中文 数据", "grad_norm/0_default"])
def test_names_that_mlflow_takes_stay(name: str) -> None:
    assert sinks.key_of(name) == name


def test_a_run_that_is_not_there_begins_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "mlflow-id").write_text(32 * "0" + "\n")
    opened(tmp_path).close()
    assert "a new one begins" in caplog.text and stored(tmp_path)[1].info.run_id in (tmp_path / "mlflow-id").read_text()


def test_a_server_that_is_down_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing is raised, one warning without the password, and every figure arrives when it is back."""
    monkeypatch.setattr(sinks, "FIRST_PAUSE", 1e-6)
    monkeypatch.setattr(sinks, "SEND_SECONDS", 0.0)
    real, down = mlflow.MlflowClient.log_batch, [True]

    def log_batch(self: Any, run_id: str, **more: Any) -> None:
        if down[0] and "metrics" in more:
            raise mlflow.exceptions.MlflowException("API request to http://u:hush@h/x failed: refused")
        real(self, run_id, **more)

    monkeypatch.setattr(mlflow.MlflowClient, "log_batch", log_batch)
    sink = opened(tmp_path)
    for record in SEED[:5]:
        sink.step(record)
    down[0] = False
    sink.step(SEED[5])
    sink.close()
    assert [step for step, _ in history(tmp_path, "train/loss")] == [record.step for record in SEED]
    assert caplog.text.count("MLflow does not answer, training goes on") == 1 and "hush" not in caplog.text


def test_no_server_at_all(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The port refuses connections from the first call to the last; the other sinks see every record."""
    whole = tiny(None, monitor={"mlflow": {"tracking_uri": f"http://127.0.0.1:{free_port()}"}})
    seen: list[int] = []

    class Other(Sink):
        def step(self, record: Any) -> None:
            seen.append(record.step)

    fan_out = FanOut({}, {"MLflow": lambda: opened(tmp_path, whole), "other": Other})
    for record in SEED:
        fan_out.step(record)
    fan_out.close()
    assert seen == [record.step for record in SEED]
    assert caplog.text.count("MLflow does not answer") == 1 and "switched off" not in caplog.text


class _Refuses(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = json.dumps({"error_code": "PERMISSION_DENIED", "message": "not for you"}).encode()
        self.send_response(403)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""


def test_a_server_that_refuses_switches_the_sink_off(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with HTTPServer(("127.0.0.1", 0), _Refuses) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        whole = tiny(None, monitor={"mlflow": {"tracking_uri": f"http://127.0.0.1:{server.server_address[1]}"}})
        fan_out = FanOut({}, {"MLflow": lambda: opened(tmp_path, whole)})
        fan_out.step(SEED[0])
        fan_out.close()
        server.shutdown()
        thread.join(10)
    assert "MLflow failed and is switched off, training goes on" in caplog.text and "not for you" in caplog.text


def test_files_use_no_network(tmp_path: Path) -> None:
    """No name is resolved, up to the end of the process: no telemetry either."""
    code = (
        "import os, socket, sys\n"
        "from pathlib import Path\n"
        "from internlm_lite.runtime.dist_env import set_mlflow_defaults\n"
        "set_mlflow_defaults(os.environ)\n"
        "from internlm_lite.monitor.mlflow import Mlflow\n"
        "from tests.train.runs import tiny\n"
        "def refuse(*args, **kwargs):\n"
        "    print('LOOKED UP', args[:2], flush=True)\n"
        "    raise OSError('no network')\n"
        "socket.getaddrinfo = refuse\n"
        "config = tiny(None, monitor={'mlflow': {}})\n"
        "Mlflow(Path(sys.argv[1]), config, config.monitor.mlflow).close()\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    environ = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    found = subprocess.run(
        command, cwd=Path(__file__).parents[2], env=environ, capture_output=True, text=True, check=True, timeout=120
    )
    assert found.stdout + found.stderr == ""
    assert stored(tmp_path)[1].info.status == "KILLED"
