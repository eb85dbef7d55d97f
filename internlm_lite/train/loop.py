"""The main loop."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from internlm_lite.faults.signals import StopSignals
from internlm_lite.mesh.consensus import on_main
from internlm_lite.monitor.jsonl import is_evaluated
from internlm_lite.optim.replicas import check_replicas
from internlm_lite.train.build import Run
from internlm_lite.train.evaluate import evaluate
from internlm_lite.train.guard import Guard
from internlm_lite.train.profiling import traced_steps
from internlm_lite.train.requests import Order, Requests
from internlm_lite.train.saving import due
from internlm_lite.train.state import TrainState
from internlm_lite.train.step import train_step

logger = logging.getLogger("internlm_lite")


@dataclass(frozen=True)
class Ended:
    """How training ended."""

    state: TrainState
    stopped_by: str
    """What asked to stop before the last step; empty: all steps are done."""


def train(run: Run, signals: StopSignals) -> Ended:
    """Train from `run.start` to the last step of the config, or until asked to stop. Collective."""
    state, ckpt = run.start, run.config.ckpt
    stop_file = Path(ckpt.stop_file_path) if ckpt.stop_file_path else None
    guard = Guard(run.config, run.reporter, run.mesh.is_main)
    requests = Requests(signals, stop_file, run.mesh.is_main)
    with traced_steps(run.trace_folder, run.mesh.rank) as step_traced:
        went_back = True
        while went_back:
            run.reporter.start(state)
            run.reporter.event("start", **_start_facts(run, state))
            if state.step:  # the start before this one may have ended between its save and its evaluation
                _evaluate_where_due(run, state, anew=False)
            state, order, went_back = _train_from(state, run, requests, guard, step_traced)
        run.optimizer.wait_weights()
        stopped_by = order.why if order.stop and state.step < run.config.data.total_steps else ""
        if not stopped_by:
            with run.watchdog.inside("samples"):
                run.samples.show(state.step)
        run.reporter.event("stopped" if stopped_by else "done", step=state.step, why=stopped_by)
        return Ended(state, stopped_by)


def _train_from(
    state: TrainState, run: Run, requests: Requests, guard: Guard, step_traced: Callable[[], object]
) -> tuple[TrainState, Order, bool]:
    """Train until all steps are done or until asked to stop, or, True, until the run went back to an earlier state."""
    data, watchdog = run.config.data, run.watchdog
    order, owed = Order(), None
    with closing(run.data.batches(state.position, pin=run.mesh.device.type == "cuda")) as batches:
        while state.step < data.total_steps and not order.stop:
            watchdog.enter("data", state.step)
            batch = next(batches).to(run.mesh.device)
            watchdog.enter("training", state.step)
            outcome = train_step(
                run.stages,
                run.engine,
                run.optimizer,
                batch,
                state.step,
                run.mesh,
                run.reporter.metrics,
                run.reporter.fwd_bwd,
                requests.now,
                partial(watchdog.enter, "updating", state.step),
            )
            step_traced()
            state = state.after(batch, run.mesh.dp.size)
            last = state.step == data.total_steps
            if state.step % run.config.monitor.log_every == 0 or last:
                run.reporter.step_line(state, batch, outcome)
            order = requests.order(outcome, state.step)
            guard.note_spike(order, state.step - 2)  # told a step later
            guard.check_skips(order, state.step - 2)
            if guard.wants_rollback(order) and (before := _go_back(state, run, guard)):
                requests.undo(order)
                return before, order, True
            _compare_replicas(run, state)
            if order.stop or last:
                guard.check_weights(run.optimizer, state.step - 1)
            kind = due(run.config.ckpt, state.step, order, last, owed)
            # What left this update out may be in the weights already, and would push a good snapshot out.
            owed = kind if kind and not (order.stop or last) and outcome.skips_in_a_row.item() else None
            if kind and not owed:
                with watchdog.inside("saving"), run.reporter.aside():
                    run.saving.save(state, kind, must=order.stop or kind == "final")
            run.saving.check()
            if last or not order.stop:  # who asks to stop does not wait for it: the next start makes up for it
                _look_aside(run, state)
    guard.note_spike(requests.rest(), state.step - 1)
    return state, order, False


def _compare_replicas(run: Run, state: TrainState) -> None:
    """Before a save: a flipped bit is not to be in it."""
    every = run.config.guard.check_replicas_every
    if every and state.step % every == 0:
        with run.reporter.aside():
            run.optimizer.wait_weights()
            check_replicas(run.optimizer, run.mesh, state.step - 1)


def _look_aside(run: Run, state: TrainState) -> None:
    """Evaluation and samples that are due after a step. Its save comes first: it is not lost when they fail."""
    _evaluate_where_due(run, state)
    if run.samples.due(state.step):
        with run.watchdog.inside("samples"), run.reporter.aside():
            run.samples.show(state.step)


def _evaluate_where_due(run: Run, state: TrainState, anew: bool = True) -> None:
    """`anew` False: only where the figures are not in events.jsonl yet."""
    data, file = run.config.data, run.folder / "events.jsonl"
    if not run.valid or not (state.step % data.valid_every == 0 or state.step == data.total_steps):
        return
    if not anew and on_main(run.mesh, lambda: is_evaluated(file, state.step - 1)):
        return
    run.reporter.event("evaluating", step=state.step - 1)
    with run.watchdog.inside("evaluation"), run.reporter.aside():
        run.reporter.validation(state, evaluate(run.stages, run.engine, run.valid, run.mesh, run.watchdog.go_on))


def _go_back(state: TrainState, run: Run, guard: Guard) -> TrainState | None:
    """The state of a checkpoint from before the spike, but with the data that comes next now: what led to it is left
    out. None without one: training goes on as it is, as the update itself was left out.
    """
    spiked = state.step - 2
    with run.watchdog.inside("loading"), run.reporter.aside():
        restored = run.saving.go_back(state, spiked)
    if restored is None:
        if run.mesh.is_main:
            logger.warning(f"step {spiked}: there is no checkpoint from before the spike yet: nothing else is undone")
        return None
    guard.allow_rollback(spiked, restored.step)
    run.reporter.event("rollback", step=spiked, back_to=restored.step)
    run.reporter.reopen_sinks(restored.step)
    return restored


def _start_facts(run: Run, state: TrainState) -> dict[str, Any]:
    """What a reader of events.jsonl needs to know about the steps to come."""
    return {
        "step": state.step,
        "total_steps": run.config.data.total_steps,
        "log_every": run.config.monitor.log_every,
        "world_size": run.mesh.world.size,
        "folders": list(run.folder_tokens),
        "folder_tokens": run.folder_tokens,
        **({} if run.saving.restored is None else {"restarted_from": run.saving.restored}),
    }
