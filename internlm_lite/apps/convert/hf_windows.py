"""Sliding windows in Hugging Face's config.json."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from internlm_lite.errors import CheckpointError

FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class WindowKeys:
    """Which layers of a family have a window."""

    default: int | None
    """Of the key sliding_window."""
    is_sliding: Callable[[Mapping[str, Any], int], bool] = lambda config, layer: True
    """Whether a layer is, where the key layer_types says nothing. Gets config.json and the layer's number."""
    has_types: bool = True
    """Whether the family has the key layer_types."""
    flag: str | None = None
    """A key that switches windows on; off where it is left out."""

    def read(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Our features. Raises CheckpointError for layers of other kinds."""
        window, layers = config.get("sliding_window", self.default), config["num_hidden_layers"]
        if window is None or (self.flag is not None and not config.get(self.flag)):
            return {"sliding_window": None, "layer_types": None}
        types = config.get("layer_types") if self.has_types else None
        if types is None:
            types = [SLIDING if self.is_sliding(config, layer) else FULL for layer in range(layers)]
        if not isinstance(types, list) or len(types) != layers or not {*map(str, types)} <= {FULL, SLIDING}:
            raise CheckpointError(f"layer_types: found {types!r}, expected {FULL!r} or {SLIDING!r} for each layer")
        if SLIDING not in types:
            return {"sliding_window": None, "layer_types": None}
        return {"sliding_window": window, "layer_types": None if FULL not in types else _period(types)}

    def write(self, features: Mapping[str, Any]) -> dict[str, Any]:
        """The keys of config.json."""
        window, types = features["sliding_window"], features["layer_types"]
        keys: dict[str, Any] = {"sliding_window": window}
        if self.has_types:
            if window is None and self.flag is None:  # their code makes a mask with it, also where no layer takes it
                keys["sliding_window"] = self.default
            keys["layer_types"] = types or [FULL] * features["num_layers"]
        if self.flag is not None:
            first = types.index(SLIDING) if types else features["num_layers"]
            keys |= {self.flag: window is not None, "max_window_layers": first}
        return keys


def _period(types: list[str]) -> list[str]:
    """The shortest beginning that, repeated, gives all."""
    for length in range(1, len(types)):
        if all(kind == types[layer % length] for layer, kind in enumerate(types)):
            return types[:length]
    return types
