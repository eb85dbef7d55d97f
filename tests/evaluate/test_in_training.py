"""Tasks and bits per byte of a run: the training stays the same to the bit; the best is kept by any figure."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from internlm_lite.checkpoint.format.catalog import committed, inspect
from internlm_lite.checkpoint.storage.local import LocalStorage
from internlm_lite.config.schema import Config
from internlm_lite.data.tokenizer import Tokenizer
from internlm_lite.errors import ConfigError, MissingPackageError
from internlm_lite.evaluate import harness
from internlm_lite.evaluate.task_suite import TaskSuite
from internlm_lite.mesh.mesh import Mesh, single_process_mesh
from internlm_lite.monitor.jsonl import read_objects
from internlm_lite.train.build import RunServices, load_run
from tests.evaluate.local_tasks import write_tasks
from tests.evaluate.made_run import config_for, texts, write_data
from tests.train.runs import curve, run_training
from tests.world import run_world

CLOZE = ["cloze_word", "cloze_greedy", "cloze_sentence"]
LOCAL = ["local_choice", "local_rolling", "local_until"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_data(tmp_path_factory.mktemp("evaluated"))
    write_tasks(folder / "tasks")
    return folder


def tasks_of(folder: Path) -> list[tuple[int, dict[str, dict[str, float]]]]:
    """(step, scores) of all evaluations of tasks, alone or not."""
    events = [event for event in read_objects(folder / "events.jsonl") if "tasks" in event]
    return [(event["step"], event["tasks"]) for event in events]


def trained(mesh: Mesh, config: Config, folder: Path) -> Any:
    """The curve, and the next numbers of all global generators."""
    random.seed(3), np.random.seed(4), torch.manual_seed(5)
    metrics = run_training(mesh, config, folder)
    return curve(metrics), (random.random(), np.random.random(), float(torch.rand(())))


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_tasks_change_no_bit_of_training(dropout: float, data: Path, tmp_path: Path) -> None:
    """lm_eval seeds generators, and few-shot examples are drawn; dropout goes on after each evaluation."""
    mesh, model = single_process_mesh(), {"residual_dropout": dropout}
    plain = trained(mesh, config_for(data, model=model), tmp_path / "plain")
    asked = {
        "tasks": [*CLOZE, *LOCAL, "local_fewshot"],
        "include_path": str(data / "tasks"),
        "every": 1,
        "limit": 3,
        "weights": "both",
    }
    config = config_for(data, model=model, evaluation=asked, data={"valid_every": 2}, ema={"decay": 0.5})
    assert trained(mesh, config, tmp_path / "asked") == plain
    found = tasks_of(tmp_path / "asked")
    assert [step for step, _ in found] == [0, 1, 2, 3]
    for _, scores in found:
        assert set(scores) == {name + of for name in asked["tasks"] for of in ("", "@ema")}
        assert all(math.isfinite(value) for figures in scores.values() for value in figures.values())
        assert scores["cloze_word"] != {} and scores["local_choice"].keys() >= {"acc", "acc_norm"}
    assert any(scores["cloze_greedy"] != scores["cloze_greedy@ema"] for _, scores in found)


def _train(mesh: Mesh, config: Config, folder: Path) -> None:
    run_training(mesh, config, folder)


def test_every_layout_gives_the_same_figures(data: Path, tmp_path: Path) -> None:
    """Also where the questions do not divide by the ranks."""
    found = []
    for tensor, pipeline, world in ((1, 1, 1), (1, 1, 2), (2, 1, 2), (1, 2, 2)):
        parallel = {"tensor": tensor, "pipeline": {"size": pipeline}}
        micro = 2 * tensor * pipeline // world
        keys = {"valid_every": 2, "total_steps": 2, "micro_num": micro, "valid_micro_num": micro}
        asked = {"tasks": CLOZE, "limit": 9}
        config = config_for(data, evaluation=asked, parallel=parallel, data=keys)
        folder = tmp_path / f"{tensor}{pipeline}{world}"
        run_world(_train, world, (config, folder), tensor=tensor, pipeline=pipeline)
        ((_, scores),) = tasks_of(folder)
        (event,) = (one for one in read_objects(folder / "events.jsonl") if one["event"] == "evaluation")
        named = {f"{task}/{metric}": value for task, of in scores.items() for metric, value in of.items()}
        found.append(named | {"bits_per_byte": event["bits_per_byte"]})
    assert found[1:] == [pytest.approx(found[0], rel=1e-8)] * 3 and len(found[0]) == 9


def test_bits_per_byte_are_those_of_the_text(data: Path, tmp_path: Path) -> None:
    """Whole documents: the bits of all labels over the UTF-8 bytes of the files; every token is counted once."""
    run_training(single_process_mesh(), config_for(data, data={"valid_every": 4}), tmp_path / "run")
    (event,) = (one for one in read_objects(tmp_path / "run" / "events.jsonl") if one["event"] == "evaluation")
    written, tokenizer = texts(100, 14), Tokenizer(data / "small.model")
    labels = sum(len(tokenizer.encode(text)) + 1 for text in written)  # the end is a label, too
    assert event["folders"]["text"][0] == labels, "as many tokens as the set has"
    n_bytes = sum(len(text.encode()) for text in written)
    assert n_bytes > sum(map(len, written)), "characters of several bytes"
    assert event["bits_per_byte"] == pytest.approx(event["loss"] * labels / math.log(2) / n_bytes, rel=1e-12)


def test_without_a_record_of_bytes_there_is_a_line_and_no_figure(
    data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import json
    import shutil

    shutil.copytree(data / "valid", tmp_path / "valid")
    (meta,) = (tmp_path / "valid").rglob("*.meta.json")
    record = json.loads(meta.read_text())
    meta.write_text(json.dumps({key: value for key, value in record.items() if key != "label_bytes"}))
    config = config_for(data, data={"valid_every": 4, "valid_folder": str(tmp_path / "valid")})
    with caplog.at_level("INFO", logger="internlm_lite"):
        run_training(single_process_mesh(), config, tmp_path / "run")
    (event,) = (one for one in read_objects(tmp_path / "run" / "events.jsonl") if one["event"] == "evaluation")
    assert "bits_per_byte" not in event
    assert len([line for line in caplog.messages if "so bits per byte are not shown" in line]) == 1


def bests(folder: Path) -> list[tuple[int, dict[str, Any]]]:
    storage = LocalStorage(folder)
    manifests = [inspect(storage, name).manifest for name in committed(storage)]
    return [(one.step, one.state["best"]) for one in manifests if one.kind == "best"]


def test_the_best_by_a_tasks_figure_stays_over_a_resume(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its value and step are in the checkpoint; the newest stays, too, though one milestone is kept."""

    def train(values: list[float], total: int) -> None:
        coming = iter(values)
        scores = lambda self, model, progress: {"cloze_word": {"acc": next(coming)}}  # noqa: E731
        monkeypatch.setattr(TaskSuite, "scores", scores)
        ckpt = {
            "enable_save_ckpt": True,
            "save_ckpt_folder": str(tmp_path / "saves"),
            "checkpoint_every": 1,
            "keep": 1,
            "async_upload": False,
        }
        asked = {"tasks": ["cloze_word"], "every": 1, "keep_best": "cloze_word/acc"}
        config = config_for(data, ckpt=ckpt, evaluation=asked, data={"total_steps": total})
        run_training(single_process_mesh(), config, tmp_path / "run")
        assert next(coming, None) is None, "an evaluation for every value"

    train([0.25, 0.75, 0.5], 3)
    assert bests(tmp_path / "saves") == [(2, {"figure": "cloze_word/acc", "value": 0.75})]
    train([0.75, float("nan")], 5)
    assert bests(tmp_path / "saves") == [(2, {"figure": "cloze_word/acc", "value": 0.75})], "equal is not better"
    train([0.8], 6)
    assert bests(tmp_path / "saves") == [(6, {"figure": "cloze_word/acc", "value": 0.8})]
    steps = sorted(name.step for name in committed(LocalStorage(tmp_path / "saves")))
    assert steps[-2:] == [6, 6], "the best and the newest, a final one"


ERRORS = [
    (["cloze_wrd"], {}, "found 'cloze_wrd', expected built-in tasks .* nearest: cloze_word"),
    (["local_choise"], {}, "found 'local_choise', expected .*include_path=.*; nearest: local_choice"),
    (["cloze_word"], {"keep_best": "cloze_word/f1"}, 'found "cloze_word/f1", expected one of cloze_word/acc,'),
    (["local_choice"], {"keep_best": "local_choice/f1"}, "expected one of local_choice/acc, local_choice/acc_norm"),
    (["local_choice"], {"include_path": "/no/such"}, "found no folder /no/such, expected one with task files"),
    (["broken"], {}, "lm_eval cannot load broken"),
]


@pytest.mark.parametrize(("tasks", "keys", "message"), ERRORS, ids=lambda value: str(value)[:30])
def test_a_wrong_task_is_one_error_before_training(tasks, keys, message, data, tmp_path, monkeypatch) -> None:
    """Without lm_eval's own tasks, which take seconds to be listed."""
    from lm_eval.tasks import TaskManager

    plain = TaskManager.__init__
    only = lambda self, *parts, **more: plain(self, *parts, **{**more, "include_defaults": False})  # noqa: E731
    monkeypatch.setattr(TaskManager, "__init__", only)
    folder = write_tasks(tmp_path / "tasks")
    (folder / "broken.yaml").write_text("task: broken\ndataset_path: json\noutput_type: multiple_choice\n")
    asked = {"tasks": tasks, "every": 1, "include_path": str(folder), **keys}
    with pytest.raises(ConfigError, match=f"^evaluation.*{message}"):
        load_run(config_for(data, evaluation=asked), single_process_mesh(), tmp_path, "none", RunServices())


def test_without_lm_eval_only_its_tasks_are_refused(data, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    suite = TaskSuite(config_for(data, evaluation={"tasks": ["cloze_word"], "every": 1}), single_process_mesh())
    assert set(suite.higher_is_better) == {"cloze_word/acc", "cloze_word/acc_norm", "cloze_word/acc_bytes"}
    with pytest.raises(MissingPackageError, match=r"pip install internlm_lite\[eval\]"):
        TaskSuite(config_for(data, evaluation={"tasks": ["piqa"], "every": 1}), single_process_mesh())
