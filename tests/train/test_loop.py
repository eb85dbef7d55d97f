"""What the loop does after a step, and in which order: spikes, saves, evaluation."""

from __future__ import annotations

import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from internlm_lite.errors import CheckpointError, DataError, NumericsError
from internlm_lite.mesh.mesh import single_process_mesh
from internlm_lite.monitor.jsonl import read_objects
from internlm_lite.optim.spikes import SpikeGuard
from internlm_lite.optim.step_decision import StepOutcome
from internlm_lite.optim.zero import HybridZeroOptimizer
from internlm_lite.train import loop
from internlm_lite.train.build import build_run
from internlm_lite.train.control import Control, StepSignals
from internlm_lite.train.train_state import TrainState
from internlm_lite.train.trainer import Trainer
from tests.steps import read_metrics
from tests.train.runs import STEPS, curve, run_training, tiny

UNUSED = "tok_embeddings.weight"
"""Its last row belongs to a token that no batch of the dummy data has."""
ROLLBACK = {"guard": {"spike": "rollback"}}


def spikes_at(step: int, patch: pytest.MonkeyPatch) -> None:
    """The loss of that step stands out, and its update is left out."""
    judge, steps = SpikeGuard.judge, iter(range(100))

    def spiking(self: SpikeGuard, loss: torch.Tensor, norm: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        found, skip = judge(self, loss, norm)
        return (found + torch.tensor([20.0, 0.0]), ~skip) if next(steps) == step else (found, skip)

    patch.setattr(SpikeGuard, "judge", spiking)


def saving(folder: Path, **more: Any) -> dict[str, Any]:
    return {"enable_save_ckpt": True, "save_ckpt_folder": f"local:{folder}", "async_upload": False, **more}


def logged(folder: Path, *kinds: str) -> list[tuple[str, int]]:
    """(event, step) of those kinds."""
    events = read_objects(folder / "events.jsonl")
    return [(event["event"], event["step"]) for event in events if event["event"] in kinds]


@pytest.mark.parametrize("spike", [STEPS - 2, 2])
def test_first_spike_keeps_saves_and_evaluations(spike: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is known in the step after, which is the last one, or one with a milestone."""
    spikes_at(spike, monkeypatch)
    ckpt = saving(tmp_path / "saves", checkpoint_every=4 if spike == 2 else 100)
    config = tiny(None, ckpt=ckpt, data={"valid_every": 4}, **ROLLBACK)
    assert len(run_training(single_process_mesh(), config, tmp_path / "run")) == STEPS
    saves = [("checkpoint", 4)] * (spike == 2) + [("checkpoint", STEPS)]
    assert logged(tmp_path / "run", "start", "checkpoint", "rollback") == [("start", 0), *saves]
    assert logged(tmp_path / "run", "evaluation") == [("evaluation", 3), ("evaluation", 7)]
    (event,) = (e for e in read_objects(tmp_path / "run" / "events.jsonl") if e["event"] == "spike")
    assert event["action"] == "its update was left out", "nothing was rolled back"


@pytest.mark.parametrize("own_is_damaged", [False, True])
def test_rollback_restores_the_checkpoint_that_was_loaded(
    own_is_damaged: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though the run that wrote it goes on writing; also where this run's own are all damaged."""
    mesh, theirs = single_process_mesh(), tmp_path / "theirs"
    run_training(mesh, tiny(None, ckpt=saving(theirs, checkpoint_every=4)), tmp_path / "first")
    newer = next((theirs / "commits").glob("*0000000008*"))
    hidden = newer.rename(tmp_path / newer.name)
    config = tiny(None, ckpt=saving(tmp_path / "ours", load_ckpt_folder=f"local:{theirs}"), **ROLLBACK)
    run = build_run(config, mesh, tmp_path)
    hidden.rename(newer)
    if own_is_damaged:
        origin = run.checkpoints.own()

        def damaged(*_: object, **__: object) -> None:
            raise CheckpointError("all damaged")

        monkeypatch.setattr(origin, "resume", damaged)
    spikes_at(1, monkeypatch)
    assert loop.train(run, loop.StopSignals()).state.step == STEPS
    run.checkpoints.close(wait=True)
    run.reporter.close()
    (back,) = (event for event in read_objects(tmp_path / "events.jsonl") if event["event"] == "rollback")
    assert (back["step"], back["back_to"]) == (5, 4)


def test_a_missed_evaluation_is_run_by_the_next_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first start fails in the last one, after its save; the second runs it, and a third does not repeat it."""
    mesh, folder = single_process_mesh(), tmp_path / "run"
    config = tiny(None, ckpt=saving(tmp_path / "saves"), data={"valid_every": 4})
    with monkeypatch.context() as patch:
        evaluate, done = Trainer.evaluate, iter((True, False))
        patch.setattr(Trainer, "evaluate", lambda *parts: evaluate(*parts) if next(done) else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run_training(mesh, config, folder)
    assert logged(folder, "checkpoint", "evaluation") == [("evaluation", 3), ("checkpoint", STEPS)]
    for _ in range(2):
        run_training(mesh, config, folder)
        assert logged(folder, "evaluation") == [("evaluation", 3), ("evaluation", STEPS - 1)]


def test_a_stopped_run_leaves_its_evaluation_to_the_next_start(tmp_path: Path) -> None:
    (tmp_path / "stop").write_text("4")
    config = tiny(None, ckpt=saving(tmp_path / "saves", stop_file_path=str(tmp_path / "stop")), data={"valid_every": 4})
    kinds = ("start", "checkpoint", "evaluation", "stopped")
    run_training(single_process_mesh(), config, tmp_path)
    first = [("start", 0), ("checkpoint", 4), ("stopped", 4)]
    assert logged(tmp_path, *kinds) == first
    run_training(single_process_mesh(), config, tmp_path)
    then = [("start", 4), ("evaluation", 3), ("checkpoint", STEPS), ("evaluation", STEPS - 1)]
    assert logged(tmp_path, *kinds) == first + then


def test_a_flipped_bit_is_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def differ(*_: object) -> None:
        raise NumericsError("step 3: ranks that must hold the same numbers do not")

    monkeypatch.setattr(loop, "check_replicas", differ)
    config = tiny(None, ckpt=saving(tmp_path / "saves", checkpoint_every=4), guard={"check_replicas_every": 4})
    with pytest.raises(NumericsError, match="step 3"):
        run_training(single_process_mesh(), config, tmp_path)
    assert not list((tmp_path / "saves").glob("commits/*"))


def test_undone_steps_do_not_count_as_time(tmp_path: Path) -> None:
    run = build_run(tiny(None), single_process_mesh(), tmp_path, "none")
    run.trainer.fwd_bwd_time.start()
    run.trainer.fwd_bwd_time.stop()
    run.reporter.start(TrainState())
    assert run.trainer.fwd_bwd_time.take()() == 0.0
    run.reporter.close()


@pytest.mark.parametrize(("step", "last"), [(10, "no update was made yet"), (11, "the last update was that of step 0")])
def test_more_than_max_bad_steps_end_the_run(step: int, last: str, tmp_path: Path) -> None:
    run = build_run(tiny(None), single_process_mesh(), tmp_path, "none")
    control = Control(run.config, run.reporter, loop.StopSignals(), is_main=True)
    control.check_skips(StepSignals(consecutive_skips=10), step - 1)
    with pytest.raises(NumericsError, match=f"step {step}: the last 11 updates were left out .*; {last}: lower"):
        control.check_skips(StepSignals(consecutive_skips=11), step)
    run.reporter.close()


@pytest.mark.parametrize(
    ("skips", "error", "words"),
    [
        (
            {"consecutive_bad_losses": 11},
            NumericsError,
            "step 11: the loss is not finite since step 1; the loss scale",
        ),
        ({"consecutive_unlabelled": 11}, DataError, "step 11: no token of the last 11 batches has a label"),
        ({"consecutive_bad_losses": 10, "consecutive_unlabelled": 10}, None, ""),
    ],
)
def test_fp16_waits_no_longer_where_the_loss_scale_plays_no_part(
    skips: dict[str, float], error: type[Exception] | None, words: str, tmp_path: Path
) -> None:
    run = build_run(tiny(None, model={"dtype": "torch.float16"}), single_process_mesh(), tmp_path, "none")
    control = Control(run.config, run.reporter, loop.StopSignals(), is_main=True)
    with pytest.raises(error, match=words) if error else nullcontext():
        control.check_skips(StepSignals(consecutive_skips=11, **skips), 11)
    run.reporter.close()


def ruins_after(step: int, role: str, value: float, patch: pytest.MonkeyPatch, name: str = UNUSED) -> None:
    """The last number of a tensor, once, after the step and before it may be saved."""
    train_step, done = Trainer.step, iter(range(100))

    def ruining(trainer: Trainer, *args: Any, **kwargs: Any) -> StepOutcome:
        outcome = train_step(trainer, *args, **kwargs)
        if next(done) == step:
            pieces = (p for p in trainer.optimizer.pieces() if (p.role, p.name) == (role, name))
            next(pieces).tensor[-1] = value
        return outcome

    patch.setattr(Trainer, "step", ruining)


@pytest.mark.parametrize(("role", "value"), [("master", math.nan), ("exp_avg_sq", math.inf), ("exp_avg_sq", -1.0)])
def test_ruined_state_is_named_and_never_saved(
    role: str, value: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny(None, ckpt=saving(tmp_path / "saves", checkpoint_every=2))
    with monkeypatch.context() as patch:
        ruins_after(3, role, value, patch)
        with pytest.raises(
            NumericsError, match=f"step 3: {role} of tok_embeddings.weight holds .* so nothing is saved"
        ):
            run_training(single_process_mesh(), config, tmp_path / "run")
    assert logged(tmp_path / "run", "checkpoint") == [("checkpoint", 2)]
    run_training(single_process_mesh(), config, tmp_path / "run")
    assert logged(tmp_path / "run", "start") == [("start", 0), ("start", 2)]
    undisturbed = run_training(single_process_mesh(), config, tmp_path / "undisturbed", "none")
    assert curve(read_metrics(tmp_path / "run" / "metrics.jsonl")) == curve(undisturbed)


@pytest.mark.parametrize("stops", [False, True])
def test_nothing_is_saved_after_a_forward_pass_that_is_not_finite(
    stops: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights are finite in fp16, what they are multiplied with is not."""
    config = tiny(
        None,
        ckpt=saving(tmp_path / "saves", checkpoint_every=3, stop_file_path=str(tmp_path / "stop")),
        model={"dtype": "torch.float16"},
    )
    (tmp_path / "stop").write_text("6" if stops else "0")
    ruins_after(3, "master", 6e4, monkeypatch, "norm.weight")
    with pytest.raises(NumericsError, match=f"step {5 if stops else 7}: the loss is not finite since step 5"):
        run_training(single_process_mesh(), config, tmp_path)
    assert logged(tmp_path, "checkpoint", "stopped", "done") == [("checkpoint", 3)]


def test_a_ruined_checkpoint_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One that was saved before saves were checked."""
    config = tiny(None, ckpt=saving(tmp_path / "saves", checkpoint_every=4))
    with monkeypatch.context() as patch:
        patch.setattr(HybridZeroOptimizer, "problem", lambda _: None)
        ruins_after(STEPS - 1, "exp_avg_sq", -1.0, patch)
        run_training(single_process_mesh(), config, tmp_path / "run")
    assert len(list((tmp_path / "saves" / "commits").iterdir())) == 2
    run_training(single_process_mesh(), config, tmp_path / "run")
    assert logged(tmp_path / "run", "start") == [("start", 0), ("start", 4)]
    assert "exp_avg_sq of tok_embeddings.weight holds negative numbers" in caplog.text
