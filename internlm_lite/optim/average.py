"""An exponential moving average of the master weights: sharded as they are, in their dtype, updated in place.

    average = d^n * average + (1 - d^n) * masters        d = min(decay, (1 + t) / (10 + t)), or decay without warm-up

after every `ema.every`-th step. n: updates applied since the last time, so a skipped step does not count; t: updates
that the average had taken in before. Both are counted on the device, and the host does not wait. On CUDA the arithmetic
runs on a stream of its own beside the next forward pass; what reads an average, or changes what it reads, calls `wait`.
(Decay that warms up: `num_updates` of TensorFlow's ExponentialMovingAverage.)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from internlm_lite.config.schema import EmaConfig
from internlm_lite.mesh import comm

ROLE = "ema"
"""Of the averages in checkpoints."""
_SWAP_ELEMENTS = 1 << 24
"""Elements exchanged at a time: bounds the memory that an exchange takes."""


class WeightAverage:
    """The averages of this rank's shards. Not collective; every rank of a shard computes the same."""

    def __init__(self, config: EmaConfig, masters: Sequence[torch.Tensor]) -> None:
        """`masters`: [shard_size] fp32 or fp64, updated in place by the optimizer."""
        self._config, self._masters = config, masters
        device = masters[0].device
        self.values = [master.detach().clone() for master in masters]
        """[shard_size] for each of `masters`, in its dtype."""
        self._taken_in = torch.zeros((), dtype=torch.int64, device=device)
        self._seen = torch.zeros((), dtype=torch.int64, device=device)
        """The optimizer's count of updates when the average was last updated."""
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._done: torch.cuda.Event | None = None
        self._rate: torch.Tensor | None = None
        """What the kernels under way read; its memory must not be given to others before `_done`."""

    @torch.no_grad()
    def restart(self, updates: torch.Tensor) -> None:
        """Begin at the present masters. `updates`: int64 device scalar, the optimizer's count of applied updates."""
        self.wait()
        torch._foreach_copy_(self.values, list(self._masters))
        self._taken_in.zero_()
        self._seen.copy_(updates)

    @torch.no_grad()
    def after_step(self, steps: int, updates: torch.Tensor) -> None:
        """Call after each step. `steps`: training steps done, with this one; `updates`: as in `restart`."""
        if steps % self._config.every:
            return
        self._rate = rate = self._next_rate(updates)
        if self._stream is None:
            self._move(rate)
            return
        self._stream.wait_stream(torch.cuda.current_stream(rate.device))
        with torch.cuda.stream(self._stream):
            self._move(rate)
            self._done = torch.cuda.Event()
            self._done.record()

    def _next_rate(self, updates: torch.Tensor) -> torch.Tensor:
        """1 - d^n, an fp64 device scalar; counts the n updates."""
        new, taken_in = updates - self._seen, self._taken_in.double()
        decay = torch.full_like(taken_in, self._config.decay)
        if self._config.warmup:
            decay = torch.minimum(decay, (1 + taken_in) / (10 + taken_in))
        self._seen.copy_(updates)
        self._taken_in += new
        return 1 - decay**new

    def _move(self, rate: torch.Tensor) -> None:
        rates = {dtype: rate.to(dtype) for dtype in {value.dtype for value in self.values}}
        for value, master in zip(self.values, self._masters, strict=True):
            value.lerp_(master, rates[value.dtype])

    def wait(self) -> None:
        """Work enqueued on the current stream from now on runs after the last update of the average."""
        if self._done is not None:
            torch.cuda.current_stream(self.values[0].device).wait_event(self._done)

    @contextmanager
    def exchanged(self, chosen: Iterable[int]) -> Iterator[None]:
        """While it lasts, the numbers of these shards and their averages have changed places."""
        pairs = [(self.values[index], self._masters[index]) for index in chosen]
        _exchange(pairs)
        try:
            yield
        finally:
            _exchange(pairs)

    def state_dict(self) -> dict[str, int]:
        """Counters, JSON-able. Reads the device."""
        return {"taken_in": int(comm.read(self._taken_in)), "seen": int(comm.read(self._seen))}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the counters, for `values` that were loaded."""
        self._taken_in.fill_(state["taken_in"])
        self._seen.fill_(state["seen"])


@torch.no_grad()
def _exchange(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Bit for bit, without a copy of a whole tensor."""
    for one, other in pairs:
        for a, b in zip(one.split(_SWAP_ELEMENTS), other.detach().split(_SWAP_ELEMENTS), strict=True):
            kept = a.clone()
            a.copy_(b)
            b.copy_(kept)
