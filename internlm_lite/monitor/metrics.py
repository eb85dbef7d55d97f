"""Loss and accuracy per data folder, summed on the device and read once per log interval.

sums[folder] = (labels, cross-entropy, correct, tokens)      added per micro-batch, in place, no host read
take():        a copy on the device, one all-reduce over the world, reset to zero
figures():     what such sums mean, once they are on the host

Only the last pipeline stage has losses; tensor-parallel ranks all have the same ones, so only the first counts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from internlm_lite.batch import IGNORE
from internlm_lite.mesh import comm
from internlm_lite.mesh.mesh import Mesh
from internlm_lite.monitor.record import FolderFigures


@dataclass(frozen=True)
class Collected:
    """Sums over the log interval and the whole job, on the host."""

    folders: dict[str, FolderFigures]
    """Figures per data folder, in the run's order."""
    loss: float
    """Mean training loss per label, with label smoothing; nan without labels."""
    cross_entropy: float
    """Mean cross-entropy per label, without label smoothing."""
    accuracy: float
    """Fraction of labels that the model predicted as the most likely token."""
    num_labels: int


class FolderMetrics:
    """Accumulates the results of `layers.loss.TokenLosses`."""

    def __init__(self, folders: Sequence[str], mesh: Mesh) -> None:
        self._folders = tuple(folders)
        self._world = mesh.world
        self._counts = mesh.tp.rank == 0
        # [labels, cross-entropy, correct, tokens] per folder, then the training loss, in one tensor for one all-reduce.
        self._sums = torch.zeros(4 * len(self._folders) + 1, dtype=torch.float64, device=mesh.device)

    def add(
        self,
        folders: torch.Tensor,
        labels: torch.Tensor,
        token_loss: torch.Tensor,
        correct: torch.Tensor,
        train_loss: torch.Tensor,
    ) -> None:
        """Add a micro-batch; no host sync. [T] each; `token_loss` is 0 without label; `train_loss` is a scalar sum."""
        if not self._counts:
            return
        learnt = labels != IGNORE
        index = folders.long()
        table = self._sums[:-1].view(4, -1)
        every = torch.ones_like(learnt)
        for row, values in zip(table, (learnt, token_loss, correct & learnt, every), strict=True):
            row.scatter_add_(0, index, values.double())
        self._sums[-1] += train_loss

    def total(self) -> torch.Tensor:
        """The sums since the last `take`, over all ranks, on the device. Collective; no host read."""
        sums = self._sums.clone()
        comm.all_reduce(sums, self._world).wait()
        return sums

    def state_dict(self, sums: torch.Tensor) -> dict[str, Any]:
        """`sums` as `total` returned them, JSON-able. Waits for the device."""
        # JSON has no nan; one non-finite step makes the sums nan until the next line
        values = [value if math.isfinite(value) else repr(value) for value in comm.read(sums)]
        return {"folders": list(self._folders), "sums": values}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from the sums of `state_dict`; ignored if the data folders have changed."""
        self._sums.zero_()
        if self._world.rank == 0 and tuple(state["folders"]) == self._folders:
            self._sums.copy_(torch.tensor([float(value) for value in state["sums"]], dtype=torch.float64))

    def take(self) -> torch.Tensor:
        """`total`, for `figures`; resets the sums. Collective; no host read."""
        sums = self.total()
        self._sums.zero_()
        return sums

    def collect(self) -> Collected:
        """`figures` of the sums since the last call; resets them. Collective; waits for the device."""
        return self.figures(comm.read(self.take()))

    def figures(self, sums: Sequence[float]) -> Collected:
        *values, train_loss = sums
        n = len(self._folders)
        labels, losses, correct, seen = (values[row * n : (row + 1) * n] for row in range(4))
        total = sum(labels)
        return Collected(
            folders={
                name: FolderFigures(
                    tokens=int(labels[i]),
                    loss=losses[i] / labels[i] if labels[i] else math.nan,
                    acc=correct[i] / labels[i] if labels[i] else 0.0,
                    seen=int(seen[i]),
                )
                for i, name in enumerate(self._folders)
            },
            loss=train_loss / total if total else math.nan,
            cross_entropy=sum(losses) / total if total else math.nan,
            accuracy=sum(correct) / total if total else 0.0,
            num_labels=int(total),
        )
