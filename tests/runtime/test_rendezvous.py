"""Ranks meet only with equal job fingerprints. Each rank is a thread; the store outlives them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta

import pytest
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from internlm_lite.errors import MeshError
from internlm_lite.runtime import rendezvous as meeting
from internlm_lite.runtime.dist_env import DistEnv
from internlm_lite.runtime.rendezvous import rendezvous

PATIENCE = timedelta(seconds=30)
SAYS = {"version": "0.1.0", "seed": "1024", "adam.lr": "0.001", "JOB_NAME": "'7b'", "data.weights": "None"}


@pytest.fixture
def agent() -> Iterator[TCPStore]:
    """A store like that of torchrun's agent."""
    yield TCPStore("127.0.0.1", 0, None, True, PATIENCE, wait_for_workers=False)


def start(agent: TCPStore, *said: Mapping[str, str], world: int | None = None) -> list[Future[Store]]:
    """Ranks with these fingerprints, the first of them rank 0."""
    size = world or len(said)
    pool = ThreadPoolExecutor(len(said))
    places = [
        DistEnv(rank, size, 0, 1, f"node{rank}", "torch", "", "127.0.0.1", agent.port, agent_store=True)
        for rank in range(len(said))
    ]
    ranks = [
        pool.submit(rendezvous, dist_env, PATIENCE, fingerprint)
        for dist_env, fingerprint in zip(places, said, strict=True)
    ]
    pool.shutdown(wait=False)
    return ranks


def problems(*ranks: Future[Store]) -> list[str]:
    errors = [rank.exception() for rank in ranks]
    assert all(isinstance(error, MeshError) for error in errors), errors
    return [str(error) for error in errors]


def test_equal_fingerprints_meet(agent: TCPStore) -> None:
    zero, one, two = start(agent, SAYS, dict(reversed(SAYS.items())), SAYS)
    zero.result().set("word", "here")
    assert one.result().get("word") == two.result().get("word") == b"here"


def test_difference_is_reported_on_all_ranks(agent: TCPStore) -> None:
    other = SAYS | {"adam.lr": "0.01", "data.weights.en": "0.5"}
    del other["data.weights"]
    told = problems(*start(agent, SAYS, SAYS, other, SAYS | {"seed": "1"}))
    assert set(told) == {
        "rank 2 on node2 was not started like rank 0 on node0: adam.lr is 0.01, expected 0.001, "
        "data.weights is not set, expected None, data.weights.en is 0.5, expected not set; ranks that differ from rank "
        "0: 2, 3; start all ranks with the same command line, files and version; if this is another job, give one of "
        "them another port"
    }
    assert len(told) == 4


def test_long_differences_are_shortened(agent: TCPStore) -> None:
    (told,) = set(problems(*start(agent, SAYS, dict.fromkeys(SAYS, "other"))))
    assert "'7b', ...; ranks" in told and "seed is other, expected 1024" in told and "data.weights" not in told


def test_differing_rank_that_ended_is_named(agent: TCPStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "_LAST_WORDS_SECONDS", 0.05)
    (zero,) = start(agent, SAYS, world=2)
    store = PrefixStore("world2", agent)
    name = store.get("round").decode()
    store.set(f"{name}/here/1", json.dumps({"id": "1", "host": "node1", "digest": "another"}))
    (told,) = problems(zero)
    assert "rank 1 on node1 was not started like rank 0 on node0: it ended before it said which" in told
