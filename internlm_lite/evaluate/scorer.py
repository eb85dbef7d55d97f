"""Forward passes for tasks, on all ranks of a job: rank 0 leads and asks, the others compute their share until it is
done.

    rank 0    lead(work): work() asks -> jobs to all -> share -> results from all -> ... -> end
    others    lead(work):                jobs        -> share -> results           -> ... -> end

So ranks cannot disagree about what is asked, and only rank 0 reads task files. Data-parallel ranks share the rows of a
job, unless they have to compute all of them together (`WholeModel.together`); the tensor and pipeline ranks of each do.
A rank that fails inside a job ends, which the others see as a lost peer; what fails on rank 0 between jobs is raised on
all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, TypeVar, cast

import torch

from internlm_lite.data.tokenizer import Tokenizer
from internlm_lite.evaluate.encoding import Window
from internlm_lite.generate.beams import Beams
from internlm_lite.generate.decode import generate
from internlm_lite.generate.request import Request
from internlm_lite.generate.sample import Sampling
from internlm_lite.layers.flash import packed
from internlm_lite.layers.tensor_parallel import accumulation_dtype
from internlm_lite.mesh import comm
from internlm_lite.mesh.consensus import on_main
from internlm_lite.mesh.mesh import Mesh
from internlm_lite.models.stages import WholeModel

T = TypeVar("T")
MOST_GENERATED = 16
"""Sequences that are continued at a time."""


@dataclass(frozen=True)
class Score:
    """Of the targets of a window: the sum of their log-probabilities, and whether each is the most probable token."""

    log_probability: float
    is_greedy: bool


@dataclass(frozen=True)
class Generation:
    """Prompts that are continued in the same way."""

    requests: Sequence[Request]
    how: Sampling | Beams


class Scorer:
    """`score` and `generate` are called on rank 0 alone, inside `lead`."""

    def __init__(
        self,
        model: WholeModel,
        mesh: Mesh,
        tokenizer: Tokenizer,
        row_tokens: int,
        progress: Callable[[], object] = lambda: None,
    ) -> None:
        """`row_tokens`: tokens of a forward pass, more only if a single window has more; `progress` is called after
        each."""
        self._model, self._mesh, self._decode = model, mesh, tokenizer.decode
        self._row_tokens, self._progress = row_tokens, progress
        self._share = slice(None) if model.together else slice(mesh.alike_rank, None, mesh.sizes.alike)
        """This rank's rows of a job's."""
        self._in_job = False

    def lead(self, work: Callable[[], T]) -> T:
        """The result of `work` on rank 0, on all ranks; its error is raised on all. Collective."""
        if not self._mesh.is_main:
            while (job := comm.broadcast_object(None, self._mesh.world)) is not None:
                self._compute(job)
            return on_main(self._mesh, lambda: cast(T, None))
        outcome: Callable[[], T]
        try:
            result = work()
        except Exception as error:
            if self._in_job:  # the other ranks are inside the job, and would not hear of it
                raise
            outcome = _raiser(error)
        else:
            outcome = lambda: result  # noqa: E731
        comm.broadcast_object(None, self._mesh.world)
        return on_main(self._mesh, outcome)

    def score(self, windows: Sequence[Window]) -> list[Score]:
        """The score of each window. Windows of the same ids share a forward pass."""
        return self._ask(list(windows), len(windows))

    def generate(self, requests: Sequence[Request], how: Sampling | Beams) -> list[str]:
        """The text of each continuation, decoded alone as lm_eval does; it ends before a stop string."""
        return self._ask(Generation(list(requests), how), len(requests))

    def _ask(self, job: object, size: int) -> list[Any]:
        if not size:
            return []
        self._in_job = True
        found = self._compute(comm.broadcast_object(job, self._mesh.world))
        self._in_job = False
        assert sorted(found) == list(range(size)), "every row is computed"
        return [found[number] for number in range(size)]

    def _compute(self, job: Any) -> dict[int, Any]:
        """Row -> result of all rows of a job. Collective."""
        mine = dict(self._generated(job) if isinstance(job, Generation) else self._scored(job))
        says = self._mesh.tp.rank == 0 and self._mesh.pp.rank == 0
        parts = comm.gather_objects(mine if says else {}, self._mesh.world)
        return {number: result for part in parts for number, result in part.items()}

    @torch.no_grad()
    def _scored(self, windows: Sequence[Window]) -> Iterator[tuple[int, Score]]:
        """(number, score) of this rank's share: the longest first, so that what does not fit in memory fails early."""
        same: dict[tuple[int, ...], list[int]] = {}
        for number, window in enumerate(windows):
            same.setdefault(window.tokens, []).append(number)
        rows = sorted(same, key=lambda tokens: (-len(tokens), tokens))[self._share]
        for batch in _batches(rows, self._row_tokens):
            asked = [(row, number) for row, tokens in enumerate(batch) for number in same[tokens]]
            yield from self._score_row(batch, [(row, number, windows[number].targets) for row, number in asked])
            self._progress()

    def _score_row(
        self, batch: Sequence[tuple[int, ...]], asked: Sequence[tuple[int, int, tuple[int, ...]]]
    ) -> Iterator[tuple[int, Score]]:
        """`batch`: documents of a packed row, so that there is no padding; `asked`: (document, number, targets)."""
        device, counts = self._model.device, [len(tokens) for tokens in batch]
        boundaries = (0, *accumulate(counts))
        ends = [boundaries[row + 1] for row, _, _ in asked]
        at = [i for end, (_, _, t) in zip(ends, asked, strict=True) for i in range(end - len(t), end)]
        scored = sorted(set(at))
        where = {position: n for n, position in enumerate(scored)}
        attend = packed(
            self._model.any_stage.backend,
            torch.tensor(boundaries, dtype=torch.int32, device=device),
            boundaries,
            max(counts),
        )
        logits = self._model.logits(
            torch.tensor([token for tokens in batch for token in tokens], device=device),
            torch.cat([torch.arange(count, device=device) for count in counts]),
            attend,
            torch.tensor(scored, device=device),
        )
        log_probabilities = logits.to(accumulation_dtype(logits.dtype)).log_softmax(dim=-1)
        rows = torch.tensor([where[position] for position in at], device=device)
        targets = torch.tensor([target for _, _, t in asked for target in t], device=device)
        greedy = log_probabilities.argmax(dim=-1)[rows] == targets
        picked, hits = comm.read(torch.stack([log_probabilities[rows, targets].double(), greedy.double()]))
        start = 0
        for _, number, t in asked:
            part = slice(start, start := start + len(t))
            yield number, Score(sum(picked[part]), all(hits[part]))

    def _generated(self, job: Generation) -> Iterator[tuple[int, str]]:
        requests = job.requests
        order = sorted(range(len(requests)), key=lambda n: (-len(requests[n].prompt) - len(requests[n].source), n))
        mine = order[self._share]
        for start in range(0, len(mine), MOST_GENERATED):
            numbers = mine[start : start + MOST_GENERATED]
            found = generate(self._model, [requests[n] for n in numbers], job.how, self._decode)
            for number, continuation in zip(numbers, found, strict=True):
                yield number, cut(self._decode(continuation.tokens), requests[number].stop_strings)
            self._progress()


def cut(text: str, stop_strings: Sequence[str]) -> str:
    """`text` up to the first of the stop strings."""
    return text[: min((at for stop in stop_strings if (at := text.find(stop)) >= 0), default=len(text))]


def _batches(rows: Sequence[tuple[int, ...]], most: int) -> Iterator[list[tuple[int, ...]]]:
    """The rows in groups of at most `most` ids, or of one."""
    batch: list[tuple[int, ...]] = []
    size = 0
    for tokens in rows:
        if batch and size + len(tokens) > most:
            yield batch
            batch, size = [], 0
        batch.append(tokens)
        size += len(tokens)
    if batch:
        yield batch


def _raiser(error: Exception) -> Callable[[], Any]:
    def raise_it() -> Any:
        raise error

    return raise_it
