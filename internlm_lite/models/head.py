"""The output projection to the vocabulary, with the loss fused in. Its weight may be the embedding's."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from internlm_lite.config.schema import ModelConfig
from internlm_lite.layers.loss import TokenLosses, linear_cross_entropy
from internlm_lite.layers.placement import Placement
from internlm_lite.mesh.conjugate import gather_last
from internlm_lite.mesh.layout import Parameter, parameter, split


class Head(nn.Module):
    """Rows of the vocabulary are split over the group.

    `tied`: the embedding's weight, where this rank has it. A tied head on another rank holds a copy, `tied_over`.
    """

    def __init__(
        self,
        config: ModelConfig,
        label_smoothing: float,
        tied: Parameter | None,
        place: Placement,
        tied_over: tuple[str, ...],
    ) -> None:
        super().__init__()
        self.place = place
        self.label_smoothing = label_smoothing
        self.parallel_output = config.parallel_output
        # A tied weight is a parameter of the embedding alone; the tuple keeps nn.Module from registering it here too.
        self._tied = None if tied is None else (tied,)
        if tied is None:
            shape = (config.vocab_size, config.hidden_size)
            name = "tok_embeddings.weight" if config.tie_word_embeddings else "output.weight"
            layout = split(name, shape, 0, place.group, init_std=config.init_std, summed=tied_over)
            self.weight = parameter(layout, place.dtype, place.device)

    @property
    def matrix(self) -> torch.Tensor:
        """[vocab / group size, hidden]"""
        return self.weight if self._tied is None else self._tied[0]

    def forward(
        self, hidden: torch.Tensor, labels: torch.Tensor | None = None, scale: torch.Tensor | None = None
    ) -> TokenLosses | torch.Tensor:
        """hidden from outside -> logits [T, vocab], gathered over the group. With labels [T] and scale: TokenLosses."""
        hidden = self.place.enter(hidden)
        if labels is None or scale is None:
            return gather_last(F.linear(hidden, self.matrix), self.place.group)
        return linear_cross_entropy(
            hidden,
            self.matrix,
            labels,
            scale,
            label_smoothing=self.label_smoothing,
            group=self.place.group,
            parallel_output=self.parallel_output,
        )
