"""What attention under context parallelism says that it keeps, against the tensors that autograd saves."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from internlm_lite.layers.attention import Attention
from internlm_lite.layers.context_parallel.exchanges import EXCHANGES
from internlm_lite.layers.context_parallel.row import context_row
from internlm_lite.layers.costs import RowShape
from internlm_lite.layers.dropout import dropped_weights, token_keys
from internlm_lite.layers.flash import AttentionBackend
from internlm_lite.layers.rope import Rotary, rope_frequencies
from internlm_lite.mesh.mesh import Mesh
from internlm_lite.models.decoder import tensor_parallel_context
from tests.models.counted import saved_bytes
from tests.models.small import small_config
from tests.world import run_world

T = 48
MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "one key head": {"num_kv_attention_heads": 1},
    "soft cap": {"attention_softcap": 0.7},
    "dropout": {"attention_dropout": 0.2},
    "selective": {"checkpoint": "selective"},
    "norms of heads": {"qk_norm": "head"},
}


def _kept(mesh: Mesh) -> dict[tuple[str, str], tuple[int, int]]:
    """(model, exchange) -> (bytes that autograd saves, bytes that the layer tells), of a row of one document."""
    found = {}
    row = context_row((0, T), {None: 1}, mesh.cp.size, mesh.cp.rank, mesh.device)
    keys = token_keys(1, 0, torch.tensor([0]), T)[0]
    for model, sections in MODELS.items():
        config = small_config(**sections)
        tp_ctx = tensor_parallel_context(config, mesh, by_sequence=False)
        layer = Attention("a", 0, config, tp_ctx)
        for param in layer.parameters():
            torch.nn.init.constant_(param, 0.01)
        drop = dropped_weights(config.attention_dropout, keys, 0) if config.attention_dropout else None
        rotary = Rotary(row.own, rope_frequencies(config, mesh.device), tp_ctx.dtype)
        x = torch.randn(len(row.own), config.hidden_size).to(tp_ctx.dtype).requires_grad_()
        for name, exchange in EXCHANGES.items():
            attend = exchange(row, mesh.cp, AttentionBackend.SDPA, drop)
            known = (rotary.cos, rotary.signed_sin, keys)
            saved = saved_bytes(partial(layer, x, rotary, attend), layer, known)
            lean = config.checkpoint == "selective"
            shape = RowShape(len(row.own), "cpu", True, True, lean, context=mesh.cp.size, exchange=name)
            found[model, name] = saved, sum(layer.saved_bytes(shape).values())
    return found


@pytest.fixture(scope="module")
def kept() -> list[dict[tuple[str, str], tuple[int, int]]]:
    return run_world(_kept, 2, context=2)


@pytest.mark.parametrize("model", MODELS)
def test_attention_knows_what_it_keeps(model: str, kept: list[dict[tuple[str, str], tuple[int, int]]]) -> None:
    """To the byte where all ranks keep as much. With "gather" keys that two pieces of a rank see are kept twice."""
    for exchange in EXCHANGES:
        ranks = [found[model, exchange] for found in kept]
        if exchange == "gather":
            assert all(saved <= 1.2 * told for saved, told in ranks), (exchange, ranks)
        else:
            assert all(saved == told for saved, told in ranks), (exchange, ranks)
