"""The rotary embedding against Llama's published form, and its kinds against those of other families."""

from itertools import pairwise

import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.gemma3 import modeling_gemma3
from transformers.models.gpt_neox import modeling_gpt_neox

from internlm_lite.config.schema import LossConfig
from internlm_lite.layers.flash import AttentionBackend
from internlm_lite.layers.rope import (
    RopeFrequencies,
    Rotary,
    Rotations,
    document_lengths,
    plain_frequencies,
    rope_frequencies,
    rotation_of,
)
from internlm_lite.mesh.mesh import single_process_mesh
from internlm_lite.models.decoder import StageSpec, Transformer, build_model, tensor_parallel_context
from tests.models.small import documents, row_of, run, small_config, small_model

CPU = torch.device("cpu")


def rotary_of(positions, head_dim, base):
    return Rotary(positions, RopeFrequencies(plain_frequencies(head_dim, base)), torch.float64)


def llama(x, positions, base):
    """transformers' apply_rotary_pos_emb: x * cos + rotate_half(x) * sin."""
    inverse = 1.0 / base ** (torch.arange(0, x.shape[-1], 2, dtype=torch.float64) / x.shape[-1])
    angle = torch.outer(positions.double(), inverse)
    angle = torch.cat((angle, angle), dim=-1)[:, None, None]
    first, second = x.chunk(2, dim=-1)
    return x * angle.cos() + torch.cat((-second, first), dim=-1) * angle.sin()


def test_it_is_llamas_rotate_half_form():
    positions = torch.tensor([0, 1, 2, 0, 1, 4095])
    x = torch.randn(6, 2, 3, 8, dtype=torch.float64)
    for base in (10000.0, 1e6):
        turned = rotary_of(positions, 8, base)(x)
        torch.testing.assert_close(turned, llama(x, positions, base), rtol=1e-12, atol=1e-12)


def test_the_gradient_is_right_for_strided_input():
    positions = torch.arange(4)
    rotary = rotary_of(positions, 6, 100.0)
    x = torch.randn(4, 2, 5, 6, dtype=torch.float64, requires_grad=True)
    assert rotary(x[:, :, 1:3]).is_contiguous()
    assert torch.autograd.gradcheck(lambda x: rotary(x[:, :, 1:3]), x)


def test_scores_depend_on_distance_only():
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64)

    def score(at: int, other: int) -> torch.Tensor:
        turned_q = rotary_of(torch.tensor([at]), 16, 10000.0)(q)
        return (turned_q * rotary_of(torch.tensor([other]), 16, 10000.0)(k)).sum()

    torch.testing.assert_close(score(5, 2), score(100_005, 100_002), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("factor", [0.25, 0.5, 0.75])
def test_a_part_of_a_head_is_rotated_and_the_rest_is_as_it_was(factor):
    """GPT-NeoX and Phi; the part's own size is in the exponents, and not head_dim."""
    config, positions = small_config(head_dim=16, partial_rotary_factor=factor), torch.tensor([0, 1, 5, 0, 4095])
    size = int(16 * factor)
    rotary = Rotary(positions, rope_frequencies(config, CPU), torch.float64)
    q, k = torch.randn(2, 1, 3, 5, 16, dtype=torch.float64)
    cos, sin = (
        torch.cat((part, part), -1)[None]
        for part in (rotary.cos[:, 0, 0, : size // 2], rotary.signed_sin[:, 0, 0, size // 2 :])
    )
    theirs = modeling_gpt_neox.apply_rotary_pos_emb(q, k, cos, sin)
    for x, expected in zip((q, k), theirs, strict=True):
        x = x[0].transpose(0, 1).unsqueeze(1)  # [5, 1, 3, 16]
        turned = rotary(x)
        assert turned.is_contiguous() and torch.equal(turned[..., size:], x[..., size:])
        torch.testing.assert_close(turned[..., :size], llama(x[..., :size], positions, 10000), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(turned[:, 0].transpose(0, 1), expected[0], rtol=1e-12, atol=1e-12)
    x = torch.randn(5, 2, 4, 16, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: rotary(x[:, :, 1:3]), x)


def test_tables_are_cast_last_and_not_with_the_model():
    """Frequencies or angles in half precision drift with the position, and `model.to` would cast a buffer."""
    model, positions = small_model(), torch.tensor([7, 100_003])
    before = model._rotations._frequencies["scaled"].radians.clone()
    frequencies = model.to(torch.bfloat16)._rotations._frequencies["scaled"]
    assert torch.equal(frequencies.radians, before) and before.dtype == torch.float64
    exact = torch.outer(positions.double(), before).cos()
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        table = Rotary(positions, frequencies, dtype).cos[:, 0, 0, : len(before)]
        assert table.dtype == dtype and torch.equal(table, exact.to(dtype))


def test_a_model_that_gets_its_memory_later_has_its_tables():
    """Weights that are loaded would not bring tables that the meta device has left without numbers."""
    keys = {"rope_scaling": DYNAMIC, "no_rope_every": 3, "sliding_window": 99, "rope_local_base": 100.0}
    keys["layer_types"] = ["full_attention", "sliding_attention"]
    direct, docs = small_model(**keys), documents([40, 9])
    late = build_model(
        small_config(**keys), LossConfig(), single_process_mesh(torch.device("meta")), AttentionBackend.SDPA
    )
    for name, param in direct.named_parameters():
        owner, _, leaf = name.rpartition(".")
        setattr(late.get_submodule(owner), leaf, param)
    assert torch.equal(run(late, docs).token_loss, run(direct, docs).token_loss)


DYNAMIC = {"rope_type": "dynamic", "factor": 2.5, "original_max_position_embeddings": 16}


def internlm2(base, dim, factor, original, length):
    """Frequencies of InternLM2DynamicNTKScalingRotaryEmbedding."""
    if length > original:
        base = base * ((factor * length / original) - (factor - 1)) ** (dim / (dim - 2))
    return 1.0 / base ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim)


@pytest.mark.parametrize("partial", [1, 0.5])
def test_dynamic_frequencies_are_those_of_internlm2_and_transformers(partial):
    """Positions are not scaled, the base is, and only beyond the original length."""
    config = small_config(head_dim=16, rope_scaling=DYNAMIC, partial_rotary_factor=partial, rope_base=5000)
    dim, frequencies, plain = (
        config.rotary_size,
        rope_frequencies(config, CPU),
        plain_frequencies(int(16 * partial), 5000),
    )
    theirs = transformers.LlamaConfig(
        head_dim=16,
        max_position_embeddings=16,
        rope_parameters={"rope_type": "dynamic", "factor": 2.5, "rope_theta": 5000.0, "partial_rotary_factor": partial},
    )
    for length in (1, 15, 16, 17, 18, 40, 1000):
        positions = torch.arange(length)
        angle = frequencies.angles(positions)
        expected = internlm2(5000, dim, 2.5, 16, length)
        torch.testing.assert_close(angle, torch.outer(positions.double(), expected), rtol=1e-12, atol=1e-12)
        hf, growth = ROPE_INIT_FUNCTIONS["dynamic"](theirs, CPU, seq_len=length)
        torch.testing.assert_close(expected, hf.double(), rtol=1e-6, atol=0)
        assert growth == frequencies.growth == 1
        assert torch.equal(angle, torch.outer(positions.double(), plain)) is (length <= 16)


def test_a_document_has_the_dynamic_frequencies_of_its_own_length():
    """Not of the row's longest, of what came before it, or of a table that has grown."""
    frequencies, lengths = rope_frequencies(small_config(head_dim=16, rope_scaling=DYNAMIC), CPU), [5, 40, 1, 17, 16]
    alone = [frequencies.angles(torch.arange(length)) for length in lengths]
    positions = torch.cat([torch.arange(length) for length in lengths])
    assert document_lengths(positions).tolist() == [length for length in lengths for _ in range(length)]
    assert torch.equal(frequencies.angles(positions), torch.cat(alone))
    backwards = torch.cat([torch.arange(length) for length in reversed(lengths)])
    assert torch.equal(frequencies.angles(backwards), torch.cat(alone[::-1]))
    known = frequencies.angles(torch.tensor([39, 3]), torch.tensor([40, 17]))
    assert torch.equal(known, torch.stack([alone[1][39], alone[3][3]]))


def test_layers_without_rotation_are_those_of_smollm3():
    """Its `no_rope_layers` is 1 where a layer is rotated: the name says the opposite."""
    theirs = transformers.SmolLM3Config()
    config = small_config(num_layers=36, no_rope_every=4)
    rotated = [rotation_of(config, layer) is not None for layer in range(36)]
    assert rotated == [bool(flag) for flag in theirs.no_rope_layers] and rotated.count(False) == 9
    assert rotated[:4] == [True, True, True, False]
    for changes in ({"no_rope_every": 1}, {"position": "none"}, {"position": "learned"}, {"position": "sinusoidal"}):
        assert {rotation_of(small_config(**changes), layer) for layer in range(9)} == {None}


def test_other_positions_change_rotated_layers_only():
    model, docs = small_model(no_rope_every=2, num_layers=4), documents([9])
    _, positions, _, attend = row_of(docs)
    x = torch.randn(9, 32, dtype=torch.float64)
    for layer, block in enumerate(model.blocks()):
        one, other = (
            block(x, model._rotations.at(at, x.dtype)[block.rotation], attend) for at in (positions, positions * 3)
        )
        assert torch.equal(one, other) is (layer in (1, 3))


def test_sliding_layers_have_their_own_base_which_is_not_scaled():
    """Gemma 3: base 10,000 in sliding layers; 1,000,000 with positions divided by 8 in the others, every sixth."""
    shape = {"num_hidden_layers": 12, "head_dim": 8, "hidden_size": 32, "num_attention_heads": 4}
    theirs = transformers.Gemma3TextConfig(
        **shape,
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        },
    )
    config = small_config(
        num_layers=12,
        head_dim=8,
        sliding_window=theirs.sliding_window,
        layer_types=["sliding_attention"] * 5 + ["full_attention"],
        rope_base=1e6,
        rope_scaling={"rope_type": "linear", "factor": 8.0},
        rope_local_base=10000,
    )
    kinds = {"sliding_attention": "local", "full_attention": "scaled"}
    assert [rotation_of(config, layer) for layer in range(12)] == [kinds[kind] for kind in theirs.layer_types]
    rotary, positions = modeling_gemma3.Gemma3RotaryEmbedding(theirs), torch.arange(50)
    tables = Rotations(config, range(12), CPU).at(positions, torch.float64)
    for kind, ours in kinds.items():
        cos, _ = rotary(torch.zeros(1, dtype=torch.float32), positions[None], kind)
        torch.testing.assert_close(tables[ours].cos[:, 0, 0], cos[0].double(), rtol=0, atol=1e-5)
    expected = torch.outer(positions.double(), plain_frequencies(8, 1e6) / 8).cos()
    assert torch.equal(tables["scaled"].cos[:, 0, 0, :4], expected)


def test_yarn_is_for_full_layers_only():
    """OLMo 3: its sliding layers keep the plain frequencies of the same base, and do not grow."""
    yarn = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64}
    types = ["sliding_attention", "full_attention"]
    config = small_config(rope_scaling=yarn, rope_local_base=10000, sliding_window=5, layer_types=types)
    local, scaled = (rope_frequencies(config, CPU, kind) for kind in ("local", "scaled"))
    assert torch.equal(local.radians, plain_frequencies(4, 10000)) and local.growth == 1 < scaled.growth
    assert scaled.radians[-1] < local.radians[-1]


def test_a_stage_knows_its_layers_by_their_numbers_in_the_model():
    """A pipeline stage that counted from 0 would rotate other layers, and by other bases."""
    config = small_config(
        num_layers=7,
        no_rope_every=3,
        sliding_window=5,
        layer_types=["full_attention", "sliding_attention"],
        rope_local_base=10.0,
    )
    tp_ctx = tensor_parallel_context(config, single_process_mesh(), by_sequence=False)
    whole = ["scaled", "local", None, "local", "scaled", None, "scaled"]
    for cuts in ([0, 7], [0, 1, 4, 7], [0, 2, 3, 6, 7]):
        stages = [
            Transformer(
                config, LossConfig(), tp_ctx, AttentionBackend.SDPA, StageSpec(range(a, b), first=a == 0, last=b == 7)
            )
            for a, b in pairwise(cuts)
        ]
        assert [block.rotation for stage in stages for block in stage.blocks()] == whole
        for stage in stages:
            assert set(stage._rotations._frequencies) == {block.rotation for block in stage.blocks()} - {None}
