"""Cross checks of the data of an encoder-decoder: pairs of a source and a target."""

from __future__ import annotations

from collections.abc import Iterator

from internlm_lite.config.plain import shown
from internlm_lite.config.problems import Problem
from internlm_lite.config.schema import Config

_OF_PAIRS = ("source_seq_len", "row_pairs", "truncate_pairs", "source_tokenizer")
"""Keys of `data` that only pairs have a use for."""


def pair_problems(config: Config) -> Iterator[Problem]:
    data, layers = config.data, "model.num_encoder_layers"
    if not config.model.num_encoder_layers:
        for name in _OF_PAIRS:
            if value := getattr(data, name):
                text = f"found {shown(value)} with {layers} 0, whose data are no pairs; remove it, or set {layers}"
                yield Problem((f"data.{name}", layers), text)
        return
    if data.pack_sample_into_one:
        text = f"found True with {layers} {config.model.num_encoder_layers}: a target sees its own source; remove it"
        yield Problem(("data.pack_sample_into_one", layers), text)
    for number, stage in enumerate(config.stages):
        for name in ("seq_len", "micro_bsz", "weights"):
            if (value := getattr(stage, name)) is not None:
                keys = (f"stages[{number}].{name}", "stages", layers)
                text = f"found {shown(value)} with {layers} {config.model.num_encoder_layers}: stages of pairs change"
                yield Problem(keys, f"{text} learning rates alone; remove it")
