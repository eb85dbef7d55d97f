"""Parts of attention in the calls of a kernel that takes packed sequences, as those of flash-attn do.

parts with one mask, whose queries and keys do not overlap    one call, each part a sequence of it
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from internlm_lite.layers.context_parallel.ring_parts import Part, Range


@dataclass(frozen=True)
class KernelCall:
    """Sequences of one call."""

    queries: tuple[Range, ...]
    """Neighbours joined, as `keys`."""
    keys: tuple[Range, ...]
    cu_queries: torch.Tensor  # [sequences + 1] int32
    cu_keys: torch.Tensor
    longest: tuple[int, int]
    causal: bool
    left: int | None

    @property
    def window(self) -> tuple[int, int]:
        """(left, right) as flash-attn takes it, where -1 is no limit."""
        return -1 if self.left is None else self.left, 0 if self.causal else -1


def kernel_calls(parts: Sequence[Part], device: torch.device) -> tuple[KernelCall, ...]:
    """As few as greed finds. Does not read the device."""
    calls: list[list[Part]] = []
    for part in sorted(parts, key=lambda part: (part.queries, part.keys)):
        fits = (call for call in calls if _follows(call[-1], part))
        call = next(fits, None)
        if call is None:
            calls.append([part])
        else:
            call.append(part)
    return tuple(_call(call, device) for call in calls)


def _follows(last: Part, part: Part) -> bool:
    alike = (last.causal, last.left) == (part.causal, part.left)
    return alike and last.queries[1] <= part.queries[0] and last.keys[1] <= part.keys[0]


def _call(parts: list[Part], device: torch.device) -> KernelCall:
    queries, keys = [part.queries for part in parts], [part.keys for part in parts]
    counts = [[part.shape[side] for part in parts] for side in (0, 1)]
    of_queries, of_keys = (sequence_boundaries(one, device) for one in counts)
    longest = max(counts[0]), max(counts[1])
    return KernelCall(_joined(queries), _joined(keys), of_queries, of_keys, longest, parts[0].causal, parts[0].left)


def _joined(ranges: list[Range]) -> tuple[Range, ...]:
    found: list[Range] = []
    for start, stop in ranges:
        if found and found[-1][1] == start:
            found[-1] = found[-1][0], stop
        else:
            found.append((start, stop))
    return tuple(found)


def sequence_boundaries(lengths: Sequence[int], device: torch.device) -> torch.Tensor:
    """[n + 1] int32 on `device`, without a wait for it."""
    sums = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    if device.type != "cuda":
        return sums.to(device)
    pinned = torch.empty(sums.shape, dtype=sums.dtype, pin_memory=True)
    return torch.empty(sums.shape, dtype=sums.dtype, device=device).copy_(pinned.copy_(sums), non_blocking=True)
