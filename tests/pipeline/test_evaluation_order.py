"""Evaluation where a group takes its messages in order, as NCCL does: no two ranks wait for each other to receive."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from internlm_lite.mesh import comm
from internlm_lite.mesh.mesh import Mesh
from internlm_lite.pipeline.engine import HiddenShape, Pipeline
from internlm_lite.pipeline.split import rank_to_stages
from tests.world import run_world

WIDTH, PATIENCE_SECONDS = 4, 10


class InOrder:
    """Messages of this rank run one after another, each until the other side takes it; the host goes on meanwhile."""

    def __init__(self) -> None:
        self._before: threading.Event | None = None

    def wrap(self, real: Callable[..., comm.Work]) -> Callable[..., Any]:
        def call(tensor: torch.Tensor, group: Any, peer: int) -> Any:
            before, done = self._before, threading.Event()
            self._before = done

            def run() -> None:
                if before is None or before.wait(PATIENCE_SECONDS):
                    real(tensor, group, peer).wait()
                    if real is SEND:  # large messages end when they are received
                        comm_receive(torch.empty(1), group, peer)
                    else:
                        SEND(torch.ones(1), group, peer).wait()
                    done.set()

            threading.Thread(target=run, daemon=True).start()
            return Waiting(done)

        return call


class Waiting:
    def __init__(self, done: threading.Event) -> None:
        self._done = done

    def wait(self) -> None:
        assert self._done.wait(PATIENCE_SECONDS), "two ranks wait for each other"


SEND, RECEIVE = comm.send, comm.receive


def comm_receive(tensor: torch.Tensor, group: Any, peer: int) -> None:
    RECEIVE(tensor, group, peer).wait()


class AddStage:
    """Stage s adds s + 1 to micro-batch m, which begins as m."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def forward(self, stage: int, micro: int, hidden: torch.Tensor | None) -> torch.Tensor:
        return (torch.full((1, WIDTH), float(micro)) if hidden is None else hidden) + stage + 1

    def loss(self, micro: int, hidden: torch.Tensor) -> torch.Tensor:
        self.losses.append(hidden[0, 0].item() - micro)
        return hidden.sum()


def evaluate(mesh: Mesh, schedule: str, chunks: int, micro_num: int) -> list[float]:
    order = InOrder()
    comm.send, comm.receive = order.wrap(SEND), order.wrap(RECEIVE)
    size = mesh.pp.size
    numbers = rank_to_stages(mesh.pp.rank, size, chunks, schedule)
    shape = HiddenShape(1, WIDTH, torch.float32, mesh.device)
    engine = Pipeline(
        {number: nn.Identity() for number in numbers},
        mesh.pp,
        schedule=schedule,
        shape=shape,
        early_receive=True,
        pop_deferred=lambda: lambda: None,
    )
    task = AddStage()
    engine.evaluate(task, micro_num)
    return task.losses


@pytest.mark.parametrize(
    ("schedule", "size", "chunks", "micro_num"),
    [("1f1b", 2, 1, 3), ("interleaved", 2, 2, 4), ("interleaved", 3, 3, 6), ("interleaved", 2, 2, 1), ("zbv", 3, 2, 4)],
)
def test_no_two_ranks_wait_for_each_other(schedule: str, size: int, chunks: int, micro_num: int) -> None:
    results = run_world(evaluate, size, (schedule, chunks, micro_num), pipeline=size, timeout_seconds=60)
    (losses,) = [losses for losses in results if losses]
    stages = size * chunks
    assert losses == [stages * (stages + 1) / 2] * micro_num
