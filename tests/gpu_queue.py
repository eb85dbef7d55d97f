"""The streams and events of a GPU, simulated on the CPU. What is enqueued runs when the host waits for it, and only
as much of it as that takes: so what is read too early, or overwritten while it is copied, has wrong values."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

POISON = 111
Work = Callable[[], object]


class Stream:
    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu
        self.queue: list[Work] = []

    def enqueue(self, work: Work) -> None:
        self.queue.append(work)

    def run_until(self, done: Callable[[], bool]) -> None:
        while not done():
            self.queue.pop(0)()

    def synchronize(self) -> None:
        self.run_until(lambda: not self.queue)

    def wait_event(self, event: Event) -> None:
        self.enqueue(event.synchronize)


class Event:
    """`elapsed_time` counts the works that ran in between, as milliseconds."""

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu
        self._stream = gpu.current
        self.ran_at: int | None = None

    def record(self) -> None:
        self._stream, self.ran_at = self._gpu.current, None
        self._stream.enqueue(self._pass)

    def _pass(self) -> None:
        self.ran_at = len(self._gpu.ran)

    def query(self) -> bool:
        return self.ran_at is not None

    def synchronize(self) -> None:
        self._stream.run_until(self.query)

    def elapsed_time(self, end: Event) -> float:
        assert self.ran_at is not None and end.ran_at is not None, "CUDA raises for an event that has not passed"
        return float(end.ran_at - self.ran_at)


class OnGpu(torch.Tensor):
    """A tensor of the simulated GPU, which `tolist` waits for."""

    is_cuda = True
    gpu: Gpu

    def tolist(self) -> Any:
        self.gpu.current.synchronize()
        return self.as_subclass(torch.Tensor).tolist()


class Gpu:
    """`main` is the stream that is current at first; `ran`: the names of what has run, in order."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.main = self.current = Stream(self)
        self.ran: list[str] = []
        self.streams: list[Stream] = [self.main]
        patch.setattr(torch.cuda, "Event", lambda **_: Event(self))
        patch.setattr(torch.cuda, "Stream", self._new_stream)
        patch.setattr(torch.cuda, "stream", self._switched_to)
        patch.setattr(torch.cuda, "current_stream", lambda *_: self.current)
        patch.setattr(OnGpu, "gpu", self, raising=False)
        empty, copy = torch.empty, torch.Tensor.copy_
        patch.setattr(torch, "empty", lambda *size, pin_memory=False, **options: empty(*size, **options))

        def copy_(to: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
            if not (non_blocking and isinstance(source, OnGpu)):
                return copy(to, source)
            to.fill_(POISON)
            self.launch("copy", lambda: copy(to, source.as_subclass(torch.Tensor)))
            return to

        patch.setattr(torch.Tensor, "copy_", copy_)

    def _new_stream(self, *_: object) -> Stream:
        self.streams.append(Stream(self))
        return self.streams[-1]

    @contextmanager
    def _switched_to(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before

    def launch(self, name: str, work: Work = lambda: None) -> None:
        """Enqueue `work` on the current stream."""
        self.current.enqueue(lambda: (self.ran.append(name), work()))

    def tensor(self, *values: float) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float64).as_subclass(OnGpu)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    return Gpu(monkeypatch)
