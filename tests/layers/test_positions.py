"""Positions that are added to the token embedding."""

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from internlm_lite.layers.embedding import Embedding
from internlm_lite.layers.positions import sinusoidal
from internlm_lite.layers.tensor_parallel import TensorParallelContext
from internlm_lite.mesh.mesh import single_process_mesh
from tests.models.small import VOCAB, small_config

TOKENS, POSITIONS = torch.tensor([3, 1, 3, 0, 3]), torch.tensor([0, 1, 2, 0, 1])


def embedding_of(dtype=torch.float64, **changes):
    tp_ctx = TensorParallelContext(single_process_mesh().tp, dtype, torch.device("cpu"))
    layer = Embedding("e", small_config(max_position_embeddings=3, **changes), tp_ctx)
    for param in layer.parameters():
        torch.nn.init.normal_(param)
    return layer


def test_sines_and_cosines_take_turns():
    """Not in halves, and 10000^(2j / hidden) below the position, not 10000^(j / (hidden / 2 - 1))."""
    expected = [math.sin(1), math.cos(1), math.sin(10000**-0.5), math.cos(10000**-0.5)]
    assert sinusoidal(torch.tensor([1]), 4, range(4), torch.float64)[0].tolist() == pytest.approx(expected, rel=1e-15)
    assert sinusoidal(torch.tensor([0]), 4, range(4), torch.float64)[0].tolist() == [0, 1, 0, 1]
    for hidden in (6, 7, 12):
        row = sinusoidal(torch.tensor([123_457]), hidden, range(hidden), torch.float64)[0]
        for column in range(hidden):
            angle = 123_457 / 10000 ** (column // 2 * 2 / hidden)
            assert row[column].item() == pytest.approx((math.cos if column % 2 else math.sin)(angle), abs=1e-10)


def test_ranks_make_their_own_columns():
    whole = sinusoidal(POSITIONS, 30, range(30), torch.float32)
    for size in (2, 3, 4, 7):
        borders = [30 * rank // size for rank in range(size + 1)]
        parts = [sinusoidal(POSITIONS, 30, range(a, b), torch.float32) for a, b in pairwise(borders)]
        assert torch.equal(torch.cat(parts, dim=1), whole)


def test_large_positions_lose_nothing_in_half_precision():
    exact = sinusoidal(torch.tensor([1_000_003]), 8, range(8), torch.float64)
    assert torch.equal(sinusoidal(torch.tensor([1_000_003]), 8, range(8), torch.bfloat16), exact.bfloat16())


@pytest.mark.parametrize("split_hidden", [True, False])
def test_positions_are_added_to_tokens(split_hidden):
    layer = embedding_of(position="learned", embed_split_hidden=split_hidden)
    weight, table = layer.weight, layer.positions.weight
    assert table.shape == (3, 32) and table.shard_spec.name == "e.positions.weight"
    assert torch.equal(layer(TOKENS, POSITIONS), weight[TOKENS] + table[POSITIONS])
    fixed = embedding_of(position="sinusoidal", embed_split_hidden=split_hidden)
    expected = fixed.weight[TOKENS] + sinusoidal(POSITIONS, 32, range(32), torch.float64)
    assert torch.equal(fixed(TOKENS, POSITIONS), expected) and len(list(fixed.parameters())) == 1
    for position in ("rope", "none"):
        plain = embedding_of(position=position, embed_split_hidden=split_hidden)
        assert torch.equal(plain(TOKENS, POSITIONS), plain.weight[TOKENS])


@pytest.mark.parametrize("split_hidden", [True, False])
def test_gradients_are_those_of_two_plain_embeddings(split_hidden):
    """Of the positions whole, whatever embed_grad_scale says of the tokens'."""
    layer = embedding_of(position="learned", embed_split_hidden=split_hidden, embed_grad_scale=0.25)
    factors = torch.randn(5, 32, dtype=torch.float64)
    plain = [param.detach().clone().requires_grad_() for param in layer.parameters()]
    ((F.embedding(TOKENS, plain[0]) + F.embedding(POSITIONS, plain[1])) * factors).sum().backward()
    (layer(TOKENS, POSITIONS) * factors).sum().backward()
    torch.testing.assert_close(layer.weight.grad, plain[0].grad * 0.25, rtol=1e-14, atol=0)
    torch.testing.assert_close(layer.positions.weight.grad, plain[1].grad, rtol=1e-14, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_gradients_of_positions_are_added_to_the_buffer(dtype):
    """In its precision, once per pass: 257 gradients of 1 are 256 in bf16."""
    layer, told = embedding_of(dtype, position="learned"), []
    for param in layer.parameters():
        param.main_grad = torch.zeros(param.shape, dtype=torch.promote_types(dtype, torch.float32))
        param.on_grad = told.append
    positions = torch.tensor([2] * 257 + [0])
    for _ in range(2):
        layer(torch.arange(258) % VOCAB, positions).sum().backward()
    table = layer.positions.weight
    assert table.grad is None and sum(param is table for param in told) == 2 and len(told) == 4
    assert (table.main_grad.sum(dim=1) / 32).tolist() == [2, 0, 514]
