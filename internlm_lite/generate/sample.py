"""Chooses the next token from logits: greedy, or sampled with temperature, top-k and top-p.

Ranks of tp and pp have the same logits and the same seed, so they draw the same token without communication.
"""

from __future__ import annotations

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
    seed: int = 0

    def __post_init__(self) -> None:
        problems = []
        if self.temperature < 0:
            problems.append(f"temperature {self.temperature}: expected 0 (greedy) or more")
        if self.top_k < 0:
            problems.append(f"top_k {self.top_k}: expected 0 (all tokens) or more")
        if not 0 < self.top_p <= 1:
            problems.append(f"top_p {self.top_p}: expected more than 0, at most 1 (all tokens)")
        if problems:
            raise ConfigError("\n".join(problems))


class Sampler:
    """Draws tokens; a sequence of calls is determined by the seed and the logits."""

    def __init__(self, sampling: Sampling, device: torch.device) -> None:
        self.sampling = sampling
        self._generator = torch.Generator(device=device).manual_seed(sampling.seed)

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits [B, vocab] -> tokens [B] int64; does not read the device."""
        if self.sampling.temperature == 0:
            return logits.argmax(dim=-1)
        exact = logits.to(accumulation_dtype(logits.dtype)) / self.sampling.temperature
        exact = exact.nan_to_num()  # multinomial raises on NaN; samples of a diverged model must not end the run
        ordered, tokens = exact.sort(dim=-1, descending=True, stable=True)
        probabilities = keep_top(ordered.softmax(dim=-1), self.sampling.top_k, self.sampling.top_p)
        choice = torch.multinomial(probabilities, 1, generator=self._generator)
        return tokens.gather(1, choice).squeeze(1)


def keep_top(probabilities: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    """[B, vocab] in descending order -> same, the tail set to 0, not renormalised. The first token is always kept."""
    before = probabilities.cumsum(dim=-1) - probabilities
    keep = before < top_p
    if top_k:
        keep[:, top_k:] = False
    keep[:, 0] = True
    return probabilities * keep
