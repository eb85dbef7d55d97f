"""The main loop. trainer.py does a step; control.py decides what follows it."""

from __future__ import annotations

import logging
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from internlm_lite.batch import Batch
from internlm_lite.errors import DataError
from internlm_lite.faults.signals import StopSignals
from internlm_lite.mesh.consensus import on_main
from internlm_lite.monitor.jsonl import is_evaluated
from internlm_lite.optim.replicas import check_replicas
from internlm_lite.train.build import Run
from internlm_lite.train.control import Control
from internlm_lite.train.evaluation import evaluate, evaluate_tasks, figures_of
from internlm_lite.train.profiling import traced_steps
from internlm_lite.train.saving import Saving
from internlm_lite.train.train_state import TrainState

logger = logging.getLogger("internlm_lite")


@dataclass(frozen=True)
class TrainingEnd:
    """How training ended."""

    state: TrainState
    stopped_by: str = ""
    """Source of the request to stop before the last step; empty: all steps are done."""


def train(run: Run, signals: StopSignals, trace_folder: Path | None = None) -> TrainingEnd:
    """Train from `run.start` to the config's last step, or until a request to stop. Collective.

    `trace_folder`: folder for the trace of `traced_steps`; None: no trace. Raises NumericsError (control.py), DataError
    (`_checked`).
    """
    state, trainer, watchdog, total_steps = run.start, run.trainer, run.watchdog, run.config.data.total_steps
    control = Control(run.config, run.reporter, signals, is_main=run.mesh.is_main)
    saving = Saving(run, control)
    _begin(run, state, saving)
    pin = run.mesh.device.type == "cuda"
    with (
        closing(run.data.batches(state.position, pin=pin)) as batches,
        traced_steps(trace_folder, run.mesh.rank) as traced,
        run.reporter.all_lines_written(),
    ):
        while state.step < total_steps and not control.decision.stop:
            watchdog.enter("data", state.step)
            batch = _checked(run, next(batches)).to(run.mesh.device)
            _report_stage(run, state, batch)
            watchdog.enter("training", state.step)
            updating = partial(_before_update, run, saving, state)
            outcome = trainer.step(batch, state.step, requests=control.requests, before_update=updating)
            traced()
            epoch, state = run.data.epoch(state.position), state.after(batch, run.mesh.dp.size)
            samples_due = run.samples.due(state.step, ended_epoch=run.data.epoch(state.position) > epoch)
            if _line_is_due(run, state):
                run.reporter.step_line(state, batch, outcome)
            decision = control.after_step(outcome, state.step)
            if restored := _roll_back(run, state, control, saving):
                state = restored
                continue
            _check_replicas(run, state)
            if decision.save or decision.final:
                saving.note(state, outcome)
                if samples_due or _evaluation_is_due(run, state) or not saving.can_wait():
                    trainer.optimizer.wait_weights()
                    with watchdog.inside("saving"), run.reporter.excluded_from_timing():
                        saving.do()
            run.checkpoints.report_finished()
            if not decision.stop:  # a stop does not wait for an evaluation; the next start does it
                _evaluate_if_due(run, state, saving)
                if samples_due:
                    with watchdog.inside("samples"), run.reporter.excluded_from_timing():
                        run.samples.show(state.step)
    control.finish(state.step)
    return _end(run, TrainingEnd(state, control.decision.stopped_by))


def _begin(run: Run, state: TrainState, saving: Saving) -> None:
    """At the start and after a rollback: start the timing and write the event "start" about the following steps."""
    run.reporter.start(state)
    tokens = {folder.name: folder.tokens for folder in run.data.packed}
    facts = {
        "step": state.step,
        "total_steps": run.config.data.total_steps,
        "log_every": run.config.monitor.log_every,
        "world_size": run.mesh.world.size,
        "folders": list(tokens),
        "folder_tokens": tokens,
        **({} if run.checkpoints.restored is None else {"restarted_from": run.checkpoints.restored}),
    }
    run.reporter.event("start", **facts)
    # Before the first step, if asked; and the previous start may have ended between its save and its evaluation.
    _evaluate_if_due(run, state, saving, skip_if_logged=True)


def _checked(run: Run, batch: Batch) -> Batch:
    """`batch`, on the host. Raises DataError for a label of loss.pad_id, whose target the loss does not know."""
    pad_id = run.config.loss.pad_id
    if pad_id is not None and len(at := (batch.labels == pad_id).nonzero()):
        folder = run.data.packed[int(batch.folders[tuple(at[0])])].name
        raise DataError(
            f"data folder {folder}: {len(at)} labels of batch {batch.after.batch - 1} are {pad_id}, which is "
            "loss.pad_id, expected none: it is for an id that texts never have; change it, or tokenise the folder again"
        )
    return batch


def _report_stage(run: Run, state: TrainState, batch: Batch) -> None:
    """Write the event "stage" before the first step of a stage but the first: its number, its values, those before."""
    before, now = run.data.stage_before(state.position), run.data.stages[batch.stage]
    if now.number != before.number and state.position.batch:
        changed = {key: value for key, value in now.facts().items() if value != before.facts()[key]}
        run.reporter.event("stage", step=state.step, stage=now.number, changed=changed, **now.facts())


def _line_is_due(run: Run, state: TrainState) -> bool:
    """Every log_every steps, at the end, and with the last step of a stage: its figures depend on the length."""
    config = run.config
    if state.step % config.monitor.log_every == 0 or state.step == config.data.total_steps:
        return True
    return len(run.data.stages) > 1 and run.data.ends_stage(state.position)


def _before_update(run: Run, saving: Saving, state: TrainState) -> None:
    saving.before_update()
    run.watchdog.enter("updating", state.step)


def _end(run: Run, ended: TrainingEnd) -> TrainingEnd:
    """Show the last samples, except after a stop, and write the last event."""
    run.trainer.optimizer.wait_weights()
    if not ended.stopped_by:
        with run.watchdog.inside("samples"):
            run.samples.show(ended.state.step)
    run.reporter.event("stopped" if ended.stopped_by else "done", step=ended.state.step, why=ended.stopped_by)
    return ended


def _roll_back(run: Run, state: TrainState, control: Control, saving: Saving) -> TrainState | None:
    """If the decision is to roll back: restore a checkpoint from before the spike, and return its state with the
    present data position, so that the data that led to the spike is skipped.

    None without a rollback or such a checkpoint: training continues, since the spike's own update was skipped.
    """
    spiked_step = control.decision.rollback_before
    if spiked_step is None:
        return None
    with run.watchdog.inside("loading"), run.reporter.excluded_from_timing():
        restored = run.checkpoints.roll_back(state, spiked_step)
    if restored is None:
        if run.mesh.is_main:
            logger.warning(
                f"step {spiked_step}: there is no checkpoint from before the spike yet: nothing else is undone"
            )
        return None
    control.rolled_back(restored.step)
    run.reporter.event("rollback", step=spiked_step, back_to=restored.step)
    run.reporter.reopen_sinks(restored.step)
    _begin(run, restored, saving)
    return restored


def _check_replicas(run: Run, state: TrainState) -> None:
    """Raises NumericsError if copies of weights differ, every guard.check_replicas_every steps."""
    optimizer, every = run.trainer.optimizer, run.config.guard.check_replicas_every
    if every and state.step % every == 0:
        with run.reporter.excluded_from_timing():
            optimizer.wait_weights()
            check_replicas(optimizer, run.mesh, state.step - 1)


def _evaluate_if_due(run: Run, state: TrainState, saving: Saving, *, skip_if_logged: bool = False) -> None:
    """Called after the step's save, which a failure here must not prevent. `skip_if_logged`: not if events.jsonl
    already has the figures of this step."""
    file = run.folder / "events.jsonl"
    validation, tasks = _validation_is_due(run, state), _tasks_are_due(run, state)
    if not (validation or tasks):
        return
    kind = "evaluation" if validation else "tasks"
    if skip_if_logged and on_main(run.mesh, lambda: is_evaluated(file, state.step - 1, kind)):
        return
    run.reporter.event("evaluating", step=state.step - 1)
    with run.watchdog.inside("evaluation"), run.reporter.excluded_from_timing():
        found = evaluate(run, state) if validation else None
        scores = evaluate_tasks(run) if tasks else {}
        if found is not None:
            run.reporter.validation(replace(found, tasks=scores))
        else:
            run.reporter.tasks(state.step - 1, scores)
        saving.keep_if_best(state, figures_of(found, scores))


def _evaluation_is_due(run: Run, state: TrainState) -> bool:
    return _validation_is_due(run, state) or _tasks_are_due(run, state)


def _validation_is_due(run: Run, state: TrainState) -> bool:
    data = run.config.data
    if state.step == 0:
        return data.valid_at_start
    return run.valid is not None and (state.step % data.valid_steps == 0 or state.step == data.total_steps)


def _tasks_are_due(run: Run, state: TrainState) -> bool:
    every = run.config.evaluation.every
    if run.tasks is None or every is None or state.step == 0:
        return run.tasks is not None and _validation_is_due(run, state)
    return state.step % every == 0 or state.step == run.config.data.total_steps
