"""train.py on the GPU: loss curves of every dtype against fp32 on the CPU, and bitwise equality after a resume."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from internlm_lite.apps.bench.gpu.measurement import Check

_CONFIG = """
JOB_NAME = "gpucheck"
DTYPE = "torch.float32"
FOLDER = ""
STOP = ""
STEPS = 12
HIDDEN = 256
SEQ = 256
LAYERS = 4
ckpt = dict(enable_save_ckpt=False)
if FOLDER:
    ckpt = dict(
        enable_save_ckpt=True,
        save_ckpt_folder=f"local:{FOLDER}",
        checkpoint_every=6,
        oss_snapshot_freq=0,
        stop_file_path=STOP or None,
    )
data = dict(seq_len=SEQ, micro_num=2, micro_bsz=2, total_steps=STEPS)
hybrid_zero_optimizer = dict(reduce_bucket_size=400000)
adam = dict(lr=1e-3)
lr_scheduler = dict(total_steps=STEPS, warmup_ratio=0.1, eta_min=1e-4)
grad_scaler = dict()
model = dict(
    num_attention_heads=4,
    num_kv_attention_heads=2,
    vocab_size=512,
    hidden_size=HIDDEN,
    num_layers=LAYERS,
    multiple_of=64,
    no_bias=True,
    dtype=DTYPE,
    compile=False,
)
parallel = dict(zero1=-1, tensor=1)
"""
_LIMITS = {"float32": 1e-4, "tf32": 5e-3, "bfloat16": 2e-2, "float16": 2e-2, "bfloat16, compiled": 2e-2}
"""Largest allowed relative error of the loss in 12 steps."""

Steps = dict[int, dict[str, Any]]
"""Rows of metrics.jsonl by step."""


@dataclass
class _Job:
    """A running process of train.py."""

    process: subprocess.Popen[bytes]
    folder: Path
    log: TextIO

    def steps(self, codes: Sequence[int] = (0,)) -> Steps:
        """Wait for the end; returns the steps. Raises RuntimeError if its exit code is not in `codes`."""
        code = self.process.wait()
        self.log.close()
        if code not in codes:
            tail = (self.folder / "log").read_text(errors="replace")[-1800:]
            raise RuntimeError(f"{self.folder.name}: exit code {code}\n{tail}")
        found: Steps = {}
        for file in sorted((self.folder / "run" / "gpucheck").glob("2*/metrics.jsonl")):
            rows = [json.loads(line) for line in file.read_text().splitlines()]
            found |= {row["step"]: row for row in rows}
        return found


def _start(check: Check, tag: str, *overrides: str, device: str | None = None) -> _Job:
    """Start train.py."""
    folder = check.scratch / tag
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "config.py"
    config.write_text(_CONFIG)
    device = device or ("cpu" if check.smoke else "cuda")
    argv = ["train.py", "--config", str(config), "--run-dir", str(folder / "run"), "--device", device, *overrides]
    if check.smoke:
        argv += ["HIDDEN=64", "SEQ=64", "LAYERS=2"]
    log = (folder / "log").open("a")
    command = [sys.executable, *argv]
    process = subprocess.Popen(command, cwd=check.repository, stdout=log, stderr=subprocess.STDOUT)
    return _Job(process, folder, log)


def train_curves(check: Check) -> None:
    """12 steps in every dtype, eager and compiled; compares the loss of each step with fp32 on the CPU."""
    reference = _start(check, "cpu", device="cpu")
    jobs = {}
    for kind in _LIMITS:
        dtype, _, compiled = kind.partition(", ")
        if not (compiled and check.smoke):  # the C++ compiler would take minutes
            jobs[kind] = _start(check, kind, f"DTYPE=torch.{dtype}", f"model.compile={bool(compiled)}")
    expected, worst = reference.steps(), {}
    for dtype, job in jobs.items():
        got = job.steps()
        last = got[max(got)]
        skipped = last["inf_nan_skip_batches"]
        # fp16 skips the first steps until the loss scale is low enough: its curve is shifted by their number.
        errors = [abs(got[step]["loss"] / expected[step]["loss"] - 1) for step in got]
        worst[dtype] = 0.0 if skipped else max(errors)
        check.note(
            f"{dtype}: worst relative error of the loss {worst[dtype]:.1e}, last loss {last['loss']:.4f} "
            f"(CPU {expected[max(expected)]['loss']:.4f}), {skipped} steps skipped, mfu {last['mfu']}"
        )
        if not worst[dtype] < _LIMITS[dtype] or last["loss"] != last["loss"]:
            check.wrong(f"{dtype}: loss off by {worst[dtype]:.1e}")
        if not check.smoke and (last["mfu"] is None or last["memory_bytes"] is None):
            check.wrong(f"{dtype}: mfu {last['mfu']}, memory {last['memory_bytes']} in the step line")
    check.tell(" ".join(f"{dtype} {error:.1e}" for dtype, error in worst.items()), worst=worst)


def resume(check: Check) -> None:
    """Bitwise equality of two runs, and of one stopped after step 6 and resumed; with and without determinism."""
    found = {"plain": _resumed(check, "plain"), "deterministic": _resumed(check, "deterministic", "deterministic=True")}
    for tag, result in found.items():
        check.note(f"{tag}: {result}")
    bad = found["deterministic"]
    if bad["differ_twice"] or bad["differ_resumed"]:
        check.wrong("steps differ between two runs, or after a resume, with deterministic algorithms")
    check.tell(json.dumps(found), found=found)


def _resumed(check: Check, tag: str, *more: str) -> dict[str, Any]:
    dtype = f"DTYPE=torch.{'float32' if check.smoke else 'bfloat16'}"
    stop = check.scratch / f"{tag}_stop"
    stop.write_text("6\n")

    def start(name: str, *overrides: str) -> _Job:
        return _start(check, name, dtype, f"FOLDER={check.scratch}/{name}/ck", *overrides, *more)

    straight, again = start(f"{tag}_a"), start(f"{tag}_b")
    before = start(f"{tag}_c", f"STOP={stop}").steps(codes=range(256))
    one, two = straight.steps(), again.steps()
    stop.write_text("0\n")
    after = start(f"{tag}_c", f"STOP={stop}").steps()
    after = {step: row for step, row in after.items() if row["seg"] == 1}  # lines of the second start
    if len(one) != 12 or sorted(after) != list(range(6, 12)):
        check.wrong(f"{tag}: {len(one)} steps without a stop, steps {sorted(after)} after the resume, expected 6 to 11")
    return {
        "steps": len(one),
        "resumed_steps": len(after),
        "differ_twice": _differing(one, two),
        "differ_resumed": _differing(one, {**before, **after}),
    }


def _differing(one: Steps, other: Steps) -> list[int]:
    values: Callable[[dict[str, Any]], tuple[float, float]] = lambda row: (row["loss"], row["grad_norm"])  # noqa: E731
    return [step for step in sorted(set(one) & set(other)) if values(one[step]) != values(other[step])]
