"""The schema as a flat table: dotted key -> field. Values described in words, and the nearest known key.

known_keys()["data.seq_len"]          the pydantic field
expected(field)                       "an integer > 0"
nearest_key("data.seq_lenn")          "data.seq_len"
"""

from __future__ import annotations

import difflib
import re
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from internlm_lite.config.foreign import OTHER_NAMES
from internlm_lite.config.schema import Config, Section

_NOUNS = {int: "an integer", float: "a number", str: "a string", bool: "True or False", type(None): "None"}
_PLURALS = {int: "integers", float: "numbers", str: "strings"}
_BOUNDS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
_OTHER_SECTION = 0.2
"""Subtracted from the similarity of keys of another section: a typing error is likelier than the wrong section."""


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
    """The section class of a key that holds a dict of keys, None for a plain value or a list."""
    return None if get_origin(field.annotation) is list else _section_in(field.annotation)


def item_of(field: FieldInfo) -> type[Section] | None:
    """The section class of the items of a key that holds a list of dicts of keys, None for any other."""
    return _section_in(field.annotation) if get_origin(field.annotation) is list else None


def _section_in(annotation: Any) -> type[Section] | None:
    for member in (annotation, *get_args(annotation)):
        if isinstance(member, type) and issubclass(member, Section):
            return member
    return None


def field_of(key: str) -> FieldInfo | None:
    """The field of a dotted key, also inside an item of a list, as in optimizer.groups[0].lr; None if there is none."""
    outer, item, inner = key.partition("].")
    field = known_keys().get(re.sub(r"\[\w+\]?$", "", outer))
    section = field and item and item_of(field)
    return section.model_fields.get(inner) if section else field


def accepts_text(key: str) -> bool:
    """Whether `key` accepts a string as its value."""
    field = known_keys().get(key)
    return field is not None and str in (field.annotation, *get_args(field.annotation))


def value_of(config: Config, key: str) -> Any:
    """The value of a dotted key; None in a section that is None."""
    value: Any = config
    for name in key.split("."):
        value = value and getattr(value, name)
    return value


def expected(field: FieldInfo) -> str:
    """What a value of this key may be: "an integer > 0 or None"."""
    return _describe(field.annotation, field.metadata)


def _describe(annotation: Any, constraints: Sequence[Any] = ()) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _describe(arguments[0], [c for extra in arguments[1:] for c in getattr(extra, "metadata", [extra])])
    if origin in (Union, types.UnionType):
        return " or ".join(_describe(member) for member in arguments)
    if origin is Literal:
        return ("one of " if len(arguments) > 1 else "") + ", ".join(map(repr, arguments))
    if origin is list:
        least, most = ({getattr(one, f"{end}_length", None) for one in constraints} for end in ("min", "max"))
        count = "".join(f"{n} " for n in least & most if n)
        return f"a list of {count}{_describe_items(arguments[0])}"
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


def _describe_items(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return ", ".join(map(repr, get_args(annotation)))
    one = _describe(annotation)
    plurals = (
        plural + one.removeprefix(_NOUNS[kind]) for kind, plural in _PLURALS.items() if one.startswith(_NOUNS[kind])
    )
    return next(plurals, one)


def nearest_key(key: str) -> str | None:
    """The known key that `key` means elsewhere, or the most similar one, preferably of the same section; None: none."""
    parent, _, name = key.rpartition(".")
    if parent.endswith("]"):
        near = nearest_name(name, names_in(parent))
        return near and f"{parent}.{near}"
    if name in OTHER_NAMES:
        return OTHER_NAMES[name]

    def score(candidate: str) -> float:
        section, _, candidate_name = candidate.rpartition(".")
        return _similarity(name, candidate_name) - (_OTHER_SECTION if section != parent else 0)

    best = max(known_keys(), key=score)
    return best if score(best) >= _threshold(name) else None


def names_in(section: str) -> list[str]:
    """Names of the keys of a section, or of an item of a list; "" for the top level."""
    if section.endswith("]"):
        field = field_of(section)
        item = field and item_of(field)
        return list(item.model_fields) if item else []
    return [name for parent, _, name in (key.rpartition(".") for key in known_keys()) if parent == section]


def nearest_name(name: str, names: Iterable[str]) -> str | None:
    """The most similar of `names`, None when none is similar."""
    return next(iter(difflib.get_close_matches(name, list(names), n=1, cutoff=_threshold(name))), None)


def _similarity(name: str, candidate: str) -> float:
    return difflib.SequenceMatcher(None, candidate, name).ratio()


def _threshold(name: str) -> float:
    """Smallest similarity of a likely typing error: short names may differ in one of two letters."""
    return 0.5 if len(name) <= 2 else 0.6
