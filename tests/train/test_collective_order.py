"""The order in which ranks call collectives and send messages, in whole steps and an evaluation, by a log of each rank.

NCCL runs the operations of a communicator in the order of the calls, each until all its ranks are there; gloo forgives
another order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from internlm_lite.config.schema import Config
from internlm_lite.mesh import comm
from internlm_lite.mesh.mesh import Mesh, build_mesh, sizes_of
from internlm_lite.optim.replicas import check_replicas
from internlm_lite.train.own_rows import own_rows
from internlm_lite.train.trainer import BatchTask, Trainer
from tests.apps.planner.steps import random_batch, run_step, small
from tests.world import TIMEOUT, run_world

RANKS = 4
LAYOUTS: dict[str, dict[str, Any]] = {
    "zero in two replicas": {"parallel": {"zero1": 2}},
    "tp, sequence": {"parallel": {"tensor": 2, "sequence_parallel": True, "zero1": 1}},
    "tp, pp": {"parallel": {"tensor": 2, "pipeline": {"size": 2}}},
    "pp, interleaved, tied": {
        **{"parallel": {"pipeline": {"size": 2}}, "model": {"num_chunks": 2, "embed_split_hidden": True}},
    },
    "four stages": {"parallel": {"pipeline": {"size": 4}}},
    "four stages, interleaved": {"parallel": {"pipeline": {"size": 4}}, "model": {"num_layers": 8, "num_chunks": 2}},
}


class Call(NamedTuple):
    axis: str
    ranks: tuple[int, ...]
    what: str
    n_bytes: int
    peer: int | None
    """Global rank at the other end of a message; None: a collective."""
    batch: int
    """The number of the call, or of the batch that the message is of."""


class Log(TorchDispatchMode):
    """While active, `calls` grows by what this rank asks torch's backends to do."""

    def __init__(self, mesh: Mesh) -> None:
        super().__init__()
        groups = (mesh.world, mesh.dp, mesh.cp, mesh.tp, mesh.pp, mesh.zero, mesh.replica, mesh.ends)
        self._groups = {group.process_group.group_name: group for group in groups if group.process_group is not None}
        self.calls: list[Call] = []
        self._batch, self._in_batch = 0, False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            lists = [arg if isinstance(arg, list) else [arg] for arg in args]
            n_bytes = sum(x.nbytes for items in lists for x in items if isinstance(x, torch.Tensor))
            name = next(dist.ProcessGroup.unbox(arg) for arg in args if isinstance(arg, torch.ScriptObject)).group_name
            group, what = self._groups[name], func._opname
            self._batch += not self._in_batch
            peer = group.ranks[args[2]] if what in ("send", "recv_") else None
            self.calls.append(Call(group.name, group.ranks, what, n_bytes, peer, self._batch))
        return func(*args, **(kwargs or {}))

    def batched(self, messages: Any) -> Any:
        """In place of `dist.batch_isend_irecv`."""
        self._batch, self._in_batch = self._batch + 1, True
        try:
            return BATCH(messages)
        finally:
            self._in_batch = False


BATCH = dist.batch_isend_irecv


def logs_of_layouts(world: Mesh) -> dict[str, list[Call]]:
    logs = {}
    for name, sections in LAYOUTS.items():
        config = small(**sections)
        parallel = config.parallel
        sizes = sizes_of(RANKS, parallel.tensor, parallel.pipeline.size, parallel.zero1)
        mesh = build_mesh(sizes, world.rank, torch.device("cpu"), TIMEOUT)
        log = Log(mesh)
        dist.batch_isend_irecv = log.batched  # this process ends with the test
        with log:
            work(config, mesh)
        logs[name] = log.calls
    return logs


def work(config: Config, mesh: Mesh) -> None:
    trainer, batch = Trainer(config, mesh), random_batch(config, mesh)
    for step in range(2):
        run_step(trainer, batch, step)
    check_replicas(trainer.optimizer, mesh, 2)
    one, sum_ = torch.ones(()), torch.zeros((), dtype=torch.float64)
    with torch.no_grad():
        trainer.engine.evaluate(
            BatchTask(trainer.stages, batch, own_rows(config, mesh)(batch), one, trainer.metrics, sum_), batch.micro_num
        )
    trainer.metrics.collect()
    comm.broadcast_object("the end", mesh.world)


@pytest.fixture(scope="module")
def logs() -> list[dict[str, list[Call]]]:
    return run_world(logs_of_layouts, RANKS)


# Two communicators in use at once make no promise of progress: ranks that are in both must enter them in one order.
@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_ranks_call_the_collectives_of_their_groups_in_the_same_order(layout: str, logs: Any) -> None:
    for a, b in combinations(range(RANKS), 2):
        mine, theirs = (shared_collectives(logs[one][layout], other) for one, other in ((a, b), (b, a)))
        assert mine == theirs and mine, (a, b)


def shared_collectives(calls: Sequence[Call], other: int) -> list[tuple[Any, ...]]:
    return [call[:4] for call in calls if call.peer is None and other in call.ranks]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_one_rank_sends_the_other_receives_in_the_same_order(layout: str, logs: Any) -> None:
    for a in range(RANKS):
        for b in range(RANKS):
            sent = [call.n_bytes for call in logs[a][layout] if call.what == "send" and call.peer == b]
            received = [call.n_bytes for call in logs[b][layout] if call.what == "recv_" and call.peer == a]
            assert sent == received, (a, b)


# A send may last until it is received, so two ranks that each send first wait for ever, unless both are in one batch.
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if "stages" in name or "pp" in name])
def test_no_rank_waits_for_ever_where_messages_are_taken_in_order(layout: str, logs: Any) -> None:
    queues = [batches(log[layout]) for log in logs]
    assert any(queues) and finish(queues) == [[]] * RANKS


def batches(calls: Sequence[Call]) -> list[list[tuple[str, int]]]:
    """The messages of each batch, as (what, peer)."""
    found: dict[int, list[tuple[str, int]]] = {}
    for call in calls:
        if call.peer is not None:
            found.setdefault(call.batch, []).append((call.what, call.peer))
    return list(found.values())


@dataclass(frozen=True)
class Reverse:
    send: str = "recv_"
    recv_: str = "send"


def finish(queues: list[list[list[tuple[str, int]]]]) -> list[list[list[tuple[str, int]]]]:
    """What is left when no two messages of the batches at the heads of two ranks' queues belong together any more."""
    went_on = True
    while went_on:
        went_on = False
        for rank, queue in enumerate(queues):
            for what, peer in list(queue[0]) if queue else ():
                answer = (getattr(Reverse(), what), rank)
                if queues[peer] and answer in queues[peer][0]:
                    queue[0].remove((what, peer))
                    queues[peer][0].remove(answer)
                    went_on = True
        for queue in queues:
            if queue and not queue[0]:
                del queue[0]
    return queues


def test_the_model_of_ordered_messages_notices_two_ranks_that_send_first() -> None:
    first = [[("send", 1)], [("recv_", 1)]], [[("send", 0)], [("recv_", 0)]]
    assert finish([list(queue) for queue in first]) == list(first)
    assert finish([[[("send", 1), ("recv_", 1)]], [[("send", 0), ("recv_", 0)]]]) == [[], []]
