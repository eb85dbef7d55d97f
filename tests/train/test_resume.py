"""A run that stops and resumes prints the losses of the run that never stopped, to the last bit."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import pytest

from internlm_lite.checkpoint.format.manifest import Kind
from internlm_lite.config.schema import Config
from internlm_lite.errors import CheckpointError, NumericsError, StorageError
from internlm_lite.mesh.mesh import Mesh, single_process_mesh
from internlm_lite.monitor.metrics import Collected
from internlm_lite.train.control import Command, due_kind
from internlm_lite.train.trainer import Trainer
from tests.corpus import write_corpus
from tests.train.runs import STEPS, curve, run_training, tiny
from tests.world import run_world


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("resume") / "corpus")


def config_for(corpus: Path, saves: Path | None, dp: int = 1, dtype: str = "torch.float32", **ckpt: Any) -> Config:
    if saves is not None:
        ckpt = {
            "enable_save_ckpt": True,
            "save_ckpt_folder": f"local:{saves}",
            "snapshot_ckpt_folder": f"local:{saves}/snapshot",
            "async_upload": False,  # on a slow disk a save in the background may be skipped
            **ckpt,
        }
    scaler = {"fp16": {"initial_scale": 256.0, "growth_interval": 2}}
    return tiny(
        corpus,
        ckpt=ckpt,
        data={"micro_num": 4 // dp, "skip_batches": "2", "rampup_batch_size": f"{2 // dp} {2 // dp} 3"},
        model={"dtype": dtype},
        grad_scaler=scaler,
        hybrid_zero_optimizer={"clip_grad_norm": 0.5},
    )


class Killed(Exception):
    """Stands for the end of the process right after a step was printed."""


def killed_after(
    steps: int, mesh: Mesh, config: Config, folder: Path, patch: pytest.MonkeyPatch, resume: str = "auto"
) -> None:
    """Run until `steps` steps are done, with everything due until then saved, and no goodbye."""
    original = Trainer.step

    def dying_step(trainer: Trainer, batch: Any, step: int, **hooks: Any) -> Any:
        if step == steps:
            # The process lives on: messages under way must not meet those of the next run.
            trainer.optimizer.wait_weights()
            raise Killed
        return original(trainer, batch, step, **hooks)

    patch.setattr(Trainer, "step", dying_step)
    with pytest.raises(Killed):
        run_training(mesh, config, folder, resume)
    patch.setattr(Trainer, "step", original)


@pytest.mark.parametrize(
    ("kill", "resumed_from", "dtype"), [(3, 2, "torch.float32"), (6, 6, "torch.bfloat16"), (5, 4, "torch.float16")]
)
def test_one_process_resumes_bit_for_bit(
    kill: int, resumed_from: int, dtype: str, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    mesh = single_process_mesh()
    expected = run_training(mesh, config_for(corpus, None, dtype=dtype), tmp_path / "whole")
    config = config_for(corpus, tmp_path / "saves", dtype=dtype, checkpoint_every=4, oss_snapshot_freq=2)
    killed_after(kill, mesh, config, tmp_path / "killed", monkeypatch)
    resumed = run_training(mesh, config, tmp_path / "resumed")
    assert [step["step"] for step in resumed] == list(range(resumed_from, STEPS))
    same = (
        "loss",
        "grad_norm",
        "lr",
        "loss_scale",
        "folders",
        "num_consumed_tokens",
        "inf_nan_skip_batches",
        "micro_num",
    )
    for step, whole in zip(resumed, expected[resumed_from:], strict=True):
        assert {key: step[key] for key in same} == {key: whole[key] for key in same}


def save_and_resume(mesh: Mesh, corpus: Path, folder: Path) -> list:
    dp = mesh.dp.size
    whole = run_training(mesh, config_for(corpus, None, dp), folder / "whole")
    config = config_for(corpus, folder / "saves", dp, oss_snapshot_freq=3)
    with pytest.MonkeyPatch.context() as patch:
        killed_after(5, mesh, config, folder / "killed", patch)
    return [whole, run_training(mesh, config, folder / "resumed")]


@pytest.mark.parametrize(("size", "zero1", "context"), [(2, -1, 1), (4, 2, 1), (2, -1, 2)])
def test_several_ranks_resume_bit_for_bit(size: int, zero1: int, context: int, corpus: Path, tmp_path: Path):
    # dp 4 leaves one micro-batch per rank, so there is no ramp-up to test there
    if size == 4:
        whole, resumed = run_world(save_and_resume_tp, size, (corpus, tmp_path), zero1=zero1, tensor=2)[0]
    else:
        whole, resumed = run_world(save_and_resume, size, (corpus, tmp_path), zero1=zero1, context=context)[0]
    assert [step["step"] for step in resumed] == [3, 4, 5, 6, 7]
    assert curve(resumed) == curve(whole[3:])


def save_and_resume_tp(mesh: Mesh, corpus: Path, folder: Path) -> list:
    assert (mesh.dp.size, mesh.tp.size) == (2, 2)
    return save_and_resume(mesh, corpus, folder)


@pytest.mark.parametrize("context", [1, 2])
def test_another_number_of_ranks_continues_the_same_curve(context: int, corpus: Path, tmp_path: Path):
    mesh = single_process_mesh()
    whole = run_training(mesh, config_for(corpus, None, dtype="torch.float64"), tmp_path / "whole")
    config = config_for(corpus, tmp_path / "saves", dtype="torch.float64", oss_snapshot_freq=3)
    with pytest.MonkeyPatch.context() as patch:
        killed_after(5, mesh, config, tmp_path / "killed", patch)
    args = (
        config_for(corpus, tmp_path / "saves", 2 // context, dtype="torch.float64", oss_snapshot_freq=100),
        tmp_path / "resumed",
    )
    resumed = run_world(run_training, 2, args, context=context)[0]
    for ours, expected in zip(curve(resumed), curve(whole[3:]), strict=True):
        assert ours == pytest.approx(expected, rel=1e-10)


def test_another_batch_size_is_warned_of(corpus: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    mesh = single_process_mesh()
    run_training(mesh, config_for(corpus, tmp_path / "saves"), tmp_path / "first")
    values = config_for(corpus, tmp_path / "saves").model_dump()
    values["data"] |= {"micro_num": 2, "rampup_batch_size": "", "total_steps": STEPS + 1}
    logger = logging.getLogger("internlm_lite")
    logger.addHandler(caplog.handler)
    run_training(mesh, Config.model_validate(values), tmp_path / "second")
    logger.removeHandler(caplog.handler)
    assert "a step takes 128 tokens now, expected 256 as when the run of checkpoint" in caplog.text


def test_a_finished_run_resumes_to_nothing(corpus: Path, tmp_path: Path):
    config = config_for(corpus, tmp_path / "saves")
    assert len(run_training(single_process_mesh(), config, tmp_path / "first")) == STEPS
    assert run_training(single_process_mesh(), config, tmp_path / "second") == []


def test_resume_none_starts_again(corpus: Path, tmp_path: Path):
    config = config_for(corpus, tmp_path / "saves")
    first = run_training(single_process_mesh(), config, tmp_path / "first")
    again = run_training(single_process_mesh(), config, tmp_path / "second", resume="none")
    assert curve(again) == curve(first)


def test_resume_at_a_step(corpus: Path, tmp_path: Path):
    config = config_for(corpus, tmp_path / "saves", checkpoint_every=4, oss_snapshot_freq=3)
    run_training(single_process_mesh(), config, tmp_path / "first")
    for step in (4, 6):
        resumed = run_training(single_process_mesh(), config, tmp_path / f"from-{step}", resume=str(step))
        assert resumed[0]["step"] == step
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 5 in .*saves and .*snapshot; the steps there: "):
        run_training(single_process_mesh(), config, tmp_path / "nowhere", resume="5")


def test_weights_only_and_weights_with_counters(corpus: Path, tmp_path: Path):
    mesh = single_process_mesh()
    first = run_training(mesh, config_for(corpus, tmp_path / "saves", checkpoint_every=4), tmp_path / "first")
    weights = run_training(
        mesh, config_for(corpus, None, load_model_only_folder=f"local:{tmp_path}/saves"), tmp_path / "weights"
    )
    assert [step["step"] for step in weights] == list(range(STEPS))
    assert weights[0]["loss"] < first[0]["loss"]
    milestone = next((tmp_path / "saves" / "commits").glob("*0000000004*"))
    counters = config_for(corpus, None, load_ckpt_folder=f"local:{milestone}", load_optimizer=False)
    rest = run_training(mesh, counters, tmp_path / "rest")
    assert [step["step"] for step in rest] == [4, 5, 6, 7]
    assert rest[0]["loss"] == first[4]["loss"], "the same weights on the same batch"
    assert rest[0]["lr"] == first[4]["lr"]
    assert rest[1]["loss"] != first[5]["loss"], "moments were not loaded"


def test_another_schedule_is_told_with_both_rates(corpus: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    config = config_for(corpus, tmp_path / "saves", oss_snapshot_freq=4)
    run_training(single_process_mesh(), config, tmp_path / "first")

    def resumed_at_4(**sections: dict[str, Any]) -> list[str]:
        values = {**config.model_dump(), "ckpt": {**config.ckpt.model_dump(), "enable_save_ckpt": False}}
        for section, changes in sections.items():
            values[section] = {**values[section], **changes}
        caplog.clear()
        run_training(single_process_mesh(), Config.model_validate(values), tmp_path / "again", resume="4")
        return [record.message for record in caplog.records if " has the learning rate " in record.message]

    assert resumed_at_4() == []
    (told,) = resumed_at_4(adam={"lr": 0.02}, lr_scheduler={"eta_min": 0.0})
    assert " has the learning rate 0.0" in told and "adam.lr 0.01 then, 0.02 now; lr_scheduler.eta_min 0.0001" in told
    assert resumed_at_4(lr_scheduler={"init_steps": 0}) == []


def test_another_model_shape_is_refused(corpus: Path, tmp_path: Path):
    run_training(single_process_mesh(), config_for(corpus, tmp_path / "saves"), tmp_path / "first")
    changed = config_for(corpus, tmp_path / "saves")
    changed = Config.model_validate({**changed.model_dump(), "model": {**changed.model.model_dump(), "num_layers": 3}})
    with pytest.raises(CheckpointError, match=r"layers\.2"):
        run_training(single_process_mesh(), changed, tmp_path / "second")
    assert len(list((tmp_path / "saves" / "commits").iterdir())) == 1, "nothing was lost"


def test_unwritable_save_folder_is_refused(corpus: Path, tmp_path: Path):
    (tmp_path / "file").write_text("in the way")
    config = config_for(corpus, tmp_path / "file" / "saves")
    with pytest.raises(StorageError, match="file"):
        run_training(single_process_mesh(), config, tmp_path / "run")


def test_evaluation_does_not_change_the_curve(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    seen: list[Collected] = []
    original = Trainer.evaluate

    def noting(*args: Any) -> Collected:
        seen.append(original(*args))
        return seen[-1]

    monkeypatch.setattr(Trainer, "evaluate", noting)
    plain = run_training(single_process_mesh(), config_for(corpus, None), tmp_path / "plain")
    changed = config_for(corpus, None).model_dump()
    changed["data"] |= {"valid_every": 2, "valid_folder": str(corpus), "valid_batches": 2}
    evaluated = run_training(single_process_mesh(), Config.model_validate(changed), tmp_path / "evaluated")
    assert curve(evaluated) == curve(plain)
    assert len(seen) == STEPS // 2
    assert set(seen[0].folders) == {"code", "docs", "books"}
    assert seen[-1].cross_entropy < seen[0].cross_entropy


def test_figures_of_an_interval_go_on_through_a_resume(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def logged(saves: Path | None, **ckpt: Any) -> Config:
        values = config_for(corpus, saves, **ckpt).model_dump()
        return Config.model_validate({**values, "monitor": {"log_every": 4}})

    whole = run_training(single_process_mesh(), logged(None), tmp_path / "whole")
    assert [step["step"] for step in whole] == [3, 7]
    config = logged(tmp_path / "saves", oss_snapshot_freq=3)
    killed_after(5, single_process_mesh(), config, tmp_path / "killed", monkeypatch)
    resumed = run_training(single_process_mesh(), config, tmp_path / "resumed")
    for ours, expected in zip(resumed, whole, strict=True):
        assert (ours["loss"], ours["acc"], ours["folders"]) == (expected["loss"], expected["acc"], expected["folders"])


def test_the_newest_of_both_folders_is_the_one_saved_last(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """An older run's milestone of a later step must not win over this run's snapshot."""
    mesh = single_process_mesh()
    saves = tmp_path / "saves"
    run_training(mesh, config_for(corpus, saves, checkpoint_every=8), tmp_path / "first")
    again = config_for(corpus, saves, oss_snapshot_freq=2)
    killed_after(3, mesh, again, tmp_path / "again", monkeypatch, resume="none")
    resumed = run_training(mesh, again, tmp_path / "resumed")
    assert [step["step"] for step in resumed] == [2, 3, 4, 5, 6, 7]


def test_a_damaged_milestone_falls_back_to_a_snapshot(corpus: Path, tmp_path: Path):
    mesh, saves = single_process_mesh(), tmp_path / "saves"
    run_training(mesh, config_for(corpus, saves, oss_snapshot_freq=3), tmp_path / "first")
    for shard in (saves / "data").glob("*/rank-00000.safetensors"):
        content = bytearray(shard.read_bytes())
        content[3000:3004] = b"\xff\xff\xff\xff"
        shard.write_bytes(content)
    resumed = run_training(mesh, config_for(corpus, saves, oss_snapshot_freq=3), tmp_path / "second")
    assert [step["step"] for step in resumed] == [6, 7]


def test_a_run_whose_loss_stays_non_finite_ends(corpus: Path, tmp_path: Path):
    values = config_for(corpus, None).model_dump()
    values["adam"] |= {"lr": 1e30}
    values["data"] |= {"total_steps": 40, "rampup_batch_size": "", "skip_batches": ""}
    values["lr_scheduler"] |= {"total_steps": 40, "warmup_ratio": 0.0}
    with pytest.raises(NumericsError, match="step 11: the loss is not finite since step 1;"):
        run_training(single_process_mesh(), Config.model_validate(values), tmp_path / "run")


def test_what_is_due_when():
    ckpt = tiny(None, ckpt={"enable_save_ckpt": True, "checkpoint_every": 6, "oss_snapshot_freq": 2}).ckpt
    kinds = {0: None, 1: None, 2: "snapshot", 4: "snapshot", 6: "milestone", 8: "snapshot", 12: "milestone"}
    nothing, save, stop = Command(), Command(save=True, source="x"), Command(save=True, stop=True, source="x")

    def due(steps: int, command: Command = nothing, done: bool = False, deferred: Kind | None = None) -> Kind | None:
        return due_kind(ckpt, steps, command, all_done=done, deferred=deferred)

    assert {steps: due(steps) for steps in kinds} == kinds
    assert [due(12, done=True), due(13, done=True)] == ["final", "final"]
    assert [due(steps, save) for steps in (5, 4, 6)] == ["milestone"] * 3
    assert [due(steps, stop) for steps in (5, 4, 6)] == ["rescue", "rescue", "milestone"]
    assert [due(steps, deferred="milestone") for steps in (4, 5)] == ["milestone"] * 2
    deferred = [due(steps, command, deferred="snapshot") for steps, command in ((5, nothing), (6, nothing), (5, stop))]
    assert deferred == ["snapshot", "milestone", "rescue"]
    ckpt = ckpt.model_copy(update={"enable_save_ckpt": False})
    assert [due(6, command, done) for command in (nothing, save, stop) for done in (False, True)] == [None] * 6


def test_non_finite_step_keeps_interval_metrics_of_a_save(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step_of = Trainer.step

    def bad_once(trainer: Trainer, batch: Any, step: int, **hooks: Any) -> Any:
        outcome = step_of(trainer, batch, step, **hooks)
        trainer.metrics._sums[-1] += math.nan if step == 4 else 0.0
        return outcome

    monkeypatch.setattr(Trainer, "step", bad_once)
    diverging = {"monitor": {"log_every": 4}}
    whole = run_training(single_process_mesh(), tiny(corpus, **diverging), tmp_path / "run")
    (tmp_path / "stop").write_text("6")
    ckpt = {"enable_save_ckpt": True, "save_ckpt_folder": f"local:{tmp_path / 'saves'}", "async_upload": False}
    stopped = tiny(corpus, **diverging, ckpt={**ckpt, "stop_file_path": str(tmp_path / "stop")})
    assert len(run_training(single_process_mesh(), stopped, tmp_path / "stopped")) == 1
    resumed = run_training(single_process_mesh(), stopped, tmp_path / "again")
    assert whole[-1]["loss"] is None and resumed[-1]["folders"] == whole[-1]["folders"]
