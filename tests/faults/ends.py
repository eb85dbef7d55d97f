"""train.py with something done at one place: DO="WHAT PLACE RANK;..." in the environment.

WHAT    TERM INT USR1 STOP KILL: this rank sends itself the signal      exit    sys.exit(0)
        full    the storage is full                                     broken  an error of the program
PLACE   log     the run folder is known        build   the model is built         forward  of a stage, in a step
        close   the last save is done          part    the ranks wait for each other, and end
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
from pathlib import Path
from typing import Any

from internlm_lite.errors import StorageError
from internlm_lite.train import job
from internlm_lite.train.checkpoints import Checkpoints
from internlm_lite.train.trainer import BatchTask

TRAIN = Path(__file__).resolve().parents[2] / "train.py"
PLACES = {
    "log": (job, "setup_logging"),
    "build": (job, "build_run"),
    "forward": (BatchTask, "forward"),
    "close": (Checkpoints, "close"),
    "part": (job, "stop_world"),
}


def do(what: str) -> None:
    if what == "exit":
        sys.exit(0)
    if what == "full":
        raise StorageError("the disk is full")
    if what == "broken":
        raise ValueError("this rank is broken")
    os.kill(os.getpid(), signal.Signals[f"SIG{what}"])


def install(what: str, place: str) -> None:
    owner, name = PLACES[place]
    whole = getattr(owner, name)

    def disturbed(*args: Any, **named: Any) -> Any:
        is_there = {"log": lambda: args[1] is not None, "close": lambda: named["wait"]}
        if is_there.get(place, lambda: True)():
            do(what)
        return whole(*args, **named)

    setattr(owner, name, disturbed)


if __name__ == "__main__":
    for one in filter(None, os.environ["DO"].split(";")):
        what, place, rank = one.split()
        if rank == os.environ["RANK"]:
            install(what, place)
    sys.argv[0] = str(TRAIN)
    runpy.run_path(str(TRAIN), run_name="__main__")
