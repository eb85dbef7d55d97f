"""Cross checks of an encoder-decoder: what its two sides have to agree on, and what it is refused with, and why."""

from __future__ import annotations

from collections.abc import Iterator

from internlm_lite.config.plain import shown
from internlm_lite.config.problems import Problem
from internlm_lite.config.schema import Config

_LAYERS = "model.num_encoder_layers"
_TENSOR = "parallel.tensor"


def encoder_problems(config: Config) -> Iterator[Problem]:
    """A Problem for each contradiction, before any process group exists."""
    model = config.model
    if not model.num_encoder_layers:
        for name in ("source_vocab_size", "tie_source_embeddings"):
            if value := getattr(model, name):
                text = f"found {shown(value)} with {_LAYERS} 0, a decoder alone; remove it, or set {_LAYERS}"
                yield Problem((f"model.{name}", _LAYERS), text)
        return
    if model.tie_source_embeddings and model.source_vocab != model.vocab_size:
        keys = "model.tie_source_embeddings", "model.source_vocab_size", "model.vocab_size"
        text = f"found True with vocabularies of {model.source_vocab} and {model.vocab_size}, expected equal ones"
        yield Problem(keys, f"{text}; change one of them")
    yield from _rows(config)
    yield from _refused(config)


def _rows(config: Config) -> Iterator[Problem]:
    """Whether sources can be split as targets are."""
    model, data, tensor = config.model, config.data, config.parallel.tensor
    keys = ("data.source_seq_len", "data.micro_bsz")
    rows = f"source rows of {config.source_tokens} tokens"
    if config.parallel.sequence_parallel and config.source_tokens % tensor:
        text = f"found True with {rows}, expected a multiple of {_TENSOR} {tensor}; change one of them"
        yield Problem(("parallel.sequence_parallel", *keys, _TENSOR), text)
    if model.fp8 and config.source_tokens % 16:
        yield Problem(("model.fp8", *keys), f"found True with {rows}, expected a multiple of 16; change one of them")
    if model.embedding_by_vocabulary and model.source_vocab % tensor:
        text = f"found {model.source_vocab}, expected a multiple of {_TENSOR} {tensor}; change one of them"
        yield Problem(("model.source_vocab_size", _TENSOR), text)
    most, length = model.most_positions, data.source_seq_len or data.seq_len
    if most is not None and most < length:
        text = f"found {most}, expected at least data.source_seq_len {length}; change one of them"
        yield Problem(("model.max_position_embeddings", "data.source_seq_len"), text)


def _refused(config: Config) -> Iterator[Problem]:
    if (size := config.parallel.context.size) > 1:
        text = (
            f"found {size} with {_LAYERS} {config.model.num_encoder_layers}, expected 1: context parallelism balances "
            "causal attention inside one row, and sources have rows of their own; take tensor or data parallel"
        )
        yield Problem(("parallel.context.size", _LAYERS), text)
    if others := [name for name in config.evaluation.tasks if name != "pairs"]:
        text = f'found {shown(others[0])} with {_LAYERS} {config.model.num_encoder_layers}, expected "pairs" alone: '
        yield Problem(("evaluation.tasks", _LAYERS), f"{text}others ask a decoder to go on with a text; remove it")
