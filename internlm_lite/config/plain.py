"""What a config file leaves behind, as plain data, and any value as text that is safe to print.

plain({"lr": 1e-4})     the same
plain(open("x"))        Opaque: no key accepts it, messages show its text
shown("a" * 10**7)      "'aaa ... aaa'"
one_line("a\\x1b[2J")    "a\\\\x1b[2J"
"""

from __future__ import annotations

from typing import Any

from internlm_lite.units import escaped

_LONGEST, _LONGEST_KEY = 300, 100
_LONGEST_LINE = 2000
_DEEPEST, _MOST = 16, 20_000
"""Levels and entries of dicts and lists; a config has a few hundred entries."""
_LARGEST = 2**63


class Opaque:
    """Stands for a value that is no plain data: what it was, as text."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text


def plain(value: Any) -> Any:
    """`value` as dicts, lists, tuples, strings, numbers, True, False and None, all of bounded size."""
    return _Reader().read(value)


class _Reader:
    def __init__(self) -> None:
        self.left = _MOST

    def read(self, value: Any, depth: int = 0) -> Any:
        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, int):
            return int(value) if -_LARGEST <= value < _LARGEST else Opaque(f"an integer of {value.bit_length()} bits")
        if isinstance(value, float):
            return float(value)
        if isinstance(value, str):
            return str.__str__(value)
        return self._container(value, depth) if isinstance(value, dict | list | tuple) else Opaque(shown(value))

    def _container(self, value: Any, depth: int) -> Any:
        self.left -= len(value)
        if depth == _DEEPEST or self.left < 0:
            return Opaque(f"a {type(value).__name__} of more than {_DEEPEST} levels or {_MOST} entries")
        if isinstance(value, dict):
            return {shown_key(name): self.read(inner, depth + 1) for name, inner in dict.items(value)}
        return (list if isinstance(value, list) else tuple)(self.read(inner, depth + 1) for inner in value)


def shown_key(name: Any) -> Any:
    """A short string or integer as it is, any other key of a dict as text."""
    bare = plain(name)
    return bare[:_LONGEST_KEY] if isinstance(bare, str) else bare if isinstance(bare, int) else shown(name)


def shown(value: Any) -> str:
    """repr of a value, cut to a few hundred characters; its type if it has no repr."""
    try:
        text = repr(value)
    except Exception:  # noqa: BLE001  its own code runs
        text = f"an object of type {type(value).__name__}"
    return _cut(text, _LONGEST)


def one_line(text: str) -> str:
    """`text` on a line of bounded length, with control characters escaped."""
    return escaped(_cut(text, _LONGEST_LINE))


def _cut(text: str, longest: int) -> str:
    half = longest // 2
    return text if len(text) <= longest else f"{text[:half]} ... {text[-half:]}"
