"""Sources of an encoder-decoder: encoded once, and each layer's keys and values of them kept for all tokens to come.

    first pass    the sources are a packed row beside that of the prompts; each layer stores its keys and values
    later passes  a memory without rows: each layer attends to what it stored

Sequences of one source, such as beams, share one copy, as several queries to the same keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

import torch
from torch.nn.utils.rnn import pad_sequence

from internlm_lite.generate.cache import attend_where
from internlm_lite.layers.cross_attention import Memory
from internlm_lite.layers.flash import Attend, AttentionBackend, Borders, packed, packed_across
from internlm_lite.layers.scores import AttentionRule
from internlm_lite.models.decoder import SourceRow
from internlm_lite.models.stages import WholeModel


class SourceCache:
    """Of one source [at least one token] per sequence. A rank stores only the layers and heads that it computes."""

    def __init__(self, model: WholeModel, sources: Sequence[Sequence[int]]) -> None:
        stage, self._device = model.any_stage, model.device
        self._backend, self._width, self._dtype = stage.backend, stage.config.hidden_size, stage.tp_ctx.dtype
        self._to_encode, self._longest = sources, max(map(len, sources))
        self._lengths = torch.tensor([len(source) for source in sources], device=self._device)
        self._owners = list(range(len(sources)))  # the source of each sequence
        self._stores: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # by layer, [sources, longest, Hkv, D]

    def side(self, counts: Sequence[int]) -> SourceRow | Memory:
        """What a forward pass over counts[b] tokens of each sequence b reads of its source."""
        if self._to_encode:
            row, self._to_encode = self._row(self._to_encode, counts), ()
            return row
        return Memory(torch.empty(0, self._width, dtype=self._dtype, device=self._device), self._across(counts))

    def select(self, parents: Sequence[int]) -> None:
        """Sequence b becomes a copy of sequence parents[b]; sources without a sequence go."""
        owners = [self._owners[parent] for parent in parents]
        kept = sorted(set(owners))
        self._owners = [kept.index(owner) for owner in owners]
        if len(kept) < len(self._lengths):
            index = torch.tensor(kept, device=self._device)
            self._stores = {layer: (k[index], v[index]) for layer, (k, v) in self._stores.items()}
            self._lengths = self._lengths[index]

    def _row(self, sources: Sequence[Sequence[int]], counts: Sequence[int]) -> SourceRow:
        row, lengths = source_row(self._backend, sources, counts, self._device), list(map(len, sources))

        def attend_and_store(rule: AttentionRule, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            padded = (pad_sequence(x.split(lengths), batch_first=True) for x in (k, v))
            self._stores[rule.layer] = next(padded), next(padded)
            return row.attend_across(rule, q, k, v)

        return replace(row, attend_across=attend_and_store)

    def _across(self, counts: Sequence[int]) -> Attend:
        """Attention to what is stored: all queries of a source at once."""
        used, slots = [0] * len(self._lengths), list[tuple[int, int]]()  # (source, number among its queries)
        for owner, count in zip(self._owners, counts, strict=True):
            slots += [(owner, used[owner] + i) for i in range(count)]
            used[owner] += count
        size = len(used), max(used)
        places = [owner * size[1] + i for owner, i in slots]
        at = None if places == list(range(size[0] * size[1])) else torch.tensor(places, device=self._device)
        seen = torch.arange(self._longest, device=self._device) < self._lengths[:, None]

        def attend_to_stored(rule: AttentionRule, q: torch.Tensor, _k: torch.Tensor, _v: torch.Tensor) -> torch.Tensor:
            k, v = (x.transpose(1, 2) for x in self._stores[rule.layer])
            if at is not None:  # some sources have fewer queries than others
                q = q.new_zeros(size[0] * size[1], *q.shape[1:]).index_copy(0, at, q)
            mixed = attend_where(rule, q.unflatten(0, size).transpose(1, 2), k, v, seen[:, None, None])
            mixed = mixed.transpose(1, 2).flatten(0, 1)
            return mixed if at is None else mixed[at]

        return attend_to_stored


def source_row(
    backend: AttentionBackend, sources: Sequence[Sequence[int]], counts: Sequence[int], device: torch.device
) -> SourceRow:
    """The row of `sources`, whose targets are documents of counts[i] tokens in a row beside it; none is empty."""
    queries, keys = (_borders(lengths, device) for lengths in (counts, list(map(len, sources))))
    return SourceRow(
        torch.tensor([token for source in sources for token in source], device=device),
        torch.cat([torch.arange(len(source), device=device) for source in sources]),
        packed(backend, keys.cu_seqlens, keys.cu_seqlens_host, keys.max_seqlen),
        packed_across(backend, queries, keys),
    )


def _borders(lengths: Sequence[int], device: torch.device) -> Borders:
    ends = (0, *accumulate(lengths))
    return Borders(torch.tensor(ends, dtype=torch.int32, device=device), ends, max(lengths))
