"""The Transformer: a decoder, or an encoder and a decoder. One class serves every mesh and every contiguous range of
layers.

    tokens [T] -> tok_embeddings -> Block 0 .. L-1 -> norm -> output -> losses [T]
    source [S] -> source_embeddings -> EncoderBlock 0 .. E-1 -> encoder_norm -> memory, which Block E .. E+L-1 attend to

    pre         x + attention(norm(x));        x + ffn(norm(x))           and a norm before the head
    post        norm(x + attention(x));        norm(x + ffn(x))           and no norm before the head
    reordered   x + norm(attention(x));        x + norm(ffn(x))           and a norm before the head
    sandwich    x + norm(attention(norm(x)));  x + norm(ffn(norm(x)))     and a norm before the head

Beside a source there is a third sub-layer between these two, of the same form: attention to the memory.

Inputs are rows of T packed tokens without a batch dimension; `attend` masks other documents. With sequence parallelism
the hidden state between blocks is [T / tp, hidden], else [T, hidden] (layers/tensor_parallel.py). Beside a source row
stages send [S + T, hidden], the source's part first: the first stage has both embeddings, so tied weights are on the
first and the last rank alone, and the memory travels with the decoder's hidden state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from typing import NamedTuple, TypeVar, cast

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from internlm_lite.config.schema import LossConfig, ModelConfig
from internlm_lite.errors import ConfigError
from internlm_lite.layers.attention import Attention
from internlm_lite.layers.compiled import compiled_in_training, is_wanted
from internlm_lite.layers.costs import Bytes, CostedLayer, Message, Pass, RowShape, add_bytes
from internlm_lite.layers.cross_attention import CrossAttention, Memory
from internlm_lite.layers.dropout import Dropout, Site, dropped_weights
from internlm_lite.layers.embedding import Embedding
from internlm_lite.layers.flash import Attend, AttentionBackend
from internlm_lite.layers.fp8 import Float8Products
from internlm_lite.layers.loss import TokenLosses
from internlm_lite.layers.mlp import FeedForward
from internlm_lite.layers.norm import Norm, build_norm
from internlm_lite.layers.offload import HostOffload
from internlm_lite.layers.products import Products
from internlm_lite.layers.recompute import Recipe, with_recipe
from internlm_lite.layers.rope import Rotary, Rotations, rotation_of
from internlm_lite.layers.scores import Drop
from internlm_lite.layers.source_side import OnSource, SourceEmbedding, SourceNorm
from internlm_lite.layers.tensor_parallel import TensorParallelContext
from internlm_lite.layers.weight_grads import WeightGrads
from internlm_lite.mesh.layout import Parameter
from internlm_lite.mesh.mesh import Mesh
from internlm_lite.models.head import Head
from internlm_lite.runtime.device import torch_dtype

T = TypeVar("T")


@dataclass(frozen=True)
class StageSpec:
    """Which part of a model one pipeline stage holds."""

    layers: range
    first: bool
    """Holds the embedding."""
    last: bool
    """Holds the final norm and the head."""
    tied_over: tuple[str, ...] = ()
    """("ends",) when a tied weight has two copies, because embedding and head are on different pipeline ranks."""


@dataclass(frozen=True)
class SourceRow:
    """The source row of a micro-batch, and how tokens look at it."""

    tokens: torch.Tensor
    """[S] int64; read on the first stage alone."""
    positions: torch.Tensor
    """[S] int64."""
    attend: Attend
    """Of source tokens to each other."""
    attend_across: Attend
    """Of target tokens to source tokens."""
    token_keys: torch.Tensor | None = None
    """[2, S], for dropout; None: nothing is dropped."""


class _Behind(NamedTuple):
    """What stands between the output of attention and the hidden state."""

    norm: Norm
    post_norm: Norm | None
    dropout: Dropout


class Block(CostedLayer):
    """x -> same shape, both outside split layers. `recompute`: save only x, and run again in the backward pass.

    With model.compile a training pass runs what is before attention and what is after it as one compiled graph each,
    the same for all layers of a kind. Attention stays outside, so that neither its kernel nor the documents of a row
    are part of a graph. Where collectives or deferred gradients would be inside, layers compile their elementwise work
    alone.
    """

    def __init__(self, config: ModelConfig, layer: int, tp_ctx: TensorParallelContext) -> None:
        super().__init__()
        self.tp_ctx = tp_ctx
        self.hidden_size = config.hidden_size
        self.norms_at = config.norms_at
        self.norms_inputs = config.norms_at in ("pre", "sandwich")
        self.recompute = layer < config.recomputed_layers
        self.offload = layer < config.offloaded_layers
        self.rotation = rotation_of(config, layer)
        name = f"{'encoder.' * config.in_encoder(layer)}layers.{config.on_its_side(layer)}"
        self.attention_norm = build_norm(f"{name}.attention_norm", config, tp_ctx)
        self.attention = Attention(f"{name}.attention", layer, config, tp_ctx)
        self.cross_attention_norm: Norm | None = None
        self.cross_attention: CrossAttention | None = None
        if config.num_encoder_layers and not config.in_encoder(layer):
            self.cross_attention_norm = build_norm(f"{name}.cross_attention_norm", config, tp_ctx)
            self.cross_attention = CrossAttention(f"{name}.cross_attention", layer, config, tp_ctx)
        self.ffn_norm = build_norm(f"{name}.ffn_norm", config, tp_ctx)
        self.feed_forward = FeedForward(f"{name}.feed_forward", layer, config, tp_ctx)
        self.attention_post_norm: Norm | None = None
        self.cross_attention_post_norm: Norm | None = None
        self.ffn_post_norm: Norm | None = None
        if self.norms_at == "sandwich":
            self.attention_post_norm = build_norm(f"{name}.attention_post_norm", config, tp_ctx)
            if self.cross_attention is not None:
                self.cross_attention_post_norm = build_norm(f"{name}.cross_attention_post_norm", config, tp_ctx)
            self.ffn_post_norm = build_norm(f"{name}.ffn_post_norm", config, tp_ctx)
        dropout = partial(Dropout, config.residual_dropout, layer, hidden_size=config.hidden_size, tp_ctx=tp_ctx)
        self.attention_dropout, self.ffn_dropout = (dropout(s) for s in (Site.ATTENTION_OUTPUT, Site.FEED_FORWARD))
        self.cross_attention_dropout = None if self.cross_attention is None else dropout(Site.CROSS_OUTPUT)
        whole = tp_ctx.compiled and tp_ctx.group.size == 1 and not tp_ctx.weight_grads.deferred
        if whole:
            self._require_manual_grads()
        self._before = compiled_in_training(Block._before_attention, wanted=whole)
        self._between = compiled_in_training(Block._between_attentions, wanted=whole)
        self._after = compiled_in_training(Block._after_attention, wanted=whole)

    def _require_manual_grads(self) -> None:
        """Raises ConfigError for a parameter whose gradient may have another dtype, which torch.compile refuses."""
        for param in cast(Iterator[Parameter], self.parameters()):
            if param.dtype.itemsize < 4 and not param.manual_grad:
                raise ConfigError(
                    f"model.compile=True: the layer of {param.shard_spec.name} leaves its gradient to autograd, which "
                    f"torch.compile refuses for {param.dtype}: let it use `accumulating` and set `manual_grad`, as "
                    "RMSNorm does in layers/norm.py, or set model.compile=False"
                )

    def forward(
        self,
        x: torch.Tensor,
        rotary: Rotary | None,
        attend: Attend,
        token_keys: torch.Tensor | None = None,
        memory: Memory | None = None,
    ) -> torch.Tensor:
        """`token_keys`: of all tokens of the row, for dropout. `memory`: for cross-attention, if the block has it."""
        inputs = x, rotary, attend, token_keys, memory
        # Checkpointing inside `forward`: forward hooks run once per step, and not again in the recomputation.
        if self.recompute and torch.is_grad_enabled():
            return cast(torch.Tensor, checkpoint(self._run, *inputs, use_reentrant=False, preserve_rng_state=False))
        if self.tp_ctx.offload is not None and torch.is_grad_enabled():
            shared = [] if rotary is None else rotary.tables()  # by all blocks
            shared += [] if memory is None else [memory.hidden]
            shared += [*self.parameters(), *([] if token_keys is None else [token_keys])]
            with self.tp_ctx.offload.block(self.attention.layer, shared, moves=self.offload):
                return self._run(*inputs)
        return self._run(*inputs)

    def _run(
        self,
        x: torch.Tensor,
        rotary: Rotary | None,
        attend: Attend,
        token_keys: torch.Tensor | None,
        memory: Memory | None,
    ) -> torch.Tensor:
        mixed = attend(self.attention.rule, *self._before(self, x, rotary))
        if self.cross_attention is not None:
            assert memory is not None, "a decoder beside an encoder reads a source"
            x, *qkv = self._between(self, x, mixed, memory.hidden, token_keys)
            mixed = memory.attend(self.cross_attention.rule, *qkv)
        return self._after(self, x, mixed, token_keys)

    def _before_attention(
        self, x: torch.Tensor, rotary: Rotary | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if not self.norms_inputs:
            return self.attention.project(x, rotary)
        normed, recipe = with_recipe(self.attention_norm, x, wanted=self.tp_ctx.selective)
        return self.attention.project(normed, rotary, recipe)

    def _between_attentions(
        self, x: torch.Tensor, mixed: torch.Tensor, memory: torch.Tensor, token_keys: torch.Tensor | None
    ) -> tuple[torch.Tensor, ...]:
        """(x after attention, queries, keys and values of cross-attention)"""
        assert self.cross_attention is not None and self.cross_attention_norm is not None
        attention, behind = self._attentions()[0]
        x, entering, recipe = self._into_next(x, attention.output(mixed), token_keys, behind, self.cross_attention_norm)
        return x, self.cross_attention.queries(entering, recipe), *self.cross_attention.keys_values(memory)

    def _after_attention(self, x: torch.Tensor, mixed: torch.Tensor, token_keys: torch.Tensor | None) -> torch.Tensor:
        attention, behind = self._attentions()[-1]
        x, entering, recipe = self._into_next(x, attention.output(mixed), token_keys, behind, self.ffn_norm)
        y = self._normed(self.feed_forward(entering, recipe, token_keys), self.ffn_norm, self.ffn_post_norm)
        x = x + self.ffn_dropout(y, token_keys)
        return self.ffn_norm(x) if self.norms_at == "post" else x

    def _attentions(self) -> list[tuple[Attention | CrossAttention, _Behind]]:
        """In the order in which they run."""
        norms = self.attention_norm, self.attention_post_norm
        found: list[tuple[Attention | CrossAttention, _Behind]]
        found = [(self.attention, _Behind(*norms, self.attention_dropout))]
        if self.cross_attention is not None:
            assert self.cross_attention_norm is not None and self.cross_attention_dropout is not None
            cross_norms = self.cross_attention_norm, self.cross_attention_post_norm
            found.append((self.cross_attention, _Behind(*cross_norms, self.cross_attention_dropout)))
        return found

    def _into_next(
        self, x: torch.Tensor, y: torch.Tensor, token_keys: torch.Tensor | None, behind: _Behind, following: Norm
    ) -> tuple[torch.Tensor, torch.Tensor, Recipe | None]:
        """x and the output of attention -> (their sum, the input of the next sub-layer, whose norm is `following`, its
        recipe)."""
        wanted = self.tp_ctx.selective
        add = partial(self._add, behind, token_keys)
        if self.norms_at == "reordered":  # the norm keeps y, so the sum need not be kept
            x, recipe = with_recipe(add, x, y, wanted=wanted)
            return x, x, recipe
        x = add(x, y)
        if self.norms_at == "post":
            x, recipe = with_recipe(behind.norm, x, wanted=wanted)
            return x, x, recipe
        return x, *with_recipe(following, x, wanted=wanted)

    def _add(self, behind: _Behind, token_keys: torch.Tensor | None, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x + behind.dropout(self._normed(y, behind.norm, behind.post_norm), token_keys)

    def _normed(self, y: torch.Tensor, norm: Norm, post_norm: Norm | None) -> torch.Tensor:
        """What is added to the hidden state of the output of a sub-layer with these norms."""
        if self.norms_at == "reordered":
            return cast(torch.Tensor, norm(y))
        return y if post_norm is None else cast(torch.Tensor, post_norm(y))

    def saved_bytes(self, row: RowShape, *, recompute: bool | None = None) -> Bytes:
        """`recompute` overrides `self.recompute`. Those on the host are `host_bytes`."""
        if self.attention.layer < row.offloaded:
            return {}
        layer_input = self.tp_ctx.hidden_bytes(row.tokens, self.hidden_size)
        if self.recompute if recompute is None else recompute:
            return {"layer inputs": layer_input}
        # The first layer counts the block's input, too; it moves to "layer inputs", which recomputed blocks also have.
        kept = add_bytes({"layer inputs": layer_input}, super().saved_bytes(row), {"norm inputs": -layer_input})
        if row.selective:  # outputs of norms, and their sums, are made again
            kept["projection inputs"] -= layer_input * (len(self._attentions()) + self.norms_inputs)
        return kept

    def host_bytes(self, row: RowShape) -> int:
        """Bytes kept on the host instead: they leave the device once in a forward pass and return in the backward
        pass."""
        return sum(self.saved_bytes(replace(row, offloaded=0)).values()) if self.attention.layer < row.offloaded else 0

    def messages(self, row: RowShape) -> list[Message]:
        twice = 2 if self.recompute else 1
        return [m if m.backward else replace(m, times=twice * m.times) for m in super().messages(row)]

    def passes(self, row: RowShape) -> list[Pass]:
        """An addition to the hidden state after each sub-layer and one of its gradients; a compiled block joins all of
        them but one to a norm."""
        x, inner = self.tp_ctx.hidden_bytes(row.tokens, self.hidden_size), len(self._attentions())
        if "block" in row.fused:
            adds = [Pass("fused", (3 + 2 * inner) * x), Pass("fused", inner * x, 0, backward=True)]
            adds.append(Pass("elementwise", 3 * x, backward=True))
        else:
            adds = [Pass("elementwise", 3 * (1 + inner) * x, 1 + inner, backward=back) for back in (False, True)]
        return super().passes(row) + adds

    def workspace_bytes(self, row: RowShape) -> int:
        """Of the backward pass: the feed-forward part, which runs first, and the recomputed activations."""
        gradients = 2 * row.tokens * self.hidden_size * self.tp_ctx.dtype.itemsize  # of the output and of the input
        kept, kept_anyway = (sum(self.saved_bytes(row, recompute=flag).values()) for flag in (False, True))
        first = max(self.feed_forward.workspace_bytes(row), self.ffn_dropout.workspace_bytes(row))
        return first + gradients + (kept - kept_anyway) * self.recompute


class EncoderBlock(OnSource, Block):
    """A block of an encoder."""

    def saved_bytes(self, row: RowShape, *, recompute: bool | None = None) -> Bytes:
        return Block.saved_bytes(self, row.of_source, recompute=recompute)


class SourceDropout(OnSource, Dropout):
    """Of the encoder's embedding."""


class Transformer(CostedLayer):
    """The part `spec` of a model. `tied`: the embedding's weight for the head, if another stage of this rank has it."""

    def __init__(
        self,
        config: ModelConfig,
        loss: LossConfig,
        tp_ctx: TensorParallelContext,
        backend: AttentionBackend,
        spec: StageSpec,
        tied: Parameter | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.tp_ctx = tp_ctx
        self.backend = backend
        self.spec = spec
        self.tok_embeddings = Embedding("tok_embeddings", config, tp_ctx, spec.tied_over) if spec.first else None
        self.embedding_dropout = None
        if spec.first and config.embedding_dropout:
            self.embedding_dropout = Dropout(config.embedding_dropout, 0, Site.EMBEDDING, config.hidden_size, tp_ctx)
        self._add_encoder(config, tp_ctx, spec)
        self.set_rope_base(config.rope_base)
        decoder = [n for n in spec.layers if not config.in_encoder(n)]
        self.layers = nn.ModuleDict({str(config.on_its_side(n)): Block(config, n, tp_ctx) for n in decoder})
        has_norm = spec.last and config.norms_at != "post"
        self.norm = build_norm("norm", config, tp_ctx) if has_norm else None
        if config.tie_word_embeddings and self.tok_embeddings is not None:
            tied = self.tok_embeddings.weight
        self.output = Head(config, loss, tp_ctx, tied, spec.tied_over) if spec.last else None

    def _add_encoder(self, config: ModelConfig, tp_ctx: TensorParallelContext, spec: StageSpec) -> None:
        """The encoder's part of this stage."""
        self.source_embeddings: SourceEmbedding | None = None
        self.source_dropout: SourceDropout | None = None
        self.encoder_norm: SourceNorm | None = None
        numbers = [n for n in spec.layers if config.in_encoder(n)]
        self.encoder = nn.ModuleDict({str(n): EncoderBlock(config, n, tp_ctx) for n in numbers})
        if not config.num_encoder_layers:
            return
        if self.tok_embeddings is not None:
            shared = self.tok_embeddings.weight if config.tie_source_embeddings else None
            self.source_embeddings = SourceEmbedding("source_embeddings", config, tp_ctx, tied=shared)
            if config.embedding_dropout:
                p, site = config.embedding_dropout, Site.SOURCE_EMBEDDING
                self.source_dropout = SourceDropout(p, 0, site, config.hidden_size, tp_ctx)
        if config.num_encoder_layers - 1 in numbers and config.norms_at != "post":
            self.encoder_norm = SourceNorm("encoder.norm", config, tp_ctx)

    def set_rope_base(self, base: float) -> None:
        """Rotate by this base from now on, as a model built with it; everything that depends on it is made anew."""
        self.config = config = self.config.model_copy(update={"rope_base": base})
        sides = ([n for n in self.spec.layers if config.in_encoder(n) == flag] for flag in (False, True))
        self._rotations, self._source_rotations = (Rotations(config, side, self.tp_ctx.device) for side in sides)

    @property
    def rotates_by_length(self) -> bool:
        """Whether `hidden` reads `lengths`."""
        return self._rotations.by_length

    def hidden_bytes(self, row: RowShape) -> int:
        """Bytes of the hidden state that one stage sends to the next, that of the source beside it."""
        return sum(self.tp_ctx.hidden_bytes(n, self.config.hidden_size) for n in (row.tokens, row.source_tokens))

    def blocks(self) -> list[Block]:
        """The blocks of this stage, in order: first those of the encoder."""
        return [*self.encoder_blocks(), *self.decoder_blocks()]

    def encoder_blocks(self) -> list[EncoderBlock]:
        return [block for block in self.encoder.values() if isinstance(block, EncoderBlock)]

    def decoder_blocks(self) -> list[Block]:
        return [block for block in self.layers.values() if isinstance(block, Block)]

    def units(self) -> Iterator[CostedLayer]:
        """The modules in forward order, each called once per forward pass; they partition the parameters."""
        encoder = self.source_embeddings, self.source_dropout, *self.encoder_blocks(), self.encoder_norm
        decoder = self.tok_embeddings, self.embedding_dropout, *self.decoder_blocks(), self.norm, self.output
        for module in (*encoder, *decoder):
            if module is not None:
                yield module

    def weight_drop(self, token_keys: torch.Tensor | None, site: Site = Site.ATTENTION_WEIGHTS) -> Drop | None:
        """What drops attention weights of a row whose queries have these keys; None: nothing."""
        p, group = self.config.attention_dropout, self.tp_ctx.group
        if token_keys is None or not p:
            return None
        return dropped_weights(p, token_keys, group.rank * self.config.num_attention_heads // group.size, site)

    def hidden(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        attend: Attend,
        lengths: torch.Tensor | None = None,
        token_keys: torch.Tensor | None = None,
        source: SourceRow | Memory | None = None,
    ) -> torch.Tensor:
        """The hidden state after this stage's layers and, on the last stage, the final norm.

        `tokens`: [T] int64 on the first stage, else the hidden state of the previous stage. `positions`: [T] int64.
        `lengths`: see `Rotary`. `token_keys` [2, T]: of layers/dropout.py; None: nothing is dropped here. `source`: of
        an encoder-decoder, whose stages hand on the hidden states of both sides; a memory is not encoded.
        """
        memory = source if isinstance(source, Memory) else None
        if isinstance(source, SourceRow):
            tokens, memory = self._encoded(tokens, source)
        x = tokens if self.tok_embeddings is None else self.tok_embeddings(tokens, positions)
        if self.embedding_dropout is not None:
            x = self.embedding_dropout(x, token_keys)
        rotaries = self._rotations.at(positions, x.dtype, lengths)
        for block in self.decoder_blocks():
            x = block(x, rotaries[block.rotation], attend, token_keys, memory)
        if memory is not None and not self.spec.last:
            return torch.cat((memory.hidden, x))
        return x if self.norm is None else self.norm(x)

    def _encoded(self, tokens: torch.Tensor, source: SourceRow) -> tuple[torch.Tensor, Memory]:
        """(what `hidden` is given of the target side, the source after this stage's layers)"""
        if self.source_embeddings is not None:
            x = self.source_embeddings(source.tokens, source.positions)
        else:
            rows = self.tp_ctx.rows(len(source.positions))
            x, tokens = tokens.split([rows, len(tokens) - rows])
        if self.source_dropout is not None:
            x = self.source_dropout(x, source.token_keys)
        rotaries = self._source_rotations.at(source.positions, x.dtype)
        for block in self.encoder_blocks():
            x = block(x, rotaries[block.rotation], source.attend, source.token_keys)
        return tokens, Memory(x if self.encoder_norm is None else self.encoder_norm(x), source.attend_across)

    def losses(self, hidden: torch.Tensor, labels: torch.Tensor, scale: torch.Tensor) -> TokenLosses:
        """Losses from the output of `hidden` on the last stage; labels [T] int64 or IGNORE.

        `scale`: a scalar tensor that multiplies the loss to differentiate. Collective over tp.
        """
        assert self.output is not None, "only the last stage has a head"
        losses: TokenLosses = self.output(hidden, labels, scale)
        return losses

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Output of `hidden` on the last stage -> [T, vocab], whole on every tp rank. Collective over tp."""
        assert self.output is not None, "only the last stage has a head"
        return self.output(hidden)

    def saved_bytes(self, row: RowShape, *, recomputed: int | None = None) -> Bytes:
        """`recomputed`: the number of the model's first layers that are recomputed; None: as configured."""

        def flag(block: Block) -> bool:
            return block.recompute if recomputed is None else block.attention.layer < recomputed

        parts = self._of_blocks(lambda block: block.saved_bytes(row, recompute=flag(block)), row, flag)
        parts.append(self._rotations.saved_bytes(row, self.tp_ctx.dtype))
        parts.append(self._source_rotations.saved_bytes(row.of_source, self.tp_ctx.dtype))
        if self.config.num_encoder_layers - 1 in self.spec.layers and self.decoder_blocks():
            parts.append({"encoder output": self.tp_ctx.hidden_bytes(row.source_tokens, self.config.hidden_size)})
        others = self.source_embeddings, self.encoder_norm, self.tok_embeddings, self.output, self.norm
        parts += [unit.saved_bytes(row) for unit in others if unit is not None]
        return add_bytes(*parts)

    def input_bytes(self, row: RowShape) -> int:
        """Of what a previous stage has sent, the bytes that this stage's blocks take."""
        sides = (row.source_tokens, self.encoder_blocks()), (row.tokens, self.decoder_blocks())
        return sum(self.tp_ctx.hidden_bytes(n, self.config.hidden_size) for n, blocks in sides if blocks)

    def host_bytes(self, row: RowShape) -> int:
        """Of one micro-batch, see `Block`."""
        return sum(self._of_blocks(lambda block: block.host_bytes(row), row))

    def _of_blocks(
        self, cost: Callable[[Block], T], row: RowShape, flag: Callable[[Block], bool] = lambda block: block.recompute
    ) -> list[T]:
        """What a row costs each block. Blocks of a kind, which `flag` is a part of, are asked once."""
        known: dict[object, T] = {}
        found = []
        for block in self.blocks():
            moved = block.attention.layer < row.offloaded
            kind = type(block), block.rotation, block.attention.rule.window, moved, block.recompute, flag(block)
            if kind not in known:
                known[kind] = cost(block)
            found.append(known[kind])
        return found

    def _on_the_way_bytes(self, row: RowShape) -> int:
        """What blocks on their way to or from the host add to `saved_bytes` at the peak: tensors of a block leave while
        the next one computes, and return while the one behind it does."""
        most, behind = 0, 0  # kept by blocks behind this one, which are not there yet or no more
        moved = self._of_blocks(lambda block: block.host_bytes(row), row)
        kept = self._of_blocks(lambda block: sum(block.saved_bytes(row).values()), row)
        for own, before, here in reversed(list(zip(moved, [0, *moved[:-1]], kept, strict=True))):
            most = max(most, own + before - behind)
            behind += here
        return most

    def workspace_bytes(self, row: RowShape) -> int:
        """The maximum of `workspaces`."""
        return max(self.workspaces(row))

    def workspaces(self, row: RowShape) -> tuple[int, int]:
        """(of the loss, of the last block's backward pass less the head's activations, freed before it). Beside the
        latter blocks come back from the host."""
        backward = self.blocks()[-1].workspace_bytes(row) + self._on_the_way_bytes(row)
        if self.output is None:
            return 0, backward
        return self.output.workspace_bytes(row), backward - sum(self.output.saved_bytes(row).values())


def build_model(
    config: ModelConfig,
    loss: LossConfig,
    mesh: Mesh,
    backend: AttentionBackend,
    *,
    by_sequence: bool = False,
    source_share: Fraction = Fraction(1),
) -> Transformer:
    """All layers as one stage, uninitialised, on `mesh.device`; models/stages.py builds pipeline stages.

    `by_sequence`: sequence parallelism. Raises ConfigError when a shape is not divisible over `mesh.tp`.
    """
    spec = StageSpec(range(config.num_blocks), first=True, last=True)
    tp_ctx = tensor_parallel_context(config, mesh, by_sequence=by_sequence, source_share=source_share)
    return Transformer(config, loss, tp_ctx, backend, spec)


def tensor_parallel_context(
    config: ModelConfig,
    mesh: Mesh,
    *,
    by_sequence: bool,
    defer_weight_grads: bool = False,
    allocated: bool = True,
    source_share: Fraction = Fraction(1),
) -> TensorParallelContext:
    """The context of all layers of this rank. Raises ConfigError when a tied weight is split along hidden over tp."""
    if config.tie_word_embeddings and config.embed_split_hidden and mesh.tp.size > 1:
        raise ConfigError(
            f"model.tie_word_embeddings=True with embed_split_hidden=True over {mesh.tp.size} tensor-parallel ranks: "
            "the head needs the shared weight split along the vocabulary; set model.embed_split_hidden=False"
        )
    products = Float8Products() if config.fp8 else Products()
    return TensorParallelContext(
        mesh.tp,
        torch_dtype(config.dtype),
        mesh.device,
        by_sequence=by_sequence and mesh.tp.size > 1,
        products=products,
        weight_grads=WeightGrads(deferred=defer_weight_grads, add=products.add_weight_grad),
        compiled=is_wanted(config.compile, mesh.device),
        selective=config.recomputes_cheap,
        offload=HostOffload(mesh.device) if config.offloaded_layers else None,
        allocated=allocated,
        source_share=source_share,
    )
