"""The tokenizer files of a Hugging Face folder, carried in both directions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from internlm_lite.data.sentencepiece_model import SentencePieceModel
from internlm_lite.data.tokenizer import MERGES, Tokenizer
from internlm_lite.generate.prompts import GENERATION_CONFIG, end_ids, generation_config_beside

MODEL = "tokenizer.model"
CONFIG = "tokenizer_config.json"
COPIED = ("special_tokens_map.json", "added_tokens.json", "chat_template.jinja")
"""Files beside a tokenizer that are copied as they are, in every case."""


def special_ids(tokenizer: Tokenizer) -> dict[str, int | None]:
    """Ids of bos, eos and padding, by their keys in config.json."""
    return {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eos, "pad_token_id": tokenizer.pad}


def main_file(folder: Path) -> str | None:
    """Name of the tokenizer's file in a Hugging Face folder, for data.tokenizer; None: there is none."""
    return next((name for name in (MODEL, "tokenizer.json", *MERGES) if (folder / name).is_file()), None)


def files_in(folder: Path) -> dict[str, bytes]:
    """File name -> content of the tokenizer in a Hugging Face folder, with what stands beside it."""
    names = (MODEL, "tokenizer.json", CONFIG, GENERATION_CONFIG, *MERGES, *MERGES.values(), *COPIED)
    return {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}


def files_of(tokenizer: Tokenizer, max_positions: int) -> dict[str, bytes]:
    """File name -> content of the files by which transformers loads `tokenizer`: those it came with, as they are; for
    one of our own, made from its model."""
    beside = files_in(tokenizer.path.parent)
    if CONFIG in beside and tokenizer.path.name in beside:
        return {name: content for name, content in beside.items() if name != GENERATION_CONFIG}
    copied = {name: beside[name] for name in COPIED if name in beside}
    if not isinstance(tokenizer.model, SentencePieceModel):
        return tokenizer.files | copied
    config = json.dumps(_llama_tokenizer(tokenizer.model, max_positions), indent=2)
    return {MODEL: tokenizer.files[tokenizer.path.name], CONFIG: config.encode() + b"\n"} | copied


def generation_config(tokenizer: Tokenizer) -> dict[str, Any]:
    """generation_config.json: the one that the tokenizer came with, with the ids that this tokenizer has. Raises
    DataError when that one is damaged."""
    ids, found = special_ids(tokenizer), generation_config_beside(tokenizer)
    own = {name: token for name, token in ids.items() if token is not None}
    return ids | found | own | {"eos_token_id": sorted(end_ids(tokenizer)) or None}


def _llama_tokenizer(model: SentencePieceModel, max_positions: int) -> dict[str, Any]:
    """tokenizer_config.json for transformers' LlamaTokenizer, which reads sentencepiece models."""
    ids = {"bos_token": model.bos, "eos_token": model.eos, "pad_token": model.pad, "unk_token": model.unk}
    return {
        "tokenizer_class": "LlamaTokenizer",
        "model_max_length": max_positions,
        "legacy": False,
        "add_prefix_space": model.adds_space,
        "add_bos_token": model.bos is not None,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        **{name: None if token is None else model.piece(token) for name, token in ids.items()},
    }
