"""Every section in a process of its own with a time-out, results written after each: gpu_check.json and gpu_check.txt.

Sections about correctness run four at a time, then those about speed one at a time, while the budget lasts.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from internlm_lite.apps.bench.gpu import correctness, kernels, step_speed, training_runs, two_ranks
from internlm_lite.apps.bench.gpu.measurement import Check, Measurement

SECTIONS: dict[str, Callable[..., None]] = {
    "env": correctness.environment,
    "gpu_tests": correctness.gpu_tests,
    "attention": correctness.attention,
    "syncs": correctness.host_waits,
    "train_curves": training_runs.train_curves,
    "resume": training_runs.resume,
    "worlds": two_ranks.worlds,
    "perf": step_speed.perf,
    "profile": step_speed.profile,
    "ops": kernels.operations,
    "attention_speed": kernels.attention_speed,
    "staging": kernels.staging,
}
PLAN = (
    Measurement("env", 60, alone=False),
    Measurement("gpu_tests", 150, alone=False),
    Measurement("train_curves", 150, alone=False),
    Measurement("attention", 100, alone=False),
    Measurement("worlds:nccl", 130, alone=False),
    Measurement("worlds:gloo", 130, alone=False),
    Measurement("resume", 150, alone=False),
    Measurement("syncs", 90, alone=False),
    Measurement("perf:1b:eager", 70, alone=True),
    Measurement("perf:1b:bare+compiled", 100, alone=True),
    Measurement("perf:1b:compile", 110, alone=True),
    Measurement("perf:7b:compile", 100, alone=True),
    Measurement("perf:7bhalf:compile", 80, alone=True),
    Measurement("attention_speed", 45, alone=True),
    Measurement("profile:1b:compile", 90, alone=True),
    Measurement("perf:7b:eager", 70, alone=True),
    Measurement("perf:7bhalf:eager", 50, alone=True),
    Measurement("ops", 50, alone=True),
    Measurement("profile:1b:eager", 70, alone=True),
    Measurement("staging", 70, alone=True),
    Measurement("perf:1b:bare", 60, alone=True),
    Measurement("perf:7b:bare+compiled", 100, alone=True),
    Measurement("perf:7b:recompute", 60, alone=True),
    Measurement("perf:1b:liger", 90, alone=True),
    Measurement("perf:1b:compile+cudnn", 90, alone=True),
)
_LEAST_SECONDS = 25.0
"""A section is not started with fewer seconds of the budget left, unless its time-out is shorter."""
_SMOKE_PATIENCE = 6
"""Factor of time-outs on the CPU."""


@dataclass
class Runner:
    """Runs sections and keeps their results."""

    repository: Path
    out: Path
    budget: float
    """Total seconds for all sections."""
    smoke: bool
    started: float = field(default_factory=time.monotonic)
    results: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def good(self) -> bool:
        return all(result["status"] in ("ok", "skipped") for result in self.results.values())

    def run(self, wanted: Sequence[Measurement]) -> None:
        with ThreadPoolExecutor(2 if self.smoke else 4) as pool:
            list(pool.map(self._run_section, [section for section in wanted if not section.alone]))
        for section in wanted:
            if section.alone:
                self._run_section(section)
        self._write()

    def _run_section(self, section: Measurement) -> None:
        left = self.budget - (time.monotonic() - self.started)
        if not self.smoke and left < min(section.seconds, _LEAST_SECONDS):
            self.results[section.name] = {
                "status": "skipped",
                "seconds": 0,
                "value": {"line": f"{left:.0f} s were left"},
            }
            return
        begin = time.monotonic()
        timeout = section.seconds * _SMOKE_PATIENCE if self.smoke else min(section.seconds, left)
        with tempfile.TemporaryDirectory(prefix="gpu_check_") as scratch:
            code = self._in_process(section.name, Path(scratch), timeout)
            result, log = Path(scratch, "result.json"), Path(scratch, "log")
            value = json.loads(result.read_text()) if result.exists() else {}
            tail = log.read_text(errors="replace")[-3000:].replace(str(self.repository), ".")
        status = "TIMEOUT" if code is None else "WRONG" if value.get("wrong") else "FAILED" if code else "ok"
        seconds = round(time.monotonic() - begin, 1)
        self.results[section.name] = {"status": status, "seconds": seconds, "value": value}
        if status != "ok":
            self.results[section.name]["tail"] = tail
        print(f"[{status:7s}] {section.name} {seconds} s {value.get('line', '')}", flush=True)
        self._write()

    def _in_process(self, name: str, scratch: Path, timeout: float) -> int | None:
        """Run a section; returns its exit code, None if it was killed after `timeout` seconds."""
        cache = Path(tempfile.gettempdir(), "gpu_check_cache")  # compiled kernels are shared by the sections
        environment = dict(
            os.environ,
            PYTHONUNBUFFERED="1",
            PYTHONFAULTHANDLER="1",
            PYTHONPATH=os.pathsep.join([str(self.repository), *sys.path[1:]]),
            TORCHINDUCTOR_CACHE_DIR=str(cache / "inductor"),
            TRITON_CACHE_DIR=str(cache / "triton"),
        )
        folders = [str(scratch), str(self.repository), str(self.out)]
        command = [sys.executable, __file__, name, *folders, "smoke" if self.smoke else "gpu"]
        with (scratch / "log").open("wb") as log:
            process = subprocess.Popen(
                command, stdout=log, stderr=log, env=environment, cwd=self.repository, start_new_session=True
            )
            try:
                return process.wait(timeout)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGABRT)  # faulthandler prints all stacks
                with suppress(subprocess.TimeoutExpired):
                    process.wait(3)
                return None
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # the section's own process group
                process.wait()

    def _write(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        temporary = self.out / "gpu_check.tmp"
        temporary.write_text(json.dumps(self.results, indent=1, default=str))
        os.replace(temporary, self.out / "gpu_check.json")
        (self.out / "gpu_check.txt").write_text(self.summary())

    def summary(self) -> str:
        """One line per section, its notes, and for failed sections the end of the log."""
        lines = []
        for name, result in self.results.items():
            value = result["value"]
            lines.append(
                f"[{result['status']:7s}] {name:34s} {result['seconds']:6.1f} s  {value.get('line', '')}"[:400]
            )
            lines += [f"            {note}"[:260] for note in value.get("notes", [])[:40]]
            lines += [f"            | {line}" for line in result.get("tail", "").strip().splitlines()[-12:]]
        return "\n".join(lines) + "\n"


def section_main(name: str, scratch: str, repository: str, out: str, mode: str) -> int:
    """Main function of a section's process; returns its exit code."""
    folders = (Path(scratch), Path(repository), Path(out))
    check = Check(Path(scratch, "result.json"), *folders, smoke=mode == "smoke")
    function, *arguments = name.split(":")
    try:
        SECTIONS[function](check, *arguments)
    except BaseException:
        check.tell(error=traceback.format_exc()[-3500:].replace(repository, "."))
        raise
    check.tell()
    return 0


if __name__ == "__main__":
    sys.exit(section_main(*sys.argv[1:]))
