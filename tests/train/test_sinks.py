"""Sinks of a real run: what TensorBoard and wandb hold is metrics.jsonl, and no sink stops or bends training."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from internlm_lite.config.schema import Config
from internlm_lite.faults.signals import StopSignals
from internlm_lite.mesh.mesh import single_process_mesh
from internlm_lite.monitor import packages
from internlm_lite.monitor.alert_monitor import AlertMonitor
from internlm_lite.monitor.console import Console
from internlm_lite.monitor.jsonl import read_objects
from internlm_lite.monitor.record import Sink, StepRecord
from internlm_lite.monitor.tensorboard import TensorBoard
from internlm_lite.runtime.dist_env import set_mlflow_defaults
from internlm_lite.train.build import RunServices, build_run
from internlm_lite.train.loop import train
from tests.corpus import FOLDERS, write_corpus
from tests.monitor.test_wandb import history, inspect
from tests.train.runs import STEPS, curve, run_training, tiny

NO_TOKENS = (0, None, 0.0)
"""Tokens, loss and accuracy of a folder that a line does not name."""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("sinks") / "corpus")


def config_for(corpus: Path, saves: Path | None = None, total_steps: int = STEPS, **monitor: Any) -> Config:
    ckpt = {} if saves is None else {"enable_save_ckpt": True, "save_ckpt_folder": f"local:{saves}"}
    return tiny(
        corpus,
        ckpt={**ckpt, "allow_changed_data": True, "async_upload": False},
        data={"total_steps": total_steps, "valid_every": 4, "valid_folder": str(corpus)},
        monitor=monitor,
    )


@pytest.fixture(scope="module")
def run(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """A run of five steps that goes on to eight in the same folder; everything is written."""
    folder = tmp_path_factory.mktemp("run")
    set_mlflow_defaults(os.environ)
    for total_steps in (5, STEPS):
        metrics = run_training(
            single_process_mesh(),
            config_for(corpus, folder / "saves", total_steps, wandb={}, mlflow={}),
            folder / "run",
        )
    return folder / "run", metrics


def test_tensorboard_holds_metrics_jsonl(run: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, metrics = run
    found = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    for name in FOLDERS:
        for index, figure in enumerate(("tokens", "loss", "acc")):
            series = [(event.step, event.value) for event in found.Scalars(f"{figure}/{name}")]
            lines = [line for line in metrics if index == 0 or name in line["folders"]]
            figures = [(line["step"], line["folders"].get(name, NO_TOKENS)[index]) for line in lines]
            assert series == [(step, pytest.approx(value)) for step, value in figures]
    assert [event.value for event in found.Scalars("train/loss")] == pytest.approx([line["loss"] for line in metrics])


def test_wandb_holds_metrics_jsonl(run: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, metrics = run
    files = sorted(folder.glob("wandb/offline-run-*/*.wandb"), key=lambda file: file.stat().st_mtime_ns)
    assert len({file.name for file in files}) == 1 and len(files) == 2
    rows = [row for file in files for row in history([json.loads(text) for text in inspect(file).splitlines()])]
    lines = [row for row in rows if "train/loss" in row]
    assert [row["step"] for row in lines] == [line["step"] for line in metrics] == list(range(STEPS))
    for row, line in zip(lines, metrics, strict=True):
        assert row["train/loss"] == line["loss"]
        for name in FOLDERS:
            tokens, loss, acc = line["folders"].get(name, NO_TOKENS)
            assert [row[f"tokens/{name}"], row.get(f"loss/{name}")] == [tokens, loss]
            assert row.get(f"acc/{name}") == (acc if tokens else None)
    evaluations = [event for event in read_objects(folder / "events.jsonl") if event["event"] == "evaluation"]
    shown = [(row["step"], row["val_loss/code"]) for row in rows if "valid/loss" in row]
    assert shown == [(event["step"], event["folders"]["code"][1]) for event in evaluations] and shown


def test_mlflow_holds_metrics_jsonl(run: tuple[Path, list[dict[str, Any]]]) -> None:
    set_mlflow_defaults(os.environ)
    mlflow = pytest.importorskip("mlflow", reason="needs mlflow: pip install internlm_lite[mlflow]")
    folder, metrics = run
    client = mlflow.MlflowClient(str(folder / "mlruns"))
    kept = client.get_run((folder / "mlflow-id").read_text().strip())
    assert kept.info.status == "FINISHED"
    assert kept.data.tags["changed.data.total_steps"] == str(STEPS) and kept.data.params["data.total_steps"] == "5"
    for key, figure in (("train/loss", "loss"), ("lr", "lr")):
        found = sorted((point.step, point.value) for point in client.get_metric_history(kept.info.run_id, key))
        assert found == [(line["step"], line[figure]) for line in metrics]


class OwnSink(Sink):
    """Notes what it is given."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.seen = folder, list[object]()

    def step(self, record: StepRecord) -> None:
        self.seen.append(record.step)

    def event(self, kind: str, facts: Mapping[str, Any]) -> None:
        self.seen.append(kind)

    def close(self) -> None:
        self.seen.append(f"closed after {len(list(read_objects(self.folder / 'events.jsonl')))} events")


def test_an_own_sink_gets_every_record_and_is_closed_last(tmp_path: Path) -> None:
    made: list[OwnSink] = []

    def own_sink(folder: Path, config: Config) -> Sink | None:
        made.append(OwnSink(folder))
        return made[-1] if config.data.total_steps == STEPS else None

    services = RunServices(sinks={"own": own_sink})
    run = build_run(tiny(None), single_process_mesh(), tmp_path, services=services)
    train(run, StopSignals())
    run.reporter.close()
    (sink,) = made
    assert sink.seen == ["start", *range(STEPS), "done", "closed after 2 events"]
    build_run(
        tiny(None, data={"total_steps": 2}), single_process_mesh(), tmp_path / "none", services=services
    ).reporter.close()
    assert not made[1].seen, "the factory may decline"


def broken(*args: Any, **kwargs: Any) -> None:
    raise OSError(28, "No space left on device")


def test_failing_sinks_change_nothing(
    corpus: Path,
    run: tuple[Path, list[dict[str, Any]]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(TensorBoard, "validation", broken)
    monkeypatch.setattr("wandb.init", broken)
    monkeypatch.setattr(Console, "step", broken)
    monkeypatch.setattr(AlertMonitor, "step", broken)
    metrics = run_training(single_process_mesh(), config_for(corpus, wandb={}), tmp_path / "run")
    assert curve(metrics) == curve(run[1])
    failed = [event for event in read_objects(tmp_path / "run" / "events.jsonl") if event["event"] == "sink_failed"]
    assert {event["sink"] for event in failed} == {"TensorBoard", "wandb", "the console", "alerts"}
    assert {event["why"] for event in failed} == {"OSError: [Errno 28] No space left on device"}
    told = [record for record in caplog.records if "switched off" in record.getMessage()]
    assert len(told) == len(failed) == 4


def test_a_package_that_is_absent_and_not_asked_for(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packages, "is_installed", lambda name: False)
    run_training(single_process_mesh(), config_for(corpus, total_steps=2), tmp_path / "run")
    assert not (tmp_path / "run" / "tensorboard").exists()
