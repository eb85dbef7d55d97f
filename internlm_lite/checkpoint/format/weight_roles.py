"""The roles of a checkpoint that are weights of a model: the masters, and their averages if the run kept any."""

from __future__ import annotations

from internlm_lite.checkpoint.format.catalog import Found
from internlm_lite.errors import CheckpointError

MASTER = "master"
WEIGHTS = {"model": MASTER, "ema": "ema"}
"""What a user calls them -> role."""


def require_role(found: Found, role: str) -> None:
    """Raises CheckpointError if the checkpoint has no such weights."""
    if role not in found.manifest.tensors:
        has = ", ".join(found.manifest.tensors) or "no tensors"
        hint = "; averages are kept by a run with ema in its config" if role == WEIGHTS["ema"] else ""
        raise CheckpointError(
            f"checkpoint {found.name} in {found.storage.name} has no weights of the role {role}, it has {has}: "
            f"choose another checkpoint, or --weights model{hint}"
        )
