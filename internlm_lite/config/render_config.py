"""Prints a loaded config: all values, only those that differ from the defaults, or the origin of each.

Printed as Python that `load_config` reads again (secrets masked): `train.py --print-config full > copy.py`.
"""

from __future__ import annotations

from typing import Any

from internlm_lite.config.keys import item_of, known_keys, section_of, value_of
from internlm_lite.config.load import LoadedConfig
from internlm_lite.config.masking import masked
from internlm_lite.config.schema import Config


def resolved(config: Config) -> dict[str, Any]:
    """Every key with its value, nested as in the file. JSON-able."""
    return config.model_dump(mode="json")


def diff(config: Config) -> dict[str, Any]:
    """Only the keys whose value differs from the default, or that have no default."""
    changed: dict[str, Any] = {}
    for key, field in known_keys().items():
        value = value_of(config, key) if _section_is_set(config, key) else None
        if section_of(field) is None and value is not None and (field.is_required() or value != field.get_default()):
            *parents, name = key.split(".")
            section = changed
            for parent in parents:
                section = section.setdefault(parent, {})
            section[name] = (
                [one.model_dump(mode="json", exclude_defaults=True) for one in value] if item_of(field) else value
            )
        elif section_of(field) is not None and value is not None and field.get_default() is None:
            changed.setdefault(key, {})
    return changed


def _section_is_set(config: Config, key: str) -> bool:
    parent = key.rpartition(".")[0]
    return not parent or (_section_is_set(config, parent) and value_of(config, parent) is not None)


def print_config(loaded: LoadedConfig, how: str) -> str:
    """The text of `--print-config`: "full", "diff", or "origin" (one key a line with the place it was written)."""
    values = masked(diff(loaded.config) if how == "diff" else resolved(loaded.config))
    if how != "origin":
        return "\n".join(f"{name} = {_python(value)}" for name, value in values.items()) + "\n"
    flat = {key: _lookup(values, key) for key in loaded.origins}
    texts = {key: f"{key} = {value!r}" for key, value in flat.items() if value is not _ABSENT}
    width = min(60, max(map(len, texts.values())))
    return "".join(f"{text:<{width}}  # {loaded.origins[key]}\n" for key, text in texts.items())


def origin_rows(loaded: LoadedConfig) -> list[dict[str, Any]]:
    """{"key", "value", "origin"} of every key, in the order of the schema; secrets masked. JSON-able."""
    values = masked(resolved(loaded.config))
    rows = [{"key": key, "value": _lookup(values, key), "origin": origin} for key, origin in loaded.origins.items()]
    return [row for row in rows if row["value"] is not _ABSENT]


_ABSENT = object()


def _lookup(values: Any, key: str) -> Any:
    for name in key.split("."):
        if not isinstance(values, dict):
            return _ABSENT
        values = values[name]
    return values


def _python(value: Any, indent: str = "") -> str:
    """A value as Python source: dict(...) over several lines if all keys are identifiers, else a literal."""
    if not isinstance(value, dict) or not value or not all(str(name).isidentifier() for name in value):
        return repr(value)
    inner = indent + "    "
    lines = [f"{inner}{name}={_python(item, inner)},\n" for name, item in value.items()]
    return f"dict(\n{''.join(lines)}{indent})"
