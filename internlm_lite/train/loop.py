"""The main loop."""

from __future__ import annotations

from contextlib import closing

from internlm_lite.train.build import Run
from internlm_lite.train.evaluate import evaluate
from internlm_lite.train.guard import check_updates
from internlm_lite.train.profiling import traced_steps
from internlm_lite.train.saving import due
from internlm_lite.train.state import TrainState
from internlm_lite.train.step import train_step


def train(run: Run) -> TrainState:
    """Train from `run.start` to the last step of the config; the final state. Collective."""
    state, data = run.start, run.config.data
    kind = None
    on_gpu = run.mesh.device.type == "cuda"
    run.reporter.start(state)
    run.reporter.event("start", step=state.step)
    with (
        closing(run.data.batches(state.position, pin=on_gpu)) as batches,
        traced_steps(run.trace_folder, run.mesh.rank) as step_traced,
    ):
        while state.step < data.total_steps:
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
            )
            step_traced()
            state = state.after(batch, run.mesh.dp.size)
            if state.step % run.config.monitor.log_every == 0 or state.step == data.total_steps:
                skips_in_a_row = run.reporter.step_line(state, batch, outcome)
                check_updates(skips_in_a_row, run.config.model, state)
            if run.valid and state.step % data.valid_every == 0:
                with run.reporter.aside():
                    run.reporter.validation(state, evaluate(run.stages, run.engine, run.valid, run.mesh))
            if kind := due(run.config.ckpt, state.step):
                with run.reporter.aside():
                    run.saving.save(state, kind)
                run.reporter.event("checkpoint", step=state.step, saved=kind)
    run.optimizer.wait_weights()
    if run.config.ckpt.enable_save_ckpt and state.step > run.start.step and kind != "milestone":
        run.saving.save(state, "final")  # also after a snapshot, which would not be kept
    run.reporter.event("done", step=state.step)
    return state
