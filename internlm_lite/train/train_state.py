"""Where a run stands: a value, replaced after every step, written into every checkpoint; and the random states."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from internlm_lite.batch import Batch, Position


@dataclass(frozen=True)
class TrainState:
    """Counters of the whole job, over all ranks."""

    step: int = 0
    """Training steps done; also the index of the next one."""
    position: Position = field(default_factory=Position)
    """Next batch in the data order."""
    consumed_tokens: int = 0
    """Tokens seen, with and without labels."""

    def after(self, batch: Batch, dp_size: int) -> TrainState:
        """The state once `batch` was trained on by each of `dp_size` ranks."""
        return replace(
            self,
            step=self.step + 1,
            position=batch.after,
            consumed_tokens=self.consumed_tokens + batch.tokens.numel() * dp_size,
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(stored: dict[str, Any]) -> TrainState:
        return TrainState(**{**stored, "position": Position(**stored["position"])})


def random_states(device: torch.device) -> dict[str, torch.Tensor]:
    """States of this rank's random generators, uint8."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_random_states(states: dict[str, torch.Tensor], device: torch.device) -> None:
    """Undo `random_states`; a state of a device that this run does not use is left alone."""
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
