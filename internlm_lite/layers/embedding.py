"""Token embedding, split over the tensor-parallel ranks along the hidden dimension or along the vocabulary.

split hidden:      each rank looks up its columns for every token; all-gather of columns
split vocabulary:  each rank looks up the tokens whose rows it holds, zero for the others; sum over ranks

With sequence parallelism each rank ends with all columns of its own tokens in either case.
"""

from __future__ import annotations

import torch

from internlm_lite.config.schema import ModelConfig
from internlm_lite.layers.costs import Bytes, CostedLayer, Message, Pass, RowShape
from internlm_lite.layers.positions import LearnedPositions, look_up, look_up_passes, sinusoidal
from internlm_lite.layers.tensor_parallel import TensorParallelContext
from internlm_lite.mesh import comm
from internlm_lite.mesh.conjugate import columns_to_rows, gather_last
from internlm_lite.mesh.layout import Parameter, split


class Embedding(CostedLayer):
    """tokens [T] int64 -> embeddings [T, hidden], or this rank's rows of them (layers/tensor_parallel.py).

    model.embed_grad_scale = a multiplies the gradient by a: e <- a*e + (1-a)*e.detach() (embedding gradient shrink:
    GLM-130B, arXiv:2210.02414, section 2.2), before positions are added. `partial_over`: see `ShardSpec.partial_over`.
    """

    weights_in_backward = False

    def __init__(
        self,
        name: str,
        config: ModelConfig,
        tp_ctx: TensorParallelContext,
        partial_over: tuple[str, ...] = (),
        tied: Parameter | None = None,
    ) -> None:
        """`tied`: the weight of another embedding, in the place of one of its own."""
        super().__init__()
        self.tp_ctx = tp_ctx
        self.split_hidden = not config.embedding_by_vocabulary
        self.grad_scale = config.embed_grad_scale
        scale = 1.0 if config.embed_scale is None else config.embed_scale
        self.scale: float = comm.read(torch.tensor(scale, dtype=tp_ctx.dtype))  # rounded, on the host
        self.borrowed = () if tied is None else (tied,)
        """Parameters that another unit registers, which the tuple hides from nn.Module here."""
        if tied is None:
            shape, dim = (config.vocab_size, config.hidden_size), 1 if self.split_hidden else 0
            std = config.init_std
            layout = split(f"{name}.weight", shape, dim, tp_ctx.group, init_std=std, partial_over=partial_over)
            self.weight = tp_ctx.parameter(layout)
            self.weight.manual_grad = self.weight.deferred_grad = self.weight.looked_up = True
        else:
            tied.grads_per_microbatch += 1
        self.position = config.position
        self.positions = LearnedPositions(f"{name}.positions", config, tp_ctx) if self.position == "learned" else None

    @property
    def matrix(self) -> Parameter:
        """The weight: its own, or the one it shares."""
        return self.borrowed[0] if self.borrowed else self.weight

    def forward(self, tokens: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
        """`positions` [T] int64: each token's in its document, for learned and sinusoidal ones."""
        return self._gathered(tokens, positions) if self.split_hidden else self._summed(tokens, positions)

    def _gathered(self, tokens: torch.Tensor, positions: torch.Tensor | None) -> torch.Tensor:
        mine, group = self._graded(look_up(self.matrix, tokens)), self.tp_ctx.group
        if (added := self._added(positions)) is not None:
            mine = mine + added
        return columns_to_rows(mine, group) if self.tp_ctx.by_sequence else gather_last(mine, group)

    def _summed(self, tokens: torch.Tensor, positions: torch.Tensor | None) -> torch.Tensor:
        rows = self.matrix.shape[0]
        local = tokens - self.tp_ctx.group.rank * rows
        here = (local >= 0) & (local < rows)
        mine = self._graded(look_up(self.matrix, local.clamp(0, rows - 1))) * here.unsqueeze(-1)
        if (added := self._added(positions)) is not None:
            mine[:, self._columns.start : self._columns.stop] += added
        return self.tp_ctx.leave(mine)

    def _graded(self, e: torch.Tensor) -> torch.Tensor:
        # lerp(e, e, a) = e + a*(e - e): exactly e, in every dtype.
        e = e if self.grad_scale == 1 else torch.lerp(e.detach(), e, self.grad_scale)
        return e if self.scale == 1 else e * self.scale

    def _added(self, positions: torch.Tensor | None) -> torch.Tensor | None:
        """This rank's columns of what is added to the token embedding."""
        if self.position not in ("learned", "sinusoidal"):
            return None
        assert positions is not None, "the first stage is given the positions of its tokens"
        if self.positions is not None:
            added: torch.Tensor = self.positions(positions)
            return added
        return sinusoidal(positions, self.matrix.shard_spec.shape[1], self._columns, self.matrix.dtype)

    @property
    def _columns(self) -> range:
        """The columns to which this rank adds positions."""
        width, group = self.matrix.shard_spec.shape[1], self.tp_ctx.group
        return range(width * group.rank // group.size, width * (group.rank + 1) // group.size)

    def lookup_ops_per_token(self) -> int:
        """Cost of a lookup in the unit of `flops_per_token`, to balance pipeline stages: one per element copied."""
        return self.matrix.shard_spec.shape[1] * (2 if self.position in ("learned", "sinusoidal") else 1)

    def saved_bytes(self, row: RowShape) -> Bytes:
        # Split vocabulary: each token's local row (int64) and whether it is on this rank (bool). Else the batch alone.
        return {"embedding": 0 if self.split_hidden else row.tokens * (8 + 1)}

    def passes(self, row: RowShape) -> list[Pass]:
        found = look_up_passes(self.matrix, row) + super().passes(row)
        if self.scale != 1:
            n_bytes = 2 * row.tokens * self.matrix.shape[1] * self.matrix.itemsize
            found += [Pass("elementwise", n_bytes, backward=back, part="embedding") for back in (False, True)]
        if self.position == "sinusoidal":  # angles, sines and cosines in float64, cast to one tensor, which is added
            n = row.tokens * len(self._columns)
            n_bytes = 8 * n // 2 * 5 + self.matrix.itemsize * n * 6
            found.append(Pass("elementwise", n_bytes, 7, part="embedding"))
        return found

    def messages(self, row: RowShape) -> list[Message]:
        tp_ctx, n_outputs = self.tp_ctx, row.tokens * self.matrix.shard_spec.shape[1]
        if not self.split_hidden:
            return tp_ctx.sum_messages(n_outputs) + tp_ctx.gather_messages(n_outputs, backward=True)
        n_bytes = n_outputs * self.matrix.itemsize
        if not tp_ctx.by_sequence:
            return [Message("tp", "all_gather", n_bytes)]
        return [Message("tp", "all_to_all", n_bytes // tp_ctx.group.size, backward=back) for back in (False, True)]
