"""Beam search: the most probable continuation that `beams` sequences at a time can find.

    score = sum of the log-probabilities / length ** length_penalty      length: generated tokens, a stop token included

A step looks at the (1 + stop tokens) * beams best candidates, so that `beams` of them go on however many end. One that
ends counts if it is among the first `beams`. The rules are those of transformers with early_stopping="never": the
search ends when no sequence that goes on can still come before the `beams` best that have ended.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from internlm_lite.errors import ConfigError
from internlm_lite.generate.request import Continuation, Growing
from internlm_lite.generate.sample import SeenTokens
from internlm_lite.layers.tensor_parallel import accumulation_dtype
from internlm_lite.mesh import comm


@dataclass(frozen=True)
class Beams:
    """Parameters of beam search. Raises ConfigError when a value is out of range."""

    beams: int
    length_penalty: float = 1.0
    """More than 0 favours long continuations, less than 0 short ones; 0: by their probability alone."""
    repetition_penalty: float = 1.0
    """As in `Sampling`; probabilities are those of the changed logits."""

    def __post_init__(self) -> None:
        problems = []
        if self.beams < 1:
            problems.append(f"beams {self.beams}: expected at least 1")
        if not -10 <= self.length_penalty <= 10:
            problems.append(f"length_penalty {self.length_penalty}: expected a number from -10 to 10")
        if not 0 < self.repetition_penalty < math.inf:
            problems.append(f"repetition_penalty {self.repetition_penalty}: expected more than 0; 1 is no penalty")
        if problems:
            raise ConfigError("\n".join(problems))


class BeamSearch:
    """The search of several prompts; a prompt that is decided leaves the batch."""

    def __init__(self, rows: Sequence[Growing], how: Beams, seen: SeenTokens) -> None:
        self._prompts = [_Hypotheses(row, how) for row in rows]
        self._seen = seen

    def choose(self, logits: torch.Tensor) -> tuple[list[int], list[int]]:
        running = [prompt for prompt in self._prompts if prompt.live]
        sizes = [len(prompt.live) for prompt in running]
        exact = self._seen.penalised(logits.to(accumulation_dtype(logits.dtype))).nan_to_num()
        totals = torch.tensor([total for prompt in running for total, _ in prompt.live], dtype=torch.float64)
        sums = exact.log_softmax(dim=-1) + totals.to(exact).unsqueeze(1)
        best = [
            part.flatten().topk(min(part.numel(), prompt.candidates))
            for part, prompt in zip(sums.split(sizes), running, strict=True)
        ]
        values = comm.read(torch.cat([top.values for top in best]))
        indices = comm.read(torch.cat([top.indices for top in best]))
        parents, tokens, start = list[int](), list[int](), 0
        for prompt, top, offset in zip(running, best, accumulate(sizes, initial=0), strict=False):
            stop = start + len(top.values)
            chosen = prompt.step(values[start:stop], [divmod(at, logits.shape[1]) for at in indices[start:stop]])
            parents += [offset + parent for parent, _ in chosen]
            tokens += [token for _, token in chosen]
            start = stop
        self._seen.follow(parents, tokens)
        return parents, tokens

    def results(self) -> list[Continuation]:
        """The best continuation of each prompt."""
        return [row.result(score) for score, row in (prompt.ended[0] for prompt in self._prompts)]


class _Hypotheses:
    """The sequences of one prompt: those that go on, the most probable first, and the best that have ended."""

    def __init__(self, row: Growing, how: Beams) -> None:
        self.live: list[tuple[float, Growing]] = [(0.0, row)]
        self.ended: list[tuple[float, Growing]] = []
        self.candidates = (1 + len(row.request.stop_ids)) * how.beams
        self._how, self._longest = how, row.request.max_new_tokens

    def step(self, totals: Sequence[float], choices: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        """Candidates (parent, token), the most probable first -> those that go on."""
        live: list[tuple[float, Growing]] = []
        chosen: list[tuple[int, int]] = []
        for rank, (total, (parent, token)) in enumerate(zip(totals, choices, strict=True)):
            if len(live) == self._how.beams or total == -math.inf:
                break
            row = self.live[parent][1].fork()
            row.add(token)
            if not row.ended_by:
                live.append((total, row))
                chosen.append((parent, token))
            elif rank < self._how.beams:
                self.ended.append((total / row.length**self._how.length_penalty, row))
        self.ended = sorted(self.ended, key=lambda scored: -scored[0])[: self._how.beams]
        if live and self._is_decided(*live[0]):
            live, chosen = [], []
        self.live = live
        return chosen

    def _is_decided(self, total: float, row: Growing) -> bool:
        """Whether even the most probable sequence, if it loses no more probability, comes after all that have ended."""
        penalty = self._how.length_penalty
        length = self._longest if penalty > 0 else row.length + 1
        return len(self.ended) == self._how.beams and total / length**penalty <= self.ended[-1][0]
