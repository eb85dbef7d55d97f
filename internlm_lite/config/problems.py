"""Problems of a config as lines for the user: where it was written, what was found, what was expected, what to change.

configs/x.py:31: data.seq_lenn: unknown key; nearest known key: data.seq_len
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from internlm_lite.config.keys import expected, field_of, item_of, names_in, nearest_key, nearest_name, section_of
from internlm_lite.config.masking import masked
from internlm_lite.config.plain import one_line, shown
from internlm_lite.config.source import Layer

MOST_PROBLEMS = 100
_SHORT_DTYPES = {
    "bf16": "torch.bfloat16",
    "fp16": "torch.float16",
    "fp32": "torch.float32",
    "fp64": "torch.float64",
}
"""Names that other frameworks give to values of ours."""


@dataclass(frozen=True)
class Problem:
    """One problem, reported at `keys[0]`; `keys` are all keys involved."""

    keys: tuple[str, ...]
    text: str

    def line(self, origins: Mapping[str, str], file: str) -> str:
        """The line, led by the origin of one of its keys, preferably the command line (`file` if none has one)."""
        names = [
            *self.keys,
            *(key.rpartition(".")[0] for key in self.keys),
            *(key.partition("[")[0] for key in self.keys),
        ]
        written = [origin for name in names if not (origin := origins.get(name, "default")).startswith("default")]
        where = next((origin for origin in written if origin.startswith("command line")), (*written, file)[0])
        return str(masked(one_line(f"{where}: {self.keys[0]}: {self.text}")))


def schema_problems(error: ValidationError, layer: Layer) -> list[Problem]:
    """One problem for each faulty key of a failed validation, in the order of the file's sections."""
    kinds: dict[str, str] = {}
    for detail in error.errors(include_url=False, include_context=False):
        kinds.setdefault(_faulty_key(detail["loc"]), detail["type"])
    kinds = dict(itertools.islice(kinds.items(), MOST_PROBLEMS + 1))
    misspelled = {nearest_key(key) for key in kinds if field_of(key) is None}
    listed: set[str] = set()
    return [
        Problem((key,), _unknown(key, listed) if field_of(key) is None else _text(key, kind, layer))
        for key, kind in kinds.items()
        if kind != "missing" or key not in misspelled
    ]


def _faulty_key(location: tuple[int | str, ...]) -> str:
    """The dotted key of a pydantic location, up to the first plain value."""
    key, field = "", None
    for name in location:
        if isinstance(name, int) and field is not None and item_of(field):
            key += f"[{name}]"
            continue
        key = f"{key}.{name}" if key else str(name)
        field = field_of(key)
        if field is None or (section_of(field) or item_of(field)) is None:
            break
    return key


def _text(key: str, kind: str, layer: Layer) -> str:
    field = field_of(key)
    assert field is not None
    parent, _, name = key.rpartition(".")
    if kind == "missing" and section_of(field) is not None:
        return f"missing; add {name} = {expected(field)}"
    if kind == "missing":
        return f"missing; expected {expected(field)}; add {name}=... to {parent} = dict(...)"
    value = _value(layer, key)
    if key.endswith("]") and (item := item_of(field)):
        return f"found {shown(value)}, expected dict(...) with keys of {', '.join(item.model_fields)}"
    return f"found {shown(masked(value, name))}, expected {expected(field)}; {_remedy(value, field, name)}"


def _value(layer: Layer, key: str) -> Any:
    outer, index, inner = key.partition("[")
    value = layer.get(outer)
    if not index:
        return value
    number, _, name = inner.partition("]")
    item = value[int(number)]
    return item.get(name[1:]) if name else item


def _unknown(key: str, listed: set[str]) -> str:
    """`listed`: sections whose keys another problem lists; the one of this key is added."""
    near, parent = nearest_key(key), key.rpartition(".")[0]
    if near is not None:
        return f"unknown key; nearest known key: {near}"
    if parent in listed or not names_in(parent):
        return "unknown key"
    listed.add(parent)
    if parent:
        return f"unknown key; keys of {parent}: {', '.join(names_in(parent))}"
    return f"unknown key; expected one of {', '.join(names_in(''))}; your own names are UPPER_CASE or start with _"


def _remedy(value: Any, field: FieldInfo, name: str) -> str:
    """The change that makes the value valid, as precisely as the value allows."""
    wanted = _scalar_types(field.annotation)
    section = section_of(field)
    if section is not None:
        return f"write {name} = dict(...)"
    if isinstance(value, str) and (near := _near_choice(value, _choices(field.annotation))) is not None:
        return f"write {near!r}"
    if isinstance(value, str) and wanted & {int, float, bool} and str not in wanted:
        if bool in wanted and value.lower() in ("true", "false"):
            return f"write {value.capitalize()}"
        return "remove the quotes" if _is_number(value) else "write a value of this kind"
    if isinstance(value, bool) and wanted & {int, float}:
        return "write the number"
    if isinstance(value, float) and int in wanted and value.is_integer() and abs(value) < 2**53:
        return f"write {int(value)}"
    if value in (0, 1) and bool in wanted:
        return f"write {bool(value)}"
    if isinstance(value, (int, float)) and str in wanted:
        return f'write "{value}"'
    return "change the value" if field.is_required() else f"leave {name} out for {field.get_default()!r}"


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _near_choice(value: str, choices: Sequence[str]) -> str | None:
    short = _SHORT_DTYPES.get(value.lower())
    return short if short in choices else nearest_name(value, choices)


def _choices(annotation: Any) -> list[str]:
    """['a', 'b'] for `Literal["a", "b"] | None`; of a list none, as the value is not one of them."""
    if get_origin(annotation) is Literal:
        return [choice for choice in get_args(annotation) if isinstance(choice, str)]
    members = () if get_origin(annotation) in (list, tuple, dict) else get_args(annotation)
    return [choice for member in members for choice in _choices(member)]


def _scalar_types(annotation: Any) -> set[type]:
    """{int, NoneType} for `Positive | None`."""
    if isinstance(annotation, type):
        return {annotation}
    if get_origin(annotation) in (Literal, list, dict):
        return set()
    return set().union(*(_scalar_types(member) for member in get_args(annotation)))
