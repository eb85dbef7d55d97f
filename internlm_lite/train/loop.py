"""The main loop."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from internlm_lite.faults.signals import StopSignals
from internlm_lite.train.build import Run
from internlm_lite.train.evaluate import evaluate
from internlm_lite.train.guard import check_updates
from internlm_lite.train.profiling import traced_steps
from internlm_lite.train.requests import Order, Requests
from internlm_lite.train.saving import due
from internlm_lite.train.state import TrainState
from internlm_lite.train.step import train_step


@dataclass(frozen=True)
class Ended:
    """How training ended."""

    state: TrainState
    stopped_by: str
    """What asked to stop before the last step; empty: all steps are done."""


def train(run: Run) -> Ended:
    """Train from `run.start` to the last step of the config, or until asked to stop. Collective."""
    state, data, ckpt = run.start, run.config.data, run.config.ckpt
    order, kind = Order(), None
    on_gpu = run.mesh.device.type == "cuda"
    run.reporter.start(state)
    run.reporter.event("start", **_start_facts(run))
    with (
        StopSignals() as signals,
        closing(run.data.batches(state.position, pin=on_gpu)) as batches,
        traced_steps(run.trace_folder, run.mesh.rank) as step_traced,
    ):
        requests = Requests(signals, Path(ckpt.stop_file_path) if ckpt.stop_file_path else None, run.mesh.is_main)
        while state.step < data.total_steps and not order.stop:
            batch = next(batches).to(run.mesh.device)
            outcome = train_step(
                run.stages,
                run.engine,
                run.optimizer,
                batch,
                state.step,
                run.mesh,
                run.reporter.metrics,
                run.reporter.fwd_bwd,
                requests.now(),
            )
            step_traced()
            state = state.after(batch, run.mesh.dp.size)
            last = state.step == data.total_steps
            if state.step % run.config.monitor.log_every == 0 or last:
                skips_in_a_row = run.reporter.step_line(state, batch, outcome)
                check_updates(skips_in_a_row, run.config.model, state)
            if run.valid and (state.step % data.valid_every == 0 or last):
                run.reporter.event("evaluating", step=state.step - 1)
                with run.reporter.aside():
                    run.reporter.validation(state, evaluate(run.stages, run.engine, run.valid, run.mesh))
            if run.samples.due(state.step):
                with run.reporter.aside():
                    run.samples.show(state.step)
            order = requests.order(outcome.requests, state.step)
            if kind := due(ckpt, state.step, order, last):
                with run.reporter.aside():
                    run.saving.save(state, kind, must=order.stop or kind == "final")
            run.saving.check()
    run.optimizer.wait_weights()
    stopped_by = order.why if order.stop and state.step < data.total_steps else ""
    if not stopped_by:
        run.samples.show(state.step)
    run.reporter.event("stopped" if stopped_by else "done", step=state.step, why=stopped_by)
    return Ended(state, stopped_by)


def _start_facts(run: Run) -> dict[str, Any]:
    """What a reader of events.jsonl needs to know about the steps to come."""
    return {
        "step": run.start.step,
        "total_steps": run.config.data.total_steps,
        "log_every": run.config.monitor.log_every,
        "world_size": run.mesh.world.size,
        "folders": list(run.folder_tokens),
        "folder_tokens": run.folder_tokens,
        **({} if run.saving.restored is None else {"restarted_from": run.saving.restored}),
    }
