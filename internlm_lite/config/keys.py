"""The schema as a flat table: dotted key -> field. What a value should look like, in words, and the nearest known key.

known_keys()["data.seq_len"]          the pydantic field
expected(field)                       "an integer > 0"
nearest_key("data.seq_lenn")          "data.seq_len"
"""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from internlm_lite.config.schema import Config, Section

_NOUNS = {int: "an integer", float: "a number", str: "a string", bool: "True or False", type(None): "None"}
_PLURALS = {int: "integers", float: "numbers", str: "strings"}
_BOUNDS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
_ANOTHER_SECTION = 1.5
"""Edits that a match in another section costs: one typo here is likelier than the right key in the wrong place."""


@cache
def known_keys() -> Mapping[str, FieldInfo]:
    """Every section and key of a config file, in the schema's order."""
    return dict(_walk(Config, ""))


def _walk(section: type[Section], prefix: str) -> Iterator[tuple[str, FieldInfo]]:
    for name, field in section.model_fields.items():
        yield prefix + name, field
        inner = section_of(field)
        if inner is not None:
            yield from _walk(inner, f"{prefix}{name}.")


def section_of(field: FieldInfo) -> type[Section] | None:
    """The section class of a key that holds a dict of keys, None for a plain value."""
    for member in (field.annotation, *get_args(field.annotation)):
        if isinstance(member, type) and issubclass(member, Section):
            return member
    return None


def accepts_text(key: str) -> bool:
    """Whether a string is a right value of `key`."""
    field = known_keys().get(key)
    return field is not None and str in (field.annotation, *get_args(field.annotation))


def expected(field: FieldInfo) -> str:
    """What a value of this key may be: "an integer > 0 or None"."""
    return _describe(field.annotation, field.metadata)


def _describe(annotation: Any, constraints: Iterable[Any] = ()) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _describe(arguments[0], [c for extra in arguments[1:] for c in getattr(extra, "metadata", [extra])])
    if origin in (Union, types.UnionType):
        return " or ".join(_describe(member) for member in arguments)
    if origin is Literal:
        return ("one of " if len(arguments) > 1 else "") + ", ".join(map(repr, arguments))
    if origin is list:
        return f"a list of {_PLURALS[arguments[0]]}"
    if origin is dict:
        return f"a dict (name: {_describe(arguments[1])})"
    if isinstance(annotation, type) and issubclass(annotation, Section):
        required = [f"{name}=..." for name, field in annotation.model_fields.items() if field.is_required()]
        return f"dict({', '.join(required) or '...'})"
    bounds = [
        f"{sign} {getattr(constraint, name)}"
        for name, sign in _BOUNDS.items()
        for constraint in constraints
        if hasattr(constraint, name)
    ]
    return " ".join([_NOUNS[annotation], " and ".join(bounds)]).strip()


def nearest_key(key: str) -> str | None:
    """The known key most likely meant by the unknown `key`, first of the same section. None: nothing is near."""
    parent, _, name = key.rpartition(".")

    def cost(candidate: str) -> float:
        section, _, candidate_name = candidate.rpartition(".")
        return edits(name, candidate_name) + (_ANOTHER_SECTION if section != parent else 0)

    best = min(known_keys(), key=cost)
    section, _, best_name = best.rpartition(".")
    if edits(name, best_name) <= (_allowed_edits(name) if section == parent else len(name) // 3):
        return best
    alike = difflib.get_close_matches(name, names_in(parent), n=1)
    return f"{parent}.{alike[0]}".lstrip(".") if alike else None


def names_in(section: str) -> list[str]:
    """Names of the keys of a section; "" for the top level."""
    return [name for parent, _, name in (key.rpartition(".") for key in known_keys()) if parent == section]


def nearest_name(name: str, names: Iterable[str]) -> str | None:
    """The most similar of `names`, None when none is near."""
    names = list(names)
    best = min(names, key=lambda candidate: edits(name, candidate), default=None)
    if best is not None and edits(name, best) <= _allowed_edits(name):
        return best
    return next(iter(difflib.get_close_matches(name, names, n=1)), None)


def _allowed_edits(name: str) -> int:
    return max(1, (len(name) + 1) // 3)


def edits(a: str, b: str) -> int:
    """Optimal string alignment distance: insertions, deletions, substitutions, swaps of neighbours."""
    before: list[int] = []
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, last, row = row, before, [i]
        for j, y in enumerate(b, 1):
            row.append(min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (x != y)))
            if i > 1 and j > 1 and x == b[j - 2] and a[i - 2] == y:
                row[j] = min(row[j], last[j - 2] + 1)
    return row[-1]
