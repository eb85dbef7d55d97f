"""The rotary embedding in Hugging Face's config.json, in the spellings of transformers 4 and 5."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

from internlm_lite.apps.convert.hf_windows import FULL, SLIDING
from internlm_lite.config.schema import ModelConfig, RopeScaling
from internlm_lite.errors import CheckpointError

_PLAIN = ("default", "origin")
_KINDS: tuple[str, ...] = get_args(RopeScaling.model_fields["rope_type"].annotation)
_OWN = {"beta_fast": "yarn", "beta_slow": "yarn", "truncate": "yarn", "attention_factor": "yarn"}
_OWN |= {"low_freq_factor": "llama3", "high_freq_factor": "llama3"}
"""Field of RopeScaling -> the only kind that reads it."""
_NAMES = {"type": "rope_type", "base": "rope_theta", "scaling_factor": "factor"}
"""Older names of keys."""


@dataclass(frozen=True)
class RopeKeys:
    """How a family describes its rotary embedding."""

    base: tuple[str, float] = ("rope_theta", 10000.0)
    """Key and default."""
    kinds: tuple[str, ...] = _KINDS
    """Of scaling, that its modelling code computes as we do."""
    share: tuple[str, float] | None = None
    """Key and default of the share of a head that is rotated."""
    by_layer: bool = False
    """Sliding layers have a base of their own, and no scaling."""
    local_base: float | None = None
    """Its default; None: the base of the other layers."""
    has_rotary: bool = False
    """InternLM's own code reads a key `rotary`."""

    def read(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Our features. Raises CheckpointError for another rotation than ours."""
        name, default = self.base
        found, local = {"rope_theta": config.get(name) or default}, dict[str, Any]()
        said: dict[str, Any] = {}
        for key in ("rotary", "rope_scaling", "rope_parameters"):
            section = config.get(key)
            if not isinstance(section, Mapping):
                continue
            if FULL in section or SLIDING in section:
                if not self.by_layer:
                    raise CheckpointError(f"{key}: found one for each kind of layer, expected one for all")
                section, local = (_object(section.get(kind), f"{key}.{kind}") for kind in (FULL, SLIDING))
            elif self.by_layer and key == "rope_parameters" and section:
                raise CheckpointError(f"{key}: found one for all layers, expected one for each kind of layer")
            one = _in_new_names(section)
            if contradictions := [name for name in one if name in said and said[name] != one[name]]:
                other = contradictions[0]
                raise CheckpointError(f"{key}: found {other} {one[other]!r}, but {said[other]!r} elsewhere: correct it")
            said |= one
        found |= said
        if not isinstance(found["rope_theta"], int | float) or found["rope_theta"] <= 0:
            raise CheckpointError(f"{name}: found {found['rope_theta']!r}, expected a positive number")
        read = {"rope_base": found["rope_theta"], "rope_scaling": self._scaling(found, config)}
        return read | self._share(found, config) | self._local(found, local, config)

    def _scaling(self, found: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any] | None:
        kind = found.get("rope_type", "default")
        if kind in _PLAIN:
            return None
        if kind == "yarn" and (found.get("mscale") or found.get("mscale_all_dim")):
            kind = "yarn with mscale"
        if kind not in self.kinds:
            expected = ", ".join(map(repr, ("default", *self.kinds)))
            raise CheckpointError(f"rope: found type {kind!r}, expected {expected} in this family")
        values = {key: found[key] for key in RopeScaling.model_fields if key in found} | {"rope_type": kind}
        if kind == "dynamic":  # its original length is no key
            values["original_max_position_embeddings"] = config["max_position_embeddings"]
        elif kind != "linear":
            values.setdefault("original_max_position_embeddings", config["max_position_embeddings"])
        return {"factor": 1.0, **values} if self.has_rotary else values

    def _share(self, found: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
        key, default = self.share or ("partial_rotary_factor", 1.0)
        share = found.get("partial_rotary_factor", config.get(key, config.get("partial_rotary_factor", default)))
        if self.share is None and share not in (None, 1):
            raise CheckpointError(f"partial_rotary_factor: found {share!r}, expected 1 in this family")
        return {} if self.share is None else {"partial_rotary_factor": share}

    def _local(self, found: Mapping[str, Any], local: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
        if not self.by_layer:
            return {}
        kind = local.get("rope_type", "default")
        if kind not in _PLAIN:
            raise CheckpointError(f"rope_parameters.{SLIDING}: found type {kind!r}, expected 'default'")
        base = local.get("rope_theta") or config.get("rope_local_base_freq") or self.local_base
        return {"rope_local_base": base or found["rope_theta"]}

    def write(self, features: Mapping[str, Any]) -> dict[str, Any]:
        """The keys of config.json."""
        base, scaling = float(features["rope_base"]), dict(features["rope_scaling"] or {})
        if scaling.get("rope_type") == "dynamic":
            del scaling["original_max_position_embeddings"]
        keys: dict[str, Any] = {self.base[0]: base, "rope_scaling": scaling or None}
        if self.has_rotary:
            kind = {"type": "dynamic", "scaling_factor": scaling["factor"]} if scaling else {"type": "origin"}
            keys |= {"rotary": {"base": base, **kind}, "rope_scaling": None}
        if self.share is not None:
            keys[self.share[0]] = features["partial_rotary_factor"]
        if self.by_layer:
            local = float(features["rope_local_base"] or base)
            full = {"rope_type": "default", **scaling, "rope_theta": base}
            keys["rope_parameters"] = {FULL: full, SLIDING: {"rope_type": "default", "rope_theta": local}}
            keys["rope_local_base_freq"] = local
        return keys


def _object(value: Any, where: str) -> dict[str, Any]:
    if value is not None and not isinstance(value, Mapping):
        raise CheckpointError(f"{where}: found {value!r}, expected an object")
    return dict(value or {})


def _in_new_names(section: Mapping[str, Any]) -> dict[str, Any]:
    """Without what is null. Where both names of a key are there, the newer one counts, as in transformers."""
    given = {name: value for name, value in section.items() if value is not None}
    return {_NAMES.get(name, name): value for name, value in given.items() if _NAMES.get(name) not in given}


@dataclass(frozen=True)
class NoRopeKeys:
    """Which layers have no rotary embedding (SmolLM3): those with 0 in the list no_rope_layers."""

    def read(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Our features. Raises CheckpointError for a list without a period."""
        every, rotated = config.get("no_rope_layer_interval", 4), config.get("no_rope_layers")
        n_layers = config["num_hidden_layers"]
        if isinstance(rotated, list):
            rotated = rotated[:n_layers]
            every = rotated.index(0) + 1 if 0 in rotated else 0
        if type(every) is not int or every < 0 or rotated not in (None, _rotated(every, n_layers)):
            raise CheckpointError(f"no_rope_layers: found {rotated!r}, expected 0 for every n-th layer alone")
        return {"no_rope_every": every}

    def write(self, features: Mapping[str, Any]) -> dict[str, Any]:
        """The keys of config.json."""
        every, n_layers = features["no_rope_every"], features["num_layers"]
        return {"no_rope_layers": _rotated(every, n_layers), "no_rope_layer_interval": every or n_layers + 1}


def _rotated(every: int, n_layers: int) -> list[int]:
    """no_rope_layers, which is 1 where there is a rotation."""
    return [int(not every or layer % every > 0) for layer in range(1, n_layers + 1)]


def scaling_features(model: ModelConfig) -> dict[str, Any] | None:
    """model.rope_scaling: what its kind reads."""
    if model.rope_scaling is None:
        return None
    kind = model.rope_scaling.rope_type
    found = model.rope_scaling.model_dump(
        exclude={name for name, own in _OWN.items() if own != kind}, exclude_none=True
    )
    if kind == "dynamic":
        found.setdefault("original_max_position_embeddings", model.max_position_embeddings)
    return found
