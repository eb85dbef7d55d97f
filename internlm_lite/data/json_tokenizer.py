"""Tokenizers of Hugging Face's library `tokenizers`: tokenizer.json, and GPT-2's vocabulary with merges.

A document starts with the tokens that the file's own post-processor puts before a text (`<|begin_of_text|>` of Llama 3;
nothing for GPT-2 and Qwen). End and padding tokens are named in tokenizer_config.json or special_tokens_map.json beside
it, else they are the special tokens of the usual names.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from internlm_lite.errors import DataError

_ENDS = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>", "[EOS]", "<|im_end|>")
_PADS = ("<pad>", "[PAD]", "<|pad|>", "<|finetune_right_pad_id|>")
_LONGEST_CONFIG = 1 << 24


class JsonTokenizer:
    """A `TokenizerModel` of a tokenizer.json."""

    kind = "tokenizer.json"

    def __init__(self, path: Path, data: bytes) -> None:
        library = _library(path)
        try:
            found = library.Tokenizer.from_buffer(data)
        except Exception as error:  # noqa: BLE001 (the library raises Exception itself)
            raise DataError(f"tokenizer {path}: found no tokenizer.json of Hugging Face's form ({error})") from None
        self._set(found, path)

    def _set(self, tokenizer: Any, path: Path) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True  # text cannot end its own document
        self._tokenizer = tokenizer
        ids = tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(ids.values(), default=-1) + 1
        if self.vocab_size == 0:
            raise DataError(f"tokenizer {path}: found no tokens in it; give a trained tokenizer")
        named = _special_tokens(path)
        prefix = tokenizer.encode("").ids
        self.bos: int | None = prefix[0] if prefix else None
        end, pad = (next(filter(ids.__contains__, usual), None) for usual in (_ENDS, _PADS))
        self.eos: int | None = ids.get(named.get("eos_token", end))
        self.pad: int | None = ids.get(named.get("pad_token", pad))
        if self.bos == self.eos:  # a post-processor that adds nothing but the end
            self.bos = None
        self.unk: int | None = ids.get(getattr(tokenizer.model, "unk_token", None))

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return text

    def piece(self, token: int) -> str:
        return self._tokenizer.id_to_token(token) or f"<{token}>"


class _BytePairs(JsonTokenizer):
    kind = "byte pairs of GPT-2"

    def __init__(self, path: Path, tokenizer: Any) -> None:
        self._set(tokenizer, path)


def byte_pairs(path: Path, vocabulary: bytes, merges: bytes) -> JsonTokenizer:
    """The tokenizer of GPT-2's form: a JSON object {piece: id}, and merges, a pair a line, the most frequent first."""
    library = _library(path)
    try:
        lines = [line for line in merges.decode().split("\n") if line.strip() and not line.startswith("#version")]
        pairs = [(left, right) for left, right in (line.split(" ") for line in lines)]
        tokenizer = library.Tokenizer(library.models.BPE(json.loads(vocabulary), pairs))
    except Exception as error:  # noqa: BLE001 (the library raises Exception itself)
        raise DataError(
            f"tokenizer {path}: found no vocabulary of byte pairs ({type(error).__name__}: {error}), expected a JSON "
            "object of pieces and ids, and beside it a file with a pair of pieces a line"
        ) from None
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = library.decoders.ByteLevel()
    tokenizer.add_special_tokens([end for end in _ENDS if tokenizer.token_to_id(end) is not None])
    return _BytePairs(path, tokenizer)


def _library(path: Path) -> Any:
    try:
        import tokenizers
    except ImportError:
        raise DataError(f"tokenizer {path} needs the package tokenizers: pip install 'internlm_lite[hf]'") from None
    return tokenizers


def _special_tokens(path: Path) -> dict[str, str]:
    """{"eos_token": text, ...} of the files beside a tokenizer; what cannot be read names nothing."""
    named: dict[str, str] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        try:
            with path.with_name(name).open("rb") as file:
                found = json.loads(file.read(_LONGEST_CONFIG))
        except FileNotFoundError:
            continue
        except (OSError, ValueError, RecursionError) as error:
            raise DataError(f"{path.with_name(name)}: found no JSON ({error}); copy it again or remove it") from None
        for key in ("eos_token", "pad_token"):
            value = found.get(key) if isinstance(found, dict) else None
            text = value.get("content") if isinstance(value, dict) else value
            if isinstance(text, str):
                named[key] = text
    return named
