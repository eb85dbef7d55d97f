"""train.py with faults put into it: FAULTS="KIND RANK FIRST[-LAST] [SECONDS];..." in the environment, RANK maybe *.

    kill stop term hup   this rank sends itself the signal    exit   leaves with code 0, as if all were done
    raise            an error of the program                      memory   asks for more than RLIMIT_AS allows
    sleep stuck      for ever in its data, in a forward pass      full     fills the disk of the working directory
    spin             for ever, with the interpreter's lock held
    nan blow         gradient of one layer * nan, * 10000         flip     one bit of a weight, before they are compared
    ruin             a nan in the master weights      unlabelled     this rank's batch has no label
    eio              the next file is put into the save folder, and EIO reported; at the start, too
    nfs              from the start on, file servers lose the first answer to each link, and hints are unknown

Each comes before step FIRST is trained, or before every step of the range; FIRST of +5 counts from where this process
begins. Signals come SECONDS later. Once, if steps are trained again after a rollback, or each time with a ! after KIND.
Under torchrun each line of FAULTS is for one start; there are none after the last line.
"""

from __future__ import annotations

import errno
import math
import os
import re
import resource
import runpy
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from internlm_lite.batch import IGNORE
from internlm_lite.mesh.layout import Parameter
from internlm_lite.train import loop
from internlm_lite.train.trainer import Trainer

TRAIN = Path(__file__).resolve().parents[2] / "train.py"
_SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "term": signal.SIGTERM, "hup": signal.SIGHUP}
_FACTORS = {"nan": math.nan, "blow": 1e4}


@dataclass(frozen=True)
class Fault:
    kind: str
    steps: range
    relative: bool
    seconds: float
    again: bool

    def due(self, step: int, first: int) -> bool:
        return step - first * self.relative in self.steps

    @staticmethod
    def parse(text: str, rank: str) -> list[Fault]:
        """Those of `rank`."""
        found = []
        for one in filter(None, text.split(";")):
            kind, who, steps, *seconds = one.split()
            first, _, last = steps.partition("-")
            if who in ("*", rank):
                found.append(
                    Fault(
                        kind=kind.rstrip("!"),
                        steps=range(int(first), int(last or first) + 1),
                        relative=steps.startswith("+"),
                        seconds=float(seconds[0]) if seconds else 0.0,
                        again=kind.endswith("!"),
                    )
                )
        return found


def before(fault: Fault, trainer: Trainer) -> Callable[[], object]:
    """Do it; returns what undoes it after the step."""
    if number := _SIGNALS.get(fault.kind):
        if fault.seconds:
            threading.Timer(fault.seconds, os.kill, (os.getpid(), number)).start()
        else:
            os.kill(os.getpid(), number)
    elif fault.kind == "exit":
        os._exit(0)
    elif fault.kind == "stuck":
        for module in next(iter(trainer.stages.values())).modules():
            module.register_forward_pre_hook(lambda *_: time.sleep(3600))
    elif fault.kind == "spin":
        re.match("(a+)+$", "a" * 99 + "b")
    elif fault.kind == "raise":
        raise ValueError("this rank is broken")
    elif fault.kind == "memory":
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20),) * 2)
        torch.ones(1 << 28)
    elif fault.kind == "full":
        assert Path.cwd().is_mount(), "a small disk of its own is expected"
        with open("filler", "wb", buffering=0) as file:
            try:
                while file.write(b"x" * 4096):
                    pass
            except OSError:
                pass
    elif fault.kind == "eio":
        fail_once("rename", errno.EIO)
    elif fault.kind == "ruin":
        next(piece for piece in trainer.optimizer.pieces() if piece.role == "master").tensor.view(-1)[0] = math.nan
    elif factor := _FACTORS.get(fault.kind):
        weight = next(param for name, param in list(trainer.stages.values())[-1].named_parameters() if "norm" in name)
        reduce = weight.on_grad

        def spoil(param: Parameter) -> None:
            param.main_grad *= factor
            reduce(param)

        weight.on_grad = spoil
        return lambda: setattr(weight, "on_grad", reduce)
    return lambda: None


def fail_once(name: str, number: int, times: int = 1) -> None:
    """Let os.`name` do its work in the save folder, and report a failure all the same."""
    original = getattr(os, name)

    def failing(*arguments: Any, **named: Any) -> Any:
        nonlocal times
        found = original(*arguments, **named)
        if times and "saves" in str(arguments[-1]):
            times -= 1
            raise OSError(number, os.strerror(number))
        return found

    setattr(os, name, failing)


def unknown(*_: object) -> None:
    raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))


def install(faults: list[Fault]) -> None:
    train_step, check_replicas = Trainer.step, loop.check_replicas
    first, last = -1, -1

    def disturbed_step(trainer: Trainer, batch: Any, step: int, **hooks: Any) -> Any:
        nonlocal first, last
        first = step if first < 0 else first
        due = [fault for fault in faults if fault.due(step, first) and (step > last or fault.again)]
        last = max(last, step)
        undo = [before(fault, trainer) for fault in due]
        if any(fault.kind == "unlabelled" for fault in due):
            none = torch.full_like(batch.labels, IGNORE)
            batch = replace(batch, labels=none, stats=replace(batch.stats, num_labels=0))
        outcome = train_step(trainer, batch, step, **hooks)
        for each in undo:
            each()
        return outcome

    def check(optimizer: Any, mesh: Any, done: int) -> None:
        if any(fault.kind == "flip" and fault.due(done, first) for fault in faults):
            optimizer.buckets[0].weights.view(torch.int32)[3] ^= 1 << 12
        check_replicas(optimizer, mesh, done)

    Trainer.step, loop.check_replicas = disturbed_step, check
    for fault in faults:
        if fault.kind == "eio":
            fail_once("rename", errno.EIO)
        if fault.kind == "nfs":
            fail_once("link", errno.EEXIST, times=1000)
            os.posix_fadvise = unknown
        if fault.kind == "sleep":
            delay_batches(fault.steps.start)


def delay_batches(first: int) -> None:
    from internlm_lite.batch import Batch

    to, handed = Batch.to, [0]

    def slow(self: Batch, device: torch.device) -> Batch:
        handed[0] += 1
        if handed[0] == first + 1:
            time.sleep(3600)
        return to(self, device)

    Batch.to = slow


def faults_of_this_start() -> str:
    lines = os.environ.get("FAULTS", "").splitlines()
    start = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    return lines[start] if start < len(lines) else ""


if __name__ == "__main__":
    install(Fault.parse(faults_of_this_start(), os.environ.get("RANK", "0")))
    sys.argv[0] = str(TRAIN)
    runpy.run_path(str(TRAIN), run_name="__main__")
