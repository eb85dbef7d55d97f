"""Texts about a load for the user: the LOAD PLAN, and the differences between checkpoint and model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

from internlm_lite.checkpoint.format.catalog import Found
from internlm_lite.checkpoint.format.tensor_file import DTYPES
from internlm_lite.units import human_bytes

Shape = tuple[int, ...]
Wanted = Mapping[str, Mapping[str, Shape]]
"""role -> name -> shape of the whole tensor, over all ranks."""

_LINES = 12
_HEADS = "num_attention_heads"
_FUNCTION = (
    *(_HEADS, "num_kv_attention_heads", "head_dim", "norm_position", "norm_type", "layer_norm_epsilon"),
    *("zero_centered_norm", "position", "rope_base", "rope_local_base", "rope_scaling", "partial_rotary_factor"),
    *("no_rope_every", "sliding_window", "layer_types", "attention_softcap", "attention_scale", "mlp_type"),
    *("embed_scale", "logit_scale", "logit_softcap"),
)
"""Keys of the model config that change its function but not the shape of any tensor."""


def mismatch(found: Found, wanted: Wanted, config: Mapping[str, Any]) -> str | None:
    """An error message if the checkpoint does not fit the requested tensors, else None."""
    stored = found.manifest.tensors
    lines: list[str] = []
    tensors: dict[str, list[str]] = {"other shape": [], "only in the model": [], "only in the checkpoint": []}
    for role, names in wanted.items():
        have = stored.get(role)
        if have is None:
            lines.append(f"{role}: the checkpoint has none (it has {', '.join(stored) or 'no tensors'})")
            continue
        tensors["only in the model"] += [f"{name} {list(shape)}" for name, shape in names.items() if name not in have]
        tensors["only in the checkpoint"] += [
            f"{name} {list(entry.shape)}"
            for name, entry in have.items()
            if name not in names and (role == "master" or name not in wanted.get("master", ()))  # another rule's state
        ]
        tensors["other shape"] += [
            f"{name}: checkpoint {list(have[name].shape)}, model {list(shape)}"
            for name, shape in names.items()
            if name in have and have[name].shape != shape
        ]
    for what, items in tensors.items():
        once = list(dict.fromkeys(items))  # the moments of a weight have its shape
        lines += _block(f"{what} ({len(once)}):", once)
    if set(wanted) - {"master", "ema"}:
        title = "same shapes, another function (its weights alone are taken with ckpt.load_model_only_folder):"
        lines += _block(title, other_function(found, config))
    if not lines:
        return None
    keys = differing_keys(found.manifest.config, config)
    keys = [one for one in keys if one[0].startswith("model.")] or keys
    causes = [f"{key} {a!r} in the checkpoint, {b!r} in this run" for key, a, b in keys]
    return (
        f"checkpoint {found.name} in {found.storage.name} belongs to another model:\n  "
        + "\n  ".join([*_first(causes), *lines])
        + "\nuse the config the checkpoint was saved with, or choose another checkpoint or save folder"
    )


def other_function(found: Found, config: Mapping[str, Any]) -> list[str]:
    """One line per config key with which the model computes another function of the same weights."""
    saved, ours = (dict(one.get("model") or {}) for one in (found.manifest.config, config))
    for model in (saved, ours):
        if model.get("num_kv_attention_heads", "") is None:  # None: as many as query heads
            model["num_kv_attention_heads"] = model[_HEADS]
        if model.get("norm_position") is None and "apply_post_layer_norm" in model:
            model["norm_position"] = "post" if model["apply_post_layer_norm"] else "pre"
        if model:  # a load that says nothing of its model compares nothing
            model.setdefault("zero_centered_norm", False)
    known = [(key, saved[key], ours[key]) for key in _FUNCTION if key in saved and key in ours]
    return [f"model.{key}: checkpoint {a!r}, this run {b!r}" for key, a, b in known if a != b]


def _block(title: str, items: Sequence[str]) -> list[str]:
    if not items:
        return []
    return [title, *(f"  {item}" for item in _first(items))]


def _first(items: Sequence[str]) -> list[str]:
    return [*items[:_LINES], *([f"... and {len(items) - _LINES} more"] if len(items) > _LINES else [])]


def differing_keys(saved: Mapping[str, Any], ours: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """(dotted key, saved value, our value) for each difference of two configs, `model` keys first."""
    one, two = dict(_flatten(saved, "")), dict(_flatten(ours, ""))
    keys = sorted(one.keys() | two.keys(), key=lambda key: (not key.startswith("model."), key))
    return [(key, one.get(key), two.get(key)) for key in keys if one.get(key) != two.get(key)]


def _flatten(config: Mapping[str, Any], prefix: str) -> list[tuple[str, Any]]:
    flat: list[tuple[str, Any]] = []
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat += _flatten(value, f"{prefix}{key}.")
        else:
            flat.append((prefix + key, value))
    return flat


def load_plan(
    found: Found, wanted: Wanted, layout: Mapping[str, int], rank_states: int, config: Mapping[str, Any]
) -> str:
    """The LOAD PLAN: checkpoint, loaded parts, config differences. `rank_states`: number of rank states loaded."""
    manifest = found.manifest
    taken: list[str] = []
    left: list[str] = []
    for role, named in manifest.tensors.items():
        size = sum(prod(entry.shape) * DTYPES[entry.dtype].itemsize for entry in named.values())
        (taken if role in wanted else left).append(f"{role} ({len(named)} tensors, {human_bytes(size)})")
    saved_ranks = len(manifest.rank_state)
    taken += ["state", f"rank state of {rank_states} of {saved_ranks} ranks"] if saved_ranks else ["state"]
    written = ", ".join(f"{what} {version}" for what, version in manifest.versions.items())
    keys = differing_keys(manifest.config, config) if manifest.config and config else []
    differences = [f"{key}: {a!r} -> {b!r}" for key, a, b in keys]
    rows = [
        ("folder", found.storage.name),
        ("checkpoint", f"{manifest.name} ({manifest.kind}, step {manifest.step}; {written})"),
        *(("passed over", reason) for reason in found.rejected),
        ("layout", f"{_axes(manifest.layout)} -> {_axes(layout)}"),
        ("taken", ", ".join(taken)),
        ("not taken", ", ".join(left)),
        *(("config", difference) for difference in _first(differences)),
    ]
    return "LOAD PLAN\n" + "\n".join(f"  {what:<12}{text}" for what, text in rows if text)


def _axes(layout: Mapping[str, int]) -> str:
    return " ".join(f"{axis}={size}" for axis, size in layout.items())
