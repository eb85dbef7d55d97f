"""Continues prompts: a packed forward pass over all prompts, then one token per sequence and step.

One loop for sampling and beam search: a `Search` sees the logits and says which sequences go on, with which tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Protocol

import torch

from internlm_lite.errors import ConfigError, DataError
from internlm_lite.generate.beams import Beams, BeamSearch
from internlm_lite.generate.cache import KVCache
from internlm_lite.generate.request import Continuation, Decode, Growing, Request
from internlm_lite.generate.sample import Sampling, SeenTokens, draw, random_numbers
from internlm_lite.generate.source_cache import SourceCache
from internlm_lite.layers.flash import packed
from internlm_lite.mesh import comm
from internlm_lite.models.stages import WholeModel

Listener = Callable[[int, str], None]
"""(number of the request, the next piece of its text)."""


class Search(Protocol):
    """Decides how sequences go on."""

    def choose(self, logits: torch.Tensor) -> tuple[list[int], list[int]]:
        """Logits [sequences, vocab] -> (parents, tokens): sequence b of the next step is sequence parents[b] of this
        one and tokens[b]. Empty: done."""
        ...


class Sampled:
    """The search that draws one token per sequence; a sequence that ends leaves the batch."""

    def __init__(self, rows: Sequence[Growing], sampling: Sampling, seen: SeenTokens, listen: Listener) -> None:
        self._rows, self._sampling, self._seen, self._listen = list(enumerate(rows)), sampling, seen, listen
        self._generators = [torch.Generator().manual_seed(row.request.seed) for row in rows]

    def choose(self, logits: torch.Tensor) -> tuple[list[int], list[int]]:
        numbers = random_numbers(self._generators).to(logits.device)
        drawn: list[int] = comm.read(draw(self._seen.penalised(logits), self._sampling, numbers))
        for (number, row), token in zip(self._rows, drawn, strict=True):
            if piece := row.add(token):
                self._listen(number, piece)
        going = [b for b, (_, row) in enumerate(self._rows) if not row.ended_by]
        self._rows, self._generators = [self._rows[b] for b in going], [self._generators[b] for b in going]
        tokens = [drawn[b] for b in going]
        self._seen.follow(going, tokens)
        return going, tokens


def generate(
    model: WholeModel,
    requests: Sequence[Request],
    how: Sampling | Beams,
    decode: Decode | None = None,
    listen: Listener = lambda number, piece: None,
    chunk: int | None = None,
) -> list[Continuation]:
    """The continuation of each request. `listen` hears texts while they are drawn; of a beam search nothing.

    `decode`: for texts and stop strings. `chunk`: tokens of a prompt per forward pass; None: all. Collective over tp
    and pp: same arguments and result on every rank, but for `listen`, and for `decode` without stop strings. Reads the
    device once per token. Raises DataError for ids outside the vocabulary, ConfigError for values that do not fit.
    """
    check(model, requests)
    if decode is None and any(request.stop_strings for request in requests):
        raise ConfigError("stop_strings: expected also `decode`, the tokenizer's, which turns tokens into text")
    if chunk is not None and chunk < 1:
        raise ConfigError(f"chunk {chunk}: expected at least 1 token of a prompt per forward pass")
    rows = [Growing(request, decode) for request in requests if request.max_new_tokens]
    numbers = [number for number, request in enumerate(requests) if request.max_new_tokens]
    results = [Continuation([], "", "length") for _ in requests]
    if not rows:
        return results
    prompts = [row.request.prompt for row in rows]
    vocab_size = model.any_stage.config.vocab_size
    seen = SeenTokens(prompts, how.repetition_penalty, vocab_size, model.device)
    if isinstance(how, Beams):
        beam_search = BeamSearch(rows, how, seen)
        _run(model, rows, beam_search, chunk)
        found = beam_search.results()
    else:
        _run(model, rows, Sampled(rows, how, seen, lambda at, piece: listen(numbers[at], piece)), chunk)
        found = [row.result() for row in rows]
    for number, continuation in zip(numbers, found, strict=True):
        results[number] = continuation
    return results


@torch.no_grad()
def _run(model: WholeModel, rows: Sequence[Growing], search: Search, chunk: int | None) -> None:
    prompts = [row.request.prompt for row in rows]
    capacity = max(len(row.request.prompt) + row.request.max_new_tokens for row in rows)
    cache, sources = KVCache(len(rows), capacity, model.device), None
    if model.any_stage.config.num_encoder_layers:
        sources = SourceCache(model, [row.request.source for row in rows])
    parents, tokens = search.choose(prefill(model, prompts, cache, chunk, sources))
    while tokens:
        cache.select(parents)
        source = None
        if sources is not None:
            sources.select(parents)
            source = sources.side([1] * len(tokens))
        given, lengths = torch.tensor(tokens, device=model.device), cache.lengths
        logits = model.logits(given, lengths, cache.decode(), lengths=lengths + 1, source=source)
        cache.advance()
        parents, tokens = search.choose(logits)


def check(model: WholeModel, requests: Sequence[Request]) -> None:
    """Raises DataError for a prompt that is empty, contains an id outside the vocabulary, or has more tokens, with
    those to come, than the model has positions; of an encoder-decoder for such a source, of a decoder for any."""
    config = model.any_stage.config
    sides = {"prompt": config.vocab_size} | ({"source": config.source_vocab} if config.num_encoder_layers else {})
    for number, request in enumerate(requests):
        for side, vocab_size in sides.items():
            more = request.max_new_tokens if side == "prompt" else 0
            _check_tokens(f"{side} {number}", getattr(request, side), more, vocab_size, config.most_positions)
        if request.source and "source" not in sides:
            raise DataError(
                f"prompt {number} has a source, and the model is a decoder alone (model.num_encoder_layers 0): "
                "expected no sources; put them into the prompts, as in the texts that it was trained on"
            )


def _check_tokens(what: str, tokens: Sequence[int], more: int, vocab_size: int, most: int | None) -> None:
    if not tokens:
        raise DataError(f"{what} is empty: expected at least one token, for instance the tokenizer's BOS")
    wrong = [token for token in tokens if not 0 <= token < vocab_size]
    if wrong:
        raise DataError(
            f"{what} holds token id {wrong[0]}: expected 0..{vocab_size - 1}; "
            "use the tokenizer that the model was trained with"
        )
    if most is not None and len(tokens) + more > most:
        raise DataError(
            f"{what} has {len(tokens)} tokens{f', and {more} more are asked for' if more else ''}: the "
            f"model has {most} positions (model.max_position_embeddings); shorten the {what.split()[0]}"
            f"{', or ask for fewer' if more else ''}"
        )


@torch.no_grad()
def prefill(
    model: WholeModel,
    prompts: Sequence[Sequence[int]],
    cache: KVCache,
    chunk: int | None = None,
    sources: SourceCache | None = None,
) -> torch.Tensor:
    """Logits [B, vocab] of each prompt's last token; `chunk` tokens of each prompt per forward pass."""
    longest, device = max(map(len, prompts)), model.device
    chunk = chunk or longest
    last: dict[int, torch.Tensor] = {}
    for start in range(0, longest, chunk):
        pieces = [list(prompt[start : start + chunk]) for prompt in prompts]
        counts = [len(piece) for piece in pieces]
        boundaries = (0, *accumulate(counts))
        tokens = torch.tensor([token for piece in pieces for token in piece], device=device)
        positions = torch.cat([torch.arange(start, start + count, device=device) for count in counts])
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        lengths = lengths.repeat_interleave(torch.tensor(counts, device=device), output_size=len(tokens))
        cu_seqlens = torch.tensor(boundaries, dtype=torch.int32, device=device)
        attend = packed(model.any_stage.backend, cu_seqlens, boundaries, max(counts))
        rows = [b for b, count in enumerate(counts) if count]
        ends = torch.tensor([boundaries[b + 1] - 1 for b in rows], device=device)
        source = None if sources is None else sources.side(counts)
        logits = model.logits(tokens, positions, cache.extend(counts, attend), ends, lengths, source)
        last |= dict(zip(rows, logits, strict=True))
        cache.advance(counts)
    return torch.stack([last[b] for b in range(len(prompts))])
