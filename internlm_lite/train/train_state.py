"""The counters of a run (immutable, replaced after every step) and the random states; checkpoints store both."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from internlm_lite.batch import Batch, Position


@dataclass(frozen=True)
class TrainState:
    """Counters of the whole job, over all ranks."""

    step: int = 0
    """Number of training steps done; also the index of the next step."""
    position: Position = field(default_factory=Position)
    """Position of the next batch in the data order."""
    consumed_tokens: int = 0
    """Tokens trained on, with and without labels."""

    def after(self, batch: Batch, dp_size: int) -> TrainState:
        """The state after a step in which each of `dp_size` ranks trained on a batch of the size of `batch`."""
        return replace(
            self,
            step=self.step + 1,
            position=batch.after,
            consumed_tokens=self.consumed_tokens + batch.tokens.numel() * dp_size,
        )

    def to_json(self) -> dict[str, Any]:
        stored = asdict(self)
        stored["position"]["borders"] = list(self.position.borders)
        return stored

    @staticmethod
    def from_json(stored: dict[str, Any]) -> TrainState:
        position = stored["position"]
        borders = tuple(position.get("borders", ()))  # older checkpoints have none
        return TrainState(**{**stored, "position": Position(**{**position, "borders": borders})})


def random_states(device: torch.device) -> dict[str, torch.Tensor]:
    """States of this rank's torch generators: "cpu" and, on a GPU, "cuda"; 1-D uint8 on the host."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_random_states(states: dict[str, torch.Tensor], device: torch.device) -> None:
    """Restore what `random_states` returned; a "cuda" state is ignored if `device` is not a GPU."""
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
