"""Before the first step and after the last one: signals, errors, ranks that do not come or do not end."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from internlm_lite.data.data_loader import prefetch
from internlm_lite.errors import PeerLostError
from internlm_lite.mesh.mesh import single_process_mesh
from internlm_lite.pipeline.engine import peer_or_own_error
from tests import cli
from tests.faults.worlds import Job, arguments, events, report


class Disturbed(Job):
    """Ranks of tests/faults/ends.py."""

    def start(self, *ranks: int) -> None:
        for rank in ranks:
            environment = {**self._common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            self.ranks[rank] = cli.start(
                "tests/faults/ends.py", *self._more, folder=self.folder, log=self._log(rank), environment=environment
            )


def few(*more: str) -> tuple[str, ...]:
    """Of a run of six steps that saves at its end alone."""
    return arguments(*more, steps=6, every=0)


def test_signal_during_build(tmp_path: Path) -> None:
    with Disturbed(tmp_path, 2, *few(), DO="TERM build 1") as job:
        assert job.codes() == [3, 3], job.output()[-6000:]
    (stopped,) = events(tmp_path, "stopped")
    assert stopped["step"] <= 2 and "saved rescue checkpoint" in job.output(0)


def test_signals_after_last_save(tmp_path: Path) -> None:
    with Disturbed(tmp_path, 2, *few(), DO="USR1 close 0;INT close 1;TERM part 0;USR1 part 1") as job:
        job.finish()
    assert events(tmp_path, "done")


def test_stopped_rank_at_end_is_named(tmp_path: Path) -> None:
    with Disturbed(tmp_path, 2, *few("--timeout", "6"), DO="STOP part 1") as job:
        assert job.codes(0) == [4], job.output()[-6000:]
    cause = report(tmp_path)["cause"]
    assert (cause["rank"], cause["kind"]) == (1, "hang")


@pytest.mark.parametrize("what", ["KILL part", "full log"])
def test_rank_failing_at_start_or_end_is_the_cause(what: str, tmp_path: Path) -> None:
    with Disturbed(tmp_path, 2, *few(), DO=f"{what} 1") as job:
        assert job.codes() == ([5, -signal.SIGKILL] if what == "KILL part" else [5, 6]), job.output()[-6000:]
    cause = report(tmp_path)["cause"]
    assert (cause["rank"], cause["kind"]) == (1, "lost" if what == "KILL part" else "StorageError")


def test_exit_during_run_is_a_failure(tmp_path: Path) -> None:
    with Disturbed(tmp_path, 1, *few(), DO="exit forward 0") as job:
        assert job.codes() == [1], job.output()[-6000:]
    assert "something called sys.exit(0) in the middle of the run" in job.output()
    assert "Traceback" not in job.output()


def test_error_in_pipeline_stage_keeps_type(tmp_path: Path) -> None:
    two = ("parallel.pipeline.size=2", "model.num_layers=2", "data.micro_num=2")
    with Disturbed(tmp_path, 2, *few(*two), DO="broken forward 1") as job:
        assert job.codes() == [5, 1], job.output()[-6000:]
    cause = report(tmp_path)["cause"]
    assert (cause["rank"], cause["kind"], cause["message"]) == (1, "ValueError", "this rank is broken")
    assert "in forward" in cause["trace"] and "[Stage" not in cause["trace"]


def test_lost_peer_in_pipeline_stage_keeps_cause() -> None:
    lost, gloo = PeerLostError("lost a peer"), RuntimeError("gloo: connection closed")
    lost.__cause__ = gloo
    with pytest.raises(PeerLostError) as raised, peer_or_own_error(single_process_mesh().pp):
        raise RuntimeError("[Stage 1] failed to run forward") from lost
    assert raised.value is lost and lost.__cause__ is gloo


def test_ranks_with_different_configs(tmp_path: Path) -> None:
    with (
        Job(tmp_path / "one", 2, *few("adam.lr=1e-3"), ranks=[0]) as one,
        Job(tmp_path / "two", 2, *few("adam.lr=1e-2", "--resume", "none"), ranks=[1], MASTER_PORT=one.port) as two,
    ):
        assert one.codes() == two.codes() == [2], one.output() + two.output()
    assert "--resume is none, expected not given, adam.lr is 0.01, expected 0.001; ranks that" in one.output()
    (told,) = [line.partition("MeshError: ")[2] for line in one.output().splitlines() if "MeshError" in line]
    assert f"MeshError: {told}" in two.output() and "Traceback" not in one.output() + two.output()
    assert not list(tmp_path.glob("*/RUN"))


def test_ctrl_c_during_rendezvous(tmp_path: Path) -> None:
    with Job(tmp_path, 2, *arguments("--timeout", "600"), ranks=[0]) as job:
        until_there = timedelta(seconds=60)
        store = TCPStore("127.0.0.1", int(job.port), 2, False, until_there, wait_for_workers=False)
        PrefixStore("world2", store).wait(["round"], until_there)
        job.signal(0, signal.SIGINT)
        assert job.codes() == [130], job.output()
    assert "interrupted" in job.output() and "Traceback" not in job.output()


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """It is heard, also where tests were started in the background of a shell."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_with_blocked_data(ctrl_c: None) -> None:
    come = threading.Event()

    def hanging() -> Iterator[int]:
        yield 0
        yield int(come.wait(20))

    items = prefetch(hanging())
    assert next(items) == 0
    press = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        press.start()
        next(items)
    (waiting,) = (thread for thread in threading.enumerate() if thread.name.startswith("data"))
    come.set()
    waiting.join()
