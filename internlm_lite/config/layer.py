"""Values of a config file with the place each was written. Layers stack: base files, the file, the command line.

{"data": {"seq_len": 2048}}   and   {"data": "configs/x.py:30", "data.seq_len": "configs/x.py:31"}
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

DELETE = "_delete_"
"""Key of a dict that replaces the dict below it instead of merging into it."""


@dataclass
class Layer:
    """Nested dicts of values, and for each dotted key where it was written."""

    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)

    def put(self, key: str, value: Any, origin: str) -> None:
        """Set a dotted key, creating sections on the way. What stood there, and below it, is forgotten."""
        *parents, name = key.split(".")
        section = self.values
        for depth, parent in enumerate(parents, 1):
            if not isinstance(section.get(parent), dict):
                section[parent] = {}
            self.origins.setdefault(".".join(parents[:depth]), origin)
            section = section[parent]
        self._forget(key)
        section[name] = value
        for inner in ("", *(f".{below}" for below in dotted(value))):
            self.origins[key + inner] = origin

    def get(self, key: str) -> Any:
        """The value of a dotted key; None when it is not set."""
        value: Any = self.values
        for name in key.split("."):
            value = value.get(name) if isinstance(value, dict) else None
        return value

    def has(self, key: str) -> bool:
        parent, _, name = key.rpartition(".")
        section = self.get(parent) if parent else self.values
        return isinstance(section, dict) and name in section

    def drop(self, key: str) -> tuple[Any, str]:
        """Remove a dotted key that is set; its value and origin."""
        value, origin = self.get(key), self.origin(key)
        parent, _, name = key.rpartition(".")
        del (self.get(parent) if parent else self.values)[name]
        self._forget(key)
        return value, origin

    def origin(self, key: str) -> str:
        """Where the key, or the nearest section around it, was written. "" for a section that was never written."""
        while key and key not in self.origins:
            key = key.rpartition(".")[0]
        return self.origins.get(key, "")

    def cover(self, upper: Layer) -> None:
        """Lay `upper` over this layer: dicts merge key by key, everything else is replaced."""
        self._merge(self.values, upper.values, "", upper)

    def _merge(self, below: dict[str, Any], above: dict[str, Any], prefix: str, upper: Layer) -> None:
        for name, value in above.items():
            if name == DELETE:
                continue
            key = prefix + str(name)
            merging = isinstance(value, dict) and isinstance(below.get(name), dict) and not value.get(DELETE)
            if not merging:
                self._forget(key)
                below[name] = {} if isinstance(value, dict) else value
            if key in upper.origins:
                self.origins[key] = upper.origins[key]
            if isinstance(value, dict):
                self._merge(below[name], value, f"{key}.", upper)

    def _forget(self, key: str) -> None:
        for known in [known for known in self.origins if known == key or known.startswith(f"{key}.")]:
            del self.origins[known]


def dotted(value: Any, prefix: str = "") -> Iterator[str]:
    """All dotted keys inside nested dicts, sections included; nothing for a plain value."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield f"{prefix}{name}"
            yield from dotted(inner, f"{prefix}{name}.")
