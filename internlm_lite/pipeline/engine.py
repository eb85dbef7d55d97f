"""Runs micro-batches through the stages of a pipeline, forward and backward, or forward only.

    one rank:       for every micro-batch: forward, loss, backward
    several ranks:  the schedules of torch.distributed.pipelining, through their public step()

Every rank of a pipeline has the whole batch of its data-parallel rank. Stages therefore send only the hidden state; the
schedule passes the micro-batch's number, with which a `Task` finds tokens and labels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import nn
from torch.distributed.pipelining import PipelineStage

from internlm_lite.mesh import comm
from internlm_lite.mesh.mesh import Group
from internlm_lite.pipeline.schedules import new_schedule
from internlm_lite.pipeline.split import stage_to_rank


class Task(Protocol):
    """The computation on one batch, by stage and micro-batch."""

    def forward(self, stage: int, micro: int, hidden: torch.Tensor | None) -> torch.Tensor:
        """Output of stage `stage` for micro-batch `micro`; `hidden`: output of the previous stage, None for stage 0."""

    def loss(self, micro: int, hidden: torch.Tensor) -> torch.Tensor:
        """The scalar to differentiate, from the output of the last stage."""


class Engine(Protocol):
    """Runs a `Task`. Collective over the pipeline's ranks."""

    def train(self, task: Task, micro_num: int) -> None:
        """Forward and backward of every micro-batch; accumulates gradients in the parameters."""

    def evaluate(self, task: Task, micro_num: int) -> None:
        """Forward and loss of every micro-batch. Call it under `torch.no_grad`."""

    def set_rows(self, rows: int) -> None:
        """Rows of the hidden state of the next task's micro-batches; not collective."""


class OneRank:
    """The engine without pipeline parallelism: one stage has the whole model."""

    def train(self, task: Task, micro_num: int) -> None:
        for micro in range(micro_num):
            task.loss(micro, task.forward(0, micro, None)).backward()

    def evaluate(self, task: Task, micro_num: int) -> None:
        for micro in range(micro_num):
            task.loss(micro, task.forward(0, micro, None))

    def set_rows(self, rows: int) -> None:
        pass


@dataclass(frozen=True)
class HiddenShape:
    """Shape, dtype and device of the hidden state that stages send."""

    rows: int
    """T, or T / tp with sequence parallelism."""
    hidden_size: int
    dtype: torch.dtype
    device: torch.device


class Pipeline:
    """The engine of a rank that holds the stages `stages` (number -> module) of a pipeline over `pp`."""

    def __init__(
        self,
        stages: Mapping[int, nn.Module],
        pp: Group,
        *,
        schedule: str,
        shape: HiddenShape,
        early_receive: bool,
        pop_deferred: Callable[[], Callable[[], None]],
    ) -> None:
        """`early_receive`: see `new_schedule`. `pop_deferred`: of `WeightGrads`, called after a stage's backward."""
        self._modules = {number: _StageModule(number, module) for number, module in stages.items()}
        self._pp, self._schedule, self._shape = pp, schedule, shape
        self._stage_ranks = stage_to_rank(pp.size, len(stages), schedule)
        self._early_receive = early_receive
        self._pop_deferred = pop_deferred
        self._built: tuple[tuple[int, int], Any] | None = None
        self._task: Task | None = None

    def train(self, task: Task, micro_num: int) -> None:
        schedule = self._schedule_for(micro_num)
        numbers = torch.arange(micro_num)  # the schedule splits it into micro-batches; on the host, to be read freely
        self._task = task
        for module in self._modules.values():
            module.task = task
        with peer_or_own_error(self._pp):
            schedule.step(target=numbers, return_outputs=False, micro=numbers)

    def evaluate(self, task: Task, micro_num: int) -> None:
        """One stage after the other, each for all micro-batches (torch's eval() does not support V-shaped schedules).

        Messages to a lower rank are sent after the stage is done, and received together: NCCL executes the messages of
        a group in order, so in a ring two ranks would each wait for the other to receive.
        """
        outputs: list[torch.Tensor] = []
        sent: list[tuple[comm.Work, torch.Tensor]] = []
        for stage in self._modules:
            inputs, outputs = self._inputs(stage, outputs, micro_num), []
            last = stage == len(self._stage_ranks) - 1
            for micro in range(micro_num):
                hidden = task.forward(stage, micro, next(inputs))
                if last:
                    task.loss(micro, hidden)
                elif stage + 1 in self._modules or self._stage_ranks[stage + 1] < self._pp.rank:
                    outputs.append(hidden)
                else:
                    sent.append((comm.send(hidden, self._pp, self._stage_ranks[stage + 1]), hidden))
            if not last and self._stage_ranks[stage + 1] < self._pp.rank:
                sent += [(comm.send(hidden, self._pp, self._stage_ranks[stage + 1]), hidden) for hidden in outputs]
        for work, _buffer in sent:
            work.wait()

    def set_rows(self, rows: int) -> None:
        self._shape = replace(self._shape, rows=rows)

    def _inputs(self, stage: int, outputs: list[torch.Tensor], micro_num: int) -> Iterator[torch.Tensor | None]:
        """The inputs of `stage`, one per micro-batch; `outputs`: those of this rank's previous stage."""
        if stage == 0:
            yield from [None] * micro_num
        elif stage - 1 in self._modules:
            yield from outputs
        elif self._stage_ranks[stage - 1] > self._pp.rank:
            yield from [self._received(stage) for _ in range(micro_num)]
        else:
            for _ in range(micro_num):
                yield self._received(stage)

    def _received(self, stage: int) -> torch.Tensor:
        shape = self._shape
        hidden = torch.empty(shape.rows, shape.hidden_size, dtype=shape.dtype, device=shape.device)
        comm.receive(hidden, self._pp, self._stage_ranks[stage - 1]).wait()
        return hidden

    def _schedule_for(self, micro_num: int) -> Any:
        """The schedule for `micro_num` micro-batches. The last one is cached, because it owns receive buffers."""
        size = micro_num, self._shape.rows
        if self._built is None or self._built[0] != size:
            stages = [self._stage(number) for number in self._modules]
            built = new_schedule(self._schedule, stages, micro_num, self._loss, early_receive=self._early_receive)
            self._built = size, built
        return self._built[1]

    def _stage(self, number: int) -> PipelineStage:
        shape, first = self._shape, number == 0
        hidden = torch.empty(shape.rows, shape.hidden_size, dtype=shape.dtype, device="meta", requires_grad=True)
        return PipelineStage(
            self._modules[number],
            number,
            len(self._stage_ranks),
            shape.device,
            # Given here, so that torch needs no extra run in the first step to infer the shapes.
            input_args=() if first else (hidden,),
            output_args=(hidden,),
            group=self._pp.process_group,
            dw_builder=self._pop_deferred if self._schedule == "zbv" else None,
        )

    def _loss(self, hidden: torch.Tensor, micro: torch.Tensor) -> torch.Tensor:
        assert self._task is not None, "set during a step"
        return self._task.loss(int(micro), hidden)


class _StageModule(nn.Module):
    """A stage as torch's pipelining calls it: with the previous stage's hidden state and the micro-batch's number."""

    task: Task

    def __init__(self, number: int, module: nn.Module) -> None:
        super().__init__()
        self.number = number
        self.module = module

    def forward(self, *hidden: torch.Tensor, micro: torch.Tensor) -> torch.Tensor:
        return self.task.forward(self.number, int(micro), hidden[0] if hidden else None)


@contextmanager
def peer_or_own_error(pp: Group) -> Iterator[None]:
    """Unwrap a stage's own error, which torch wraps in RuntimeErrors; raise PeerLostError for a transport error."""
    try:
        yield
    except RuntimeError as error:
        inner: BaseException = error
        while isinstance(inner, RuntimeError) and inner.__cause__ is not None:
            inner = inner.__cause__
        if inner is not error:
            raise inner from inner.__cause__
        with comm.transport_errors(pp):
            raise
