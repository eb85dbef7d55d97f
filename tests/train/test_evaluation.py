"""Evaluations: on training data too, before the first step, of a checkpoint alone; the best checkpoint is kept."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from internlm_lite.checkpoint.admin.prune import plan_prune
from internlm_lite.checkpoint.format.catalog import committed, inspect
from internlm_lite.checkpoint.format.manifest import Name
from internlm_lite.checkpoint.storage.local import LocalStorage
from internlm_lite.cli import ckpt as ckpt_tool
from internlm_lite.config.schema import Config
from internlm_lite.mesh.mesh import Mesh, single_process_mesh
from internlm_lite.monitor.jsonl import read_objects
from internlm_lite.train.trainer import Trainer
from tests import cli
from tests.corpus import write_corpus
from tests.train.layouts import LIMIT, Layout, config_of
from tests.train.runs import STEPS, curve, run_training, tiny
from tests.train.test_launch import CONFIG, start_ranks
from tests.world import run_world

EVERYTHING = {"valid_every": 3, "valid_at_start": True, "valid_train_batches": 2, "valid_micro_num": 4}


def evaluations(folder: Path) -> list[dict[str, Any]]:
    return [event for event in read_objects(folder / "events.jsonl") if event["event"] == "evaluation"]


def saving(folder: Path, **more: Any) -> dict[str, Any]:
    return {"enable_save_ckpt": True, "save_ckpt_folder": str(folder), "keep_best": True, **more}


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_evaluations_change_no_bit_of_training(dropout: float, tmp_path: Path) -> None:
    """Neither do saves of the best, and dropout goes on after them; without it the loss on the first batch before the
    first step is that of the first step."""
    corpus, mesh, model = write_corpus(tmp_path / "corpus"), single_process_mesh(), {"residual_dropout": dropout}
    plain = run_training(mesh, tiny(corpus, model=model), tmp_path / "plain")
    keys = {**EVERYTHING, "valid_train_batches": 1, "valid_folder": str(corpus), "valid_batches": 1}
    config = tiny(corpus, data=keys, ckpt=saving(tmp_path / "saves"), model=model)
    assert curve(run_training(mesh, config, tmp_path / "evaluated")) == curve(plain)
    found = evaluations(tmp_path / "evaluated")
    assert [event["step"] for event in found] == [-1, 2, 5, STEPS - 1]
    assert dropout or found[0]["train_loss"] == pytest.approx(plain[0]["loss_from_metric"], rel=1e-12)
    assert found[-1]["train_loss"] < found[0]["train_loss"]


def _evaluated(mesh: Mesh, config: Config, folder: Path) -> None:
    run_training(mesh, config, folder)


def test_every_layout_measures_the_same_batches(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus")
    found, labels = [], []
    for layout in (Layout(), Layout(dp=2, bucket=1500), Layout(tp=2, sp=True), Layout(pp=2), Layout(cp=2)):
        data = {**EVERYTHING, "valid_folder": str(corpus), "valid_micro_num": 4 // layout.dp, "valid_batches": 1}
        folder = tmp_path / str(layout)
        args = (config_of(layout, corpus, data=data), folder)
        run_world(_evaluated, layout.world, args, tensor=layout.tp, pipeline=layout.pp, context=layout.cp)
        found.append([(event["step"], event["loss"], event["train_loss"]) for event in evaluations(folder)])
        labels.append([[figures[0] for figures in event["folders"].values()] for event in evaluations(folder)])
    assert all(others == labels[0] for others in labels), "also where the last batch is not full on all ranks"
    for other in found:
        assert [figures[0] for figures in other] == [-1, 2, 4]
        assert other == [pytest.approx(figures, rel=LIMIT) for figures in found[0]]


def bests(folder: Path) -> list[tuple[int, float]]:
    """(steps, validation loss) of the checkpoints of the kind "best"."""
    storage = LocalStorage(folder)
    manifests = [inspect(storage, name).manifest for name in committed(storage)]
    return [(m.step, m.state["valid_loss"]) for m in manifests if m.kind == "best"]


def train_with(losses: list[float], patch: pytest.MonkeyPatch, config: Config, folder: Path, resume: str = "auto"):
    """A run whose evaluations give these losses."""
    evaluate, coming = Trainer.evaluate, iter(losses)

    def pretended(*parts: Any) -> Any:
        return replace(evaluate(*parts), cross_entropy=next(coming))

    with patch.context() as inner:
        inner.setattr(Trainer, "evaluate", pretended)
        run_training(single_process_mesh(), config, folder, resume)
    assert next(coming, None) is None, "an evaluation for every loss"


@pytest.mark.parametrize("in_background", [False, True])
def test_the_best_checkpoint_stays_besides_the_newest(
    in_background: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over a resume too, which knows how good it was; an evaluation that is not finite is never the best."""
    saves, mesh_steps = tmp_path / "saves", {"total_steps": 4}
    ckpt = saving(saves, checkpoint_every=1, keep=1, async_upload=in_background)
    data = {"valid_every": 1, "valid_at_start": True}
    first = tiny(None, ckpt=ckpt, data={**data, **mesh_steps})
    train_with([1.0, 5.0, 3.0, float("nan"), 4.0], monkeypatch, first, tmp_path / "run")
    assert bests(saves) == [(2, 3.0)], "initial weights are not saved"
    train_with([3.5, 3.0, 3.1, 2.9], monkeypatch, tiny(None, ckpt=ckpt, data=data), tmp_path / "run")
    assert bests(saves) == [(8, 2.9)]
    assert sorted(name.step for name in committed(LocalStorage(saves))) == [4, 7, 8, 8], "final ones, a milestone, best"


def test_a_worse_evaluation_after_going_back_keeps_the_better_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saves = tmp_path / "saves"
    ckpt = saving(saves, checkpoint_every=2, auto_resume=False, async_upload=False)
    config = tiny(None, ckpt=ckpt, data={"valid_every": 2})
    train_with([5.0, 4.0, 2.0, 3.0], monkeypatch, config, tmp_path / "run")
    assert bests(saves) == [(6, 2.0)]
    train_with([4.0, 2.5, 2.2], monkeypatch, config, tmp_path / "again", "4")
    assert bests(saves) == [(6, 2.0)], "the run that it went on from had a better one"
    train_with([9.0, 8.0, 8.5, 8.6], monkeypatch, config, tmp_path / "new", "none")
    assert bests(saves) == [(4, 8.0)], "a new run has its own"


def test_tools_show_and_keep_the_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    saves = tmp_path / "saves"
    config = tiny(None, ckpt=saving(saves, checkpoint_every=2, async_upload=False), data={"valid_every": 2})
    train_with([2.0, 3.0, 4.0, 5.0], monkeypatch, config, tmp_path / "run")
    assert ckpt_tool.main(["ls", str(saves)]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if " best" in line]
    assert line.split()[0] == "2" and "best (loss 2.0000)" in line
    assert ckpt_tool.main(["ls", "--json", str(saves)]) == 0
    assert '"valid_loss": 2.0' in capsys.readouterr().out
    plan = plan_prune(LocalStorage(saves), keep=1)
    assert [name.step for name in plan.kept] == [8, 2] and [name.step for name in plan.removed] == [6, 4, 2]
    assert all(isinstance(name, Name) for name in plan.kept)


def test_eval_only_writes_nothing(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus")
    (tmp_path / "config.py").write_text(CONFIG + 'data.update(valid_every=2, valid_folder="corpus")\n')
    command = ("train.py", "--config", "config.py", "--device", "cpu")
    assert cli.run(*command, folder=tmp_path).code == 0
    (logged,) = (e for e in evaluations(tmp_path / "RUN" / "launch" / "latest") if e["step"] == 3)

    def files() -> list[tuple[Path, int]]:
        paths = [path for path in tmp_path.rglob("*") if path.name != "output.log"]
        return sorted((path, path.stat().st_mtime_ns) for path in paths)

    before = files()
    found = cli.run(*command, "--eval-only", "data.valid_train_batches=2", folder=tmp_path)
    assert found.code == 0, found.output
    assert f"evaluation after 4 steps: loss={logged['loss']:.4f}" in found.output and "train_loss=" in found.output
    older = cli.run(*command, "--eval-only", "--resume", "2", folder=tmp_path)
    assert older.code == 0 and "evaluation after 2 steps: loss=" in older.output
    assert files() == before
    ranks = start_ranks(tmp_path, 2, "--eval-only", "MICRO_NUM=2")
    (code, said), (other, _) = [(end.code, end.output) for end in (cli.ended(*rank) for rank in ranks)]
    assert code == other == 0 and f"evaluation after 4 steps: loss={logged['loss']:.4f}" in said
    nothing = cli.run(*command, "--eval-only", "ckpt.save_ckpt_folder=local:other", folder=tmp_path)
    assert nothing.code == 2 and "--eval-only: found no checkpoint" in nothing.output
