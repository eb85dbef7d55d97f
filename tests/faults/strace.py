"""Kills a process at the n-th call of a system call by one of its threads: `strace -e inject=CALL:signal=KILL:when=n`;
or makes the call fail: `:error=EIO`.

Victims are forked from a process that has imported torch and never started a thread: about 60 ms a kill.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import traceback
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from internlm_lite.mesh.mesh import Mesh
from tests.faults.states import (
    assert_next_run_removes_abandoned_data,
    assert_next_run_saves_and_cleans,
    assert_nothing_else,
    loaded_step,
)
from tests.faults.victims import ALL_SCENARIOS, LEASED, NEW, OLD, TROUBLED, run_victim
from tests.installing import advice, install

REMOVING = {"unlink", "unlinkat", "rmdir"}
_CALL = re.compile(rb"^(\w+)\(")


@dataclass(frozen=True, order=True)
class Point:
    """Before the `number`-th `call` of the watched thread, from 1."""

    scenario: str
    call: str
    number: int


@dataclass(frozen=True)
class Outcome:
    point: Point
    killed: bool
    """False: the thread made fewer such calls than when they were counted, and the save ended."""
    step: int
    """Of the checkpoint found afterwards."""


def missing() -> str | None:
    """Why processes cannot be killed at a system call here, in one line; strace is installed where that is allowed."""
    if shutil.which("strace") is None:
        install("strace")
    if shutil.which("strace") is None:
        return f"needs strace: {advice('strace')}"
    tried = subprocess.run(["strace", "-o", "/dev/null", "true"], capture_output=True, text=True)
    return f"strace may not trace here: {tried.stderr.strip()}" if tried.returncode else None


def rehearse(scenario: str, room: Path) -> None:
    """Do here once what is done here after each fault.

    The first save of a process also imports an encoding and lets torch look at the CPU. Victims forked before it make
    those calls and victims forked after it do not, so that the calls counted by one would be missing from the others.
    """
    folder = prepare(scenario, room)
    assert_next_run_saves_and_cleans(folder, NEW + 1)


def count_calls(mesh: Mesh, scenario: str, room: Path) -> dict[str, int]:
    """How often the watched thread makes each system call in a save that nothing disturbs."""
    rehearse(scenario, room)
    log, folder = room / "trace", prepare(scenario, room)
    status = attacked(scenario, folder, ["-o", str(log)])
    assert status == 0, f"{scenario}: the victim ended with {status}"
    loaded_step(folder)
    calls = Counter(found[1].decode() for line in log.read_bytes().splitlines() if (found := _CALL.match(line)))
    return dict(sorted(calls.items()))


def kill_at(mesh: Mesh, points: list[Point], room: Path) -> list[Outcome]:
    """Kill at every point, and look: the old checkpoint or the new one, whole, and the next run cleans up."""
    outcomes = []
    for scenario in {point.scenario for point in points}:
        rehearse(scenario, room)
    for index, point in enumerate(points):
        folder = prepare(point.scenario, room)
        existed, data = {name.name for name in _commits(folder)}, set(os.listdir(folder / "data"))
        inject = f"inject={point.call}:signal=KILL:when={point.number}"
        status = attacked(point.scenario, folder, ["-o", "/dev/null", "-e", f"trace={point.call}", "-e", inject])
        assert status in (0, -signal.SIGKILL), f"{point}: the victim ended with {status}"
        try:
            step = loaded_step(folder)
            committed = any(not path.name.startswith(".") and path.name not in existed for path in _commits(folder))
            assert step == (NEW if committed else OLD), f"step {step}, commit there: {committed}"
            assert status == -signal.SIGKILL or step == NEW, "nothing was killed"
            if point.scenario in LEASED:
                assert_next_run_removes_abandoned_data(folder, data)
            assert_next_run_saves_and_cleans(folder, NEW + 1)
            assert os.listdir(room / "staging") == []
        except Exception as error:
            raise AssertionError(f"{point} ({index} points before were good): {error}") from error
        outcomes.append(Outcome(point, status != 0, step))
    return outcomes


def fail_at(mesh: Mesh, points: list[Point], errors: dict[str, str], room: Path) -> list[str]:
    """Let one call fail: at most one save does, with an error of ours, and the ones after it leave nothing of it."""
    said = []
    for scenario in {point.scenario for point in points}:
        rehearse(scenario, room)
    for index, point in enumerate(points):
        folder = prepare(point.scenario, room)
        (room / "said").unlink(missing_ok=True)
        inject = f"inject={point.call}:error={errors[point.call]}:when={point.number}"
        try:
            status = attacked(point.scenario, folder, ["-o", "/dev/null", "-e", f"trace={point.call}", "-e", inject])
            assert status == 0, f"the victim ended with {status}"
            said.append(_check_trouble(point, folder, (room / "said").read_text().splitlines()))
        except Exception as error:
            raise AssertionError(f"{point} ({index} points before were good): {error}") from error
    return said


def _check_trouble(point: Point, folder: Path, lines: list[str]) -> str:
    """The error of the save that failed; empty if none did."""
    ended = dict(line.split(" ", 1) for line in lines)
    assert [int(step) for step in ended] == list(TROUBLED)
    saved = [int(step) for step, error in ended.items() if error == "saved"]
    assert len(saved) >= len(TROUBLED) - 1, ended
    if saved[-1] == TROUBLED[-1]:
        assert loaded_step(folder) == saved[-1]
        if point.call not in REMOVING:
            assert_nothing_else(folder)
    assert_next_run_saves_and_cleans(folder, TROUBLED[-1] + 1)
    return next((error for error in ended.values() if error != "saved"), "")


def _commits(folder: Path) -> list[Path]:
    return list((folder / "commits").iterdir())


def prepare(scenario: str, room: Path) -> Path:
    """A folder as it is before the save, copied from one that was made once."""
    before = ALL_SCENARIOS[scenario].before
    template, folder = room / f"before {before.__name__}", room / "save"
    (room / "staging").mkdir(parents=True, exist_ok=True)
    if not template.exists():
        before(template)
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(template, folder)
    return folder


def attacked(scenario: str, folder: Path, options: list[str]) -> int:
    """Fork a victim, watch the thread it names with strace, let it save. Its exit code, or minus the signal."""
    told, tell = os.pipe()
    released, release = os.pipe()
    victim = os.fork()
    if victim == 0:
        code = 1
        try:
            os.close(release)
            run_victim(scenario, folder, tell, released)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(tell)
    os.close(released)
    try:
        with os.fdopen(told) as answers:
            thread = answers.readline().strip()
        assert thread, "the victim ended before its save"
        tracer = subprocess.Popen(["strace", *options, "-p", thread], stderr=subprocess.PIPE)
        assert tracer.stderr is not None
        said = tracer.stderr.readline()
        assert b"attached" in said, said
        os.write(release, b"1")
        tracer.stderr.read()
        tracer.wait()
        tracer.stderr.close()
    except BaseException:
        os.kill(victim, signal.SIGKILL)
        raise
    finally:
        os.close(release)
        status = os.waitstatus_to_exitcode(os.waitpid(victim, 0)[1])
    return status
