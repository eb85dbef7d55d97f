"""The encoder-decoder against torch's, with the annotated transformer's norm: packed pairs beside a padded batch."""

from __future__ import annotations

from fractions import Fraction
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from internlm_lite.batch import IGNORE
from internlm_lite.config.schema import LossConfig, ModelConfig
from internlm_lite.layers.flash import AttentionBackend, Borders, packed, packed_across
from internlm_lite.mesh.layout import Parameter
from internlm_lite.mesh.mesh import single_process_mesh
from internlm_lite.models.decoder import SourceRow, Transformer, build_model
from internlm_lite.models.stages import meta_model, model_flops_per_token
from tests.models.counted import counted_flops

SDPA = AttentionBackend.SDPA
SEED: dict[str, Any] = {
    "num_layers": 6,
    "num_encoder_layers": 6,
    "hidden_size": 512,
    "num_attention_heads": 8,
    "mlp_ratio": 4,
    "multiple_of": 1,
    "mlp_type": "relu",
    "mlp_bias": True,
    "norm_type": "sample_layernorm",
    "layer_norm_epsilon": 1e-6,
    "position": "sinusoidal",
    "embed_scale": 512**0.5,
    "head_bias": True,
    "vocab_size": 6384,
    "source_vocab_size": 8316,
}
"""The model of the annotated transformer (arXiv:1706.03762, base) with the vocabularies of its Multi30k run."""
SMALL = {**SEED, "num_layers": 2, "num_encoder_layers": 3, "hidden_size": 16, "num_attention_heads": 4}
SMALL |= {"vocab_size": 11, "source_vocab_size": 13, "embed_scale": 4.0, "dtype": "torch.float64"}
SOURCES, TARGETS = (5, 9, 1, 7), (6, 3, 4, 8)
"""Lengths of pairs."""


class SeedNorm(nn.Module):
    """The annotated transformer's LayerNorm."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(features)), nn.Parameter(torch.zeros(features))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean, std = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
        return self.weight * (x - mean) / (std + 1e-6) + self.bias


def torchs(config: ModelConfig) -> nn.Transformer:
    """torch's encoder-decoder of this shape."""
    made = nn.Transformer(
        config.hidden_size,
        config.num_attention_heads,
        config.num_encoder_layers,
        config.num_layers,
        config.mlp_hidden_size,
        dropout=0,
        batch_first=True,
        norm_first=True,
        dtype=torch.float64,
    )
    for name, module in list(made.named_modules()):
        if isinstance(module, nn.LayerNorm):
            parent, _, leaf = name.rpartition(".")
            setattr(made.get_submodule(parent), leaf, SeedNorm(config.hidden_size).double())
    return made


def pieces(ours: Transformer, theirs: nn.Transformer) -> dict[str, list[tuple[nn.Parameter, slice]]]:
    """Name of our parameter -> the rows of torch's that it is made of, as matrices of its own rows in order."""
    found: dict[str, list[tuple[nn.Parameter, slice]]] = {}
    width, size = ours.config.hidden_size, ours.config.head_size

    def fused(names: str, attention: nn.MultiheadAttention, kind: str) -> list[tuple[nn.Parameter, slice]]:
        whole = cast(nn.Parameter, getattr(attention, f"in_proj_{kind}"))
        starts = ["qkv".index(letter) * width for letter in names]
        return [(whole, slice(start + at, start + at + size)) for at in range(0, width, size) for start in starts]

    def add(name: str, module: nn.Module) -> None:
        for kind, param in module.named_parameters():
            found[f"{name}.{kind}"] = [(param, slice(None))]

    def layers(prefix: str, stack: Any) -> None:
        for i, layer in enumerate(stack.layers):
            name = f"{prefix}{i}"
            parts = {"attention": (layer.self_attn, layer.norm1), "ffn": (None, layer.norm2)}
            if hasattr(layer, "multihead_attn"):
                parts = {**parts, "cross_attention": (layer.multihead_attn, layer.norm2), "ffn": (None, layer.norm3)}
            for part, (attention, norm) in parts.items():
                add(f"{name}.{part}_norm", norm)
                if attention is not None:
                    add(f"{name}.{part}.wo", attention.out_proj)
                    for kind in ("weight", "bias"):
                        for projection in ("qkv",) if part == "attention" else ("q", "kv"):
                            found[f"{name}.{part}.w{projection}.{kind}"] = fused(projection, attention, kind)
            add(f"{name}.feed_forward.w1", layer.linear1)
            add(f"{name}.feed_forward.w2", layer.linear2)

    layers("encoder.layers.", theirs.encoder)
    layers("layers.", theirs.decoder)
    add("encoder.norm", cast(Any, theirs.encoder).norm)
    add("norm", cast(Any, theirs.decoder).norm)
    return found


def row_of(lengths: tuple[int, ...], filling: int | None) -> Borders:
    """`filling`: tokens of a last document, which may be empty; None: there is none."""
    ends = torch.tensor([0, *lengths, *([] if filling is None else [filling])]).cumsum(0).int()
    return Borders(ends, tuple(ends.tolist()), max(lengths))


def by_pair(row: torch.Tensor, lengths: tuple[int, ...]) -> list[torch.Tensor]:
    return list(row[: sum(lengths)].split(lengths))


def test_the_seeds_shape_has_its_parameters() -> None:
    model = meta_model(ModelConfig(**SEED))
    params = [cast(Parameter, param) for param in model.parameters()]
    assert sum(param.numel() for param in params) == 54_941_936
    assert sum(p.numel() for b in model.encoder_blocks() for p in b.parameters()) == 18_915_328 - 1024
    assert sum(p.numel() for b in model.decoder_blocks() for p in b.parameters()) == 25_225_216 - 1024
    # A fused projection is as many of the seed's matrices as it has kinds of rows, and has as many biases.
    fused = {"wqkv": 3, "wkv": 2}
    assert sum(fused.get(param.shard_spec.name.split(".")[-2], 1) for param in params) == 260


@pytest.mark.parametrize("fillings", [(None, None), (3, 2), (0, 5), (4, 0)], ids=str)
def test_packed_pairs_are_torchs_padded_batch(fillings: tuple[int | None, int | None]) -> None:
    config = ModelConfig(**SMALL)
    ours, theirs = build_model(config, LossConfig(), single_process_mesh(), SDPA), torchs(config)
    generator = torch.Generator().manual_seed(0)
    for param in (*ours.parameters(), *theirs.parameters()):
        param.data.normal_(0, 0.4, generator=generator)
    mapped, named = pieces(ours, theirs), {cast(Parameter, p).shard_spec.name: p for p in ours.parameters()}
    for name, rows in mapped.items():
        named[name].data.copy_(torch.cat([param.data[own] for param, own in rows]))
    names = ("source_embeddings.weight", "tok_embeddings.weight", "output.weight", "output.bias")
    assert named.keys() == {*mapped, *names}

    sides = [row_of(SOURCES, fillings[0]), row_of(TARGETS, fillings[1])]
    tokens = [
        torch.randint(vocab, (side.cu_seqlens_host[-1],), generator=generator)
        for side, vocab in zip(sides, (config.source_vocab, config.vocab_size), strict=True)
    ]
    positions = [
        torch.cat([torch.arange(n) for n in torch.tensor(side.cu_seqlens_host).diff().tolist()]) for side in sides
    ]
    labels = torch.randint(config.vocab_size, tokens[1].shape, generator=generator)
    labels[sum(TARGETS) :] = IGNORE
    inside = [packed(SDPA, side.cu_seqlens, side.cu_seqlens_host, side.max_seqlen) for side in sides]
    source = SourceRow(tokens[0], positions[0], inside[0], packed_across(SDPA, sides[1], sides[0]))
    encoded: list[torch.Tensor] = []
    assert ours.encoder_norm is not None
    ours.encoder_norm.register_forward_hook(lambda *args: encoded.append(args[-1]))
    hidden = ours.hidden(tokens[1], positions[1], inside[1], source=source)
    ours.losses(hidden, labels, torch.ones(())).scaled_sum.backward()

    assert ours.source_embeddings is not None and ours.tok_embeddings is not None and ours.output is not None
    shared = [named[name].detach().clone().requires_grad_() for name in names]
    *tables, head, bias = shared
    sinusoids = [ours.tok_embeddings(torch.zeros_like(at), at) - 4 * tables[1][0] for at in positions]
    inputs, masks = [], []
    for table, side_tokens, added, lengths in zip(tables, tokens, sinusoids, (SOURCES, TARGETS), strict=True):
        rows = by_pair(4 * table[side_tokens] + added.detach(), lengths)
        inputs.append(nn.utils.rnn.pad_sequence(rows, batch_first=True))
        masks.append(torch.arange(max(lengths)) >= torch.tensor(lengths)[:, None])
    causal = nn.Transformer.generate_square_subsequent_mask(max(TARGETS), dtype=torch.float64)
    memory = theirs.encoder(inputs[0], src_key_padding_mask=masks[0])
    out = theirs.decoder(inputs[1], memory, tgt_mask=causal, memory_key_padding_mask=masks[0])
    logits = F.linear(out[~masks[1]], head, bias)
    F.cross_entropy(logits, labels[: sum(TARGETS)], reduction="sum").backward()

    torch.testing.assert_close(encoded[0][: sum(SOURCES)], memory[~masks[0]], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(hidden[: sum(TARGETS)], out[~masks[1]], rtol=1e-10, atol=1e-10)
    expected = {name: torch.cat([cast(Any, param.grad)[own] for param, own in rows]) for name, rows in mapped.items()}
    expected |= {name: tensor.grad for name, tensor in zip(names, shared, strict=True)}
    for name, wanted in expected.items():
        torch.testing.assert_close(named[name].grad, wanted, rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("share", [Fraction(3, 2), Fraction(1, 2)])
def test_sources_of_another_length_count_as_they_are(share: Fraction) -> None:
    """FLOPs by torch's counter."""
    config, tokens = ModelConfig(**SMALL), 24
    model = build_model(config, LossConfig(), single_process_mesh(), SDPA, source_share=share)
    sides = [row_of((n,), None) for n in (int(tokens * share), tokens)]
    inside = [packed(SDPA, side.cu_seqlens, side.cu_seqlens_host, side.max_seqlen) for side in sides]
    source_positions, positions = (torch.arange(side.max_seqlen) for side in sides)
    source = SourceRow(source_positions % 13, source_positions, inside[0], packed_across(SDPA, sides[1], sides[0]))

    def run() -> torch.Tensor:
        hidden = model.hidden(positions % 11, positions, inside[1], source=source)
        return model.losses(hidden, positions % 11, torch.ones(())).scaled_sum

    for param in model.parameters():
        param.data.fill_(0.01)
    forward = tokens * model.flops_per_token(tokens)
    assert counted_flops(run) == (forward, 3 * forward)
    assert model_flops_per_token(config, tokens, share) == 3 * model.flops_per_token(tokens)
