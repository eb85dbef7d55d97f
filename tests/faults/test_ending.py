"""How a rank leaves that fails, or is told that the job stands still: which rank the report names."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from internlm_lite.errors import CheckpointError, InternLMError, PeerLostError, StorageError
from internlm_lite.faults.failure import Failure, read_failures, record
from internlm_lite.faults.heartbeats import Limits, Verdict
from internlm_lite.faults.watchdog import Watchdog
from internlm_lite.mesh.consensus import _raise_same
from internlm_lite.runtime.dist_env import DistEnv
from internlm_lite.train.failure_handler import FailureHandler


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that were waited, in no time."""
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    return waits


def _handler(folder: Path, rank: int = 2) -> FailureHandler:
    handler = FailureHandler(DistEnv(rank, 3, rank, 3, f"node{rank}", "torch", "", "node0", 1))
    handler.watchdog = Watchdog(rank, 3, None, Limits(2.0, {}), lambda verdict: None, f"node{rank}")
    handler.write_to(folder)
    handler.watchdog.enter("training", 33)
    return handler


def _report(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "FAILED.json").read_text())
    return found


def test_inferred_record_of_silent_rank(tmp_path: Path, slept: list[float]) -> None:
    (tmp_path / "logs").mkdir()
    _handler(tmp_path)._report_hang(Verdict((0, 1), "they hang", "updating", 32, ("node0", "node1")))
    keys = ("rank", "host", "phase", "step", "kind", "follows", "guessed")
    report = _report(tmp_path)
    found = [tuple(each[key] for key in keys) for each in (report["cause"], *report["others"])]
    assert found == [
        (0, "node0", "updating", 32, "hang", False, True),
        (1, "node1", "updating", 32, "hang", False, True),
        (2, "node2", "training", 33, "hang", True, False),
    ]
    assert slept, "the others are to hear of it first"


def test_lost_peer_during_hang_keeps_exit_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ended(*_: object) -> None:
        raise InterruptedError("by the watchdog's thread")

    handler = _handler(tmp_path)
    monkeypatch.setattr("internlm_lite.train.failure_handler.leave_now", lambda *_: None)
    handler.hang(Verdict((1,), "it hangs", "training", 33, ("node1",)))
    monkeypatch.setattr(time, "sleep", ended)
    with pytest.raises(InterruptedError):
        handler.failed(PeerLostError("rank 1 is gone"))
    assert not list(tmp_path.iterdir())


def test_an_interrupted_rank_is_the_cause(tmp_path: Path) -> None:
    _handler(tmp_path).failed(KeyboardInterrupt())
    cause = _report(tmp_path)["cause"]
    assert [cause[key] for key in ("rank", "kind", "exit_code", "follows", "trace")] == [
        2,
        "interrupted",
        130,
        False,
        "",
    ]


@pytest.mark.parametrize(("culprit_ranks", "follows"), [((0,), True), ((1, 2), False), ((), False)])
def test_error_of_other_rank_is_secondary(
    culprit_ranks: tuple[int, ...], follows: bool, tmp_path: Path, slept: list[float]
) -> None:
    record(tmp_path, Failure(0, "node0", 33, "saving", "StorageError", "full", 6, follows=False))
    error = StorageError("full")
    error.culprit_ranks = culprit_ranks
    handler = _handler(tmp_path)
    handler.failed(error)
    assert {each.rank: each.follows for each in read_failures(tmp_path)} == {0: False, 2: follows}
    assert handler.reported_by_peer


def test_inferred_record_of_itself_is_ignored(tmp_path: Path, slept: list[float]) -> None:
    """It was frozen for a while, and rank 1 died meanwhile."""
    record(tmp_path, Failure(2, "node2", 33, "updating", "lost", "gone", 5, follows=False, guessed=True))
    handler = _handler(tmp_path)
    handler.watchdog.silent = lambda: [1]  # type: ignore[method-assign]
    handler.failed(PeerLostError("a peer is lost"))
    cause = _report(tmp_path)["cause"]
    assert (cause["rank"], cause["kind"], cause["host"], cause["step"]) == (1, "lost", "an unknown host", 33)


def test_agreed_error_names_culprits() -> None:
    stuck = (StorageError, "rank 1: it hangs")
    with pytest.raises(StorageError) as named:
        _raise_same([None, stuck, None], None)
    with pytest.raises(StorageError) as several:
        _raise_same([(StorageError, "full"), stuck, (CheckpointError, "full"), None], None)
    assert str(named.value) == "rank 1: it hangs" and str(several.value) == "rank 0, 2: full\nrank 1: it hangs"
    assert (named.value.culprit_ranks, several.value.culprit_ranks) == ((1,), (0, 1, 2))
    assert InternLMError("mine").culprit_ranks == ()
