"""Prompts as text: one a line, or JSON lines with what each wants; and the tokens that end a text by default."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from internlm_lite.data.tokenizer import Tokenizer
from internlm_lite.errors import DataError
from internlm_lite.generate.request import Request

GENERATION_CONFIG = "generation_config.json"


class PromptLine(BaseModel):
    """A prompt; what is left out is as for all others. The keys of a JSON line. Beside a source it begins the target,
    and may be left out."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    prompt: str
    source: str | None = None
    """Of an encoder-decoder."""
    max_new_tokens: Annotated[int, Field(ge=1)] | None = None
    stop: str | list[str] | None = None
    stop_ids: list[int] | None = None
    seed: int | None = None

    @model_validator(mode="before")
    @classmethod
    def _with_prompt(cls, given: Any) -> Any:
        return {"prompt": "", **given} if isinstance(given, dict) and "source" in given else given


@dataclass(frozen=True)
class Defaults:
    """What holds for prompts that say nothing else."""

    max_new_tokens: int
    stop_ids: frozenset[int]
    stop_strings: tuple[str, ...]
    seed: int

    def request(self, line: PromptLine, tokenizer: Tokenizer, of_sources: Tokenizer | None = None) -> Request:
        """`of_sources`: the tokenizer of sources, where they have their own."""
        start = [] if tokenizer.bos is None else [tokenizer.bos]
        stop = self.stop_strings if line.stop is None else [line.stop] if isinstance(line.stop, str) else line.stop
        return Request(
            start + tokenizer.encode(line.prompt),
            line.max_new_tokens or self.max_new_tokens,
            self.stop_ids if line.stop_ids is None else frozenset(line.stop_ids),
            tuple(stop),
            self.seed if line.seed is None else line.seed,
            () if line.source is None else source_ids(of_sources or tokenizer, line.source),
        )


def source_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """What an encoder reads, as the data of pairs have it: with the marks that the tokenizer has."""
    start, end = ([] if token is None else [token] for token in (tokenizer.bos, tokenizer.eos))
    return start + tokenizer.encode(text) + end


def generation_config_beside(tokenizer: Tokenizer) -> dict[str, Any]:
    """The object in the generation_config.json beside a tokenizer; empty without one. Raises DataError when that file
    is damaged."""
    path = tokenizer.path.with_name(GENERATION_CONFIG)
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise DataError(f"{path}: found no JSON object; correct the file or remove it")
    return found


def end_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """The tokens that end a text: the tokenizer's, and those of a generation_config.json beside it, such as the end of
    a chat's turn. Raises DataError when that file is damaged."""
    found = generation_config_beside(tokenizer).get("eos_token_id")
    added = found if isinstance(found, list) else [] if found is None else [found]
    if not all(type(token) is int and token >= 0 for token in added):
        path = tokenizer.path.with_name(GENERATION_CONFIG)
        raise DataError(f"{path}: eos_token_id: found {found!r}, expected a token id or a list of them")
    return frozenset(added if tokenizer.eos is None else [tokenizer.eos, *added])


def read_prompts(file: Iterable[bytes], name: str, *, as_json: bool, key: str = "prompt") -> Iterator[PromptLine]:
    """The prompts of a file, one a line: text, or a JSON object. `key`: "source" where texts are sources. Raises
    DataError with the line's number."""
    for number, raw in enumerate(file, 1):
        where = f"{name}:{number}"
        try:
            text = raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise DataError(f"{where}: byte {raw[error.start]:#04x}: expected UTF-8; convert the file") from None
        if not text.strip():
            raise DataError(f"{where}: an empty line: expected a {key}; remove the line")
        yield _parsed(text, where) if as_json else PromptLine.model_validate({key: text})


def _parsed(text: str, where: str) -> PromptLine:
    try:
        return PromptLine.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = f"key {first['loc'][0]!r}: " if first["loc"] else ""
        raise DataError(
            f"{where}: {key}{first['msg']}; expected a JSON object with the keys {', '.join(PromptLine.model_fields)}, "
            'such as {"prompt": "def main", "stop": ["\\n\\n"], "seed": 3}'
        ) from None
