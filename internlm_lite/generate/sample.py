"""Chooses the next token from logits: greedy, or sampled with temperature, top-k, top-p and min-p.

A row's token depends on its logits and its own random number alone, so neither on the other rows nor on their order.
Ranks of tp and pp have the same logits and the same numbers, so they draw the same token without communication.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from internlm_lite.errors import ConfigError
from internlm_lite.layers.tensor_parallel import accumulation_dtype


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters. Raises ConfigError when a value is out of range."""

    temperature: float = 1.0
    """Divides the logits; 0: greedy."""
    top_k: int = 0
    """Sample from the k most probable tokens; 0: from all."""
    top_p: float = 1.0
    """Sample from the fewest most probable tokens with at least this total probability (arXiv:1904.09751); 1: all."""
    min_p: float = 0.0
    """Sample from tokens at least this fraction as probable as the most probable one (arXiv:2407.01082); 0: all."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens that the sequence has (arXiv:1909.05858); 1: none."""

    def __post_init__(self) -> None:
        problems = []
        if not 0 <= self.temperature < math.inf:
            problems.append(f"temperature {self.temperature}: expected 0 (greedy) or more")
        if self.top_k < 0:
            problems.append(f"top_k {self.top_k}: expected 0 (all tokens) or more")
        if not 0 < self.top_p <= 1:
            problems.append(f"top_p {self.top_p}: expected more than 0, at most 1 (all tokens)")
        if not 0 <= self.min_p <= 1:
            problems.append(f"min_p {self.min_p}: expected 0 (all tokens) to 1 (only the most probable)")
        if not 0 < self.repetition_penalty < math.inf:
            problems.append(f"repetition_penalty {self.repetition_penalty}: expected more than 0; 1 is no penalty")
        if problems:
            raise ConfigError("\n".join(problems))


def random_numbers(generators: Sequence[torch.Generator]) -> torch.Tensor:
    """The next number of each row, [rows] float64 in [0, 1): drawn on the host, so the same on every device."""
    return torch.stack([torch.rand((), dtype=torch.float64, generator=generator) for generator in generators])


def draw(logits: torch.Tensor, sampling: Sampling, numbers: torch.Tensor) -> torch.Tensor:
    """Logits [B, vocab], numbers [B] float64 in [0, 1) -> tokens [B] int64; does not read the device."""
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    exact = logits.to(accumulation_dtype(logits.dtype)) / sampling.temperature
    probabilities = keep_top(exact.nan_to_num().softmax(dim=-1), sampling)  # samples of a diverged model end no run
    # In the order of the ids: where the sums of two tokens lie does not depend on which is a little more probable.
    sums = probabilities.double().cumsum(dim=-1)
    return torch.searchsorted(sums, numbers.unsqueeze(1) * sums[:, -1:], right=True).squeeze(1)


def keep_top(probabilities: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """[B, vocab] -> the same with what is not sampled from set to 0. The most probable token is always kept."""
    if sampling.top_k == 0 and sampling.top_p == 1 and sampling.min_p == 0:
        return probabilities
    ordered, tokens = probabilities.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(dim=-1) - ordered
    keep = (before < sampling.top_p) & (ordered >= sampling.min_p * ordered[:, :1])
    if sampling.top_k:
        keep[:, sampling.top_k :] = False
    keep[:, 0] = True
    return torch.zeros_like(probabilities).scatter(1, tokens, ordered * keep)


class SeenTokens:
    """Which tokens each sequence has, for the repetition penalty; without a penalty nothing is kept."""

    def __init__(self, prompts: Sequence[Sequence[int]], penalty: float, vocab_size: int, device: torch.device) -> None:
        self._penalty = penalty
        self._seen = torch.zeros(len(prompts) * (penalty != 1), vocab_size, dtype=torch.bool, device=device)
        for row, prompt in zip(self._seen, prompts, strict=False):
            row[torch.tensor(prompt, device=device)] = True

    def penalised(self, logits: torch.Tensor) -> torch.Tensor:
        if self._penalty == 1:
            return logits
        less = torch.where(logits > 0, logits / self._penalty, logits * self._penalty)
        return torch.where(self._seen, less, logits)

    def follow(self, parents: Sequence[int], tokens: Sequence[int]) -> None:
        """Sequence b continues sequence parents[b] with tokens[b]."""
        if self._penalty != 1:
            self._seen = self._seen[torch.tensor(parents, dtype=torch.int64, device=self._seen.device)]
            added = torch.tensor(tokens, dtype=torch.int64, device=self._seen.device)
            self._seen.scatter_(1, added.unsqueeze(1), True)
