"""The tokenizer files of a Hugging Face folder: the sentencepiece model and tokenizer_config.json."""

from __future__ import annotations

from typing import Any

from internlm_lite.data.tokenizer import Tokenizer

MODEL = "tokenizer.model"
CONFIG = "tokenizer_config.json"


def special_ids(tokenizer: Tokenizer) -> dict[str, int | None]:
    """Ids of bos, eos and padding, by their keys in config.json."""
    return {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eos, "pad_token_id": tokenizer.pad}


def tokenizer_config(tokenizer: Tokenizer, max_positions: int) -> dict[str, Any]:
    """tokenizer_config.json for transformers' LlamaTokenizer, which reads sentencepiece models."""
    ids = {"bos_token": tokenizer.bos, "eos_token": tokenizer.eos, "pad_token": tokenizer.pad}
    return {
        "tokenizer_class": "LlamaTokenizer",
        "model_max_length": max_positions,
        "legacy": False,
        "add_prefix_space": tokenizer.adds_space,
        "add_bos_token": tokenizer.bos is not None,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        **{name: None if token is None else tokenizer.piece(token) for name, token in ids.items()},
        "unk_token": tokenizer.piece(tokenizer.unk),
    }
