"""Which weights of a checkpoint are meant: the masters, or their averages if the run kept any."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from internlm_lite.checkpoint.format.catalog import Found
from internlm_lite.errors import CheckpointError

Weights = Literal["model", "ema"]
MASTER = "master"
_ROLES: dict[Weights, str] = {"model": MASTER, "ema": "ema"}


def with_weights(found: Found, weights: Weights) -> Found:
    """`found`, seen as a checkpoint whose masters are these weights. Raises CheckpointError if it has none."""
    role = _ROLES[weights]
    if role == MASTER:
        return found
    tensors = found.manifest.tensors
    if role not in tensors:
        raise CheckpointError(
            f"checkpoint {found.name} in {found.storage.name} has no averaged weights (role {role}), it has "
            f"{', '.join(tensors) or 'no tensors'}: expected one of a run with {role}=dict(...) in its config; choose "
            "another checkpoint, or leave out --weights"
        )
    return replace(found, manifest=found.manifest.model_copy(update={"tensors": {MASTER: tensors[role]}}))
