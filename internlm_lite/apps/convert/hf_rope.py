"""The rotary embedding in Hugging Face's config.json, in the spellings of transformers 4 and 5."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

from internlm_lite.config.schema import RopeScaling
from internlm_lite.errors import CheckpointError

_PLAIN = ("default", "origin")
_KINDS: tuple[str, ...] = get_args(RopeScaling.model_fields["rope_type"].annotation)
_OWN = {"beta_fast": "yarn", "beta_slow": "yarn", "truncate": "yarn", "attention_factor": "yarn"}
_OWN |= {"low_freq_factor": "llama3", "high_freq_factor": "llama3"}
"""Field of RopeScaling -> the only kind that reads it."""


_NAMES = {"type": "rope_type", "base": "rope_theta"}
"""Older names of keys."""


@dataclass(frozen=True)
class Rotation:
    """How a family describes its rotary embedding."""

    base: tuple[str, float] = ("rope_theta", 10000.0)
    """Key and default."""
    kinds: tuple[str, ...] = _KINDS
    """Of scaling, that its modelling code computes as we do."""
    has_rotary: bool = False
    """InternLM's own code reads a key `rotary`."""

    def read(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Our features. Raises CheckpointError for another rotation than ours."""
        name, default = self.base
        found: dict[str, Any] = {"rope_theta": config.get(name) or config.get("rope_theta") or default}
        for key in ("rotary", "rope_scaling", "rope_parameters"):
            section = config.get(key)
            if isinstance(section, Mapping):
                found |= {_NAMES.get(str(key), str(key)): value for key, value in section.items() if value is not None}
        base, kind = found["rope_theta"], found.get("rope_type", "default")
        if not isinstance(base, int | float) or base <= 0:
            raise CheckpointError(f"{name}: found {base!r}, expected a positive number")
        share = found.get("partial_rotary_factor", config.get("partial_rotary_factor"))
        if share not in (None, 1):
            raise CheckpointError(f"partial_rotary_factor: found {share!r}, expected 1 in this family")
        return {"rope_base": base, "rope_scaling": self._scaling(kind, found, config)}

    def _scaling(self, kind: str, found: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any] | None:
        if kind in (*_PLAIN, "dynamic"):
            return None
        if kind == "yarn" and (found.get("mscale") or found.get("mscale_all_dim")):
            kind = "yarn with mscale"
        if kind not in self.kinds:
            expected = ", ".join(map(repr, ("default", "dynamic", *self.kinds)))
            raise CheckpointError(f"rope: found type {kind!r}, expected none, or one of {expected} in this family")
        values = {key: found[key] for key in RopeScaling.model_fields if key in found} | {"rope_type": kind}
        if kind != "linear":
            values.setdefault("original_max_position_embeddings", config.get("max_position_embeddings"))
        return values

    def write(self, features: Mapping[str, Any]) -> dict[str, Any]:
        """The keys of config.json."""
        base = float(features["rope_base"])
        rotary = {"rotary": {"base": base, "type": "origin"}} if self.has_rotary else {}
        return {self.base[0]: base, "rope_scaling": features["rope_scaling"]} | rotary


def scaling_section(scaling: RopeScaling | None) -> dict[str, Any] | None:
    """rope_scaling in config.json: what its kind reads."""
    if scaling is None:
        return None
    others = {name for name, kind in _OWN.items() if kind != scaling.rope_type}
    return scaling.model_dump(exclude=others, exclude_none=True)
