"""Parameter counts of published shapes, built on the meta device: no memory, no time."""

import dataclasses

import pytest
import torch

from internlm_lite.config.schema import LossConfig, ModelConfig
from internlm_lite.errors import ConfigError
from internlm_lite.layers.flash import AttentionBackend
from internlm_lite.mesh.mesh import Group, single_process_mesh
from internlm_lite.models.decoder import build_model

INTERNLM_20B = {
    "num_attention_heads": 40,
    "vocab_size": 103168,
    "hidden_size": 5120,
    "num_layers": 60,
    "mlp_ratio": 8 / 3,
    "dtype": "torch.bfloat16",
}
SMALL_LLAMA = {
    "num_attention_heads": 8,
    "num_kv_attention_heads": 4,
    "vocab_size": 4096,
    "hidden_size": 288,
    "num_layers": 8,
    "multiple_of": 32,
    "no_bias": True,
    "tie_word_embeddings": True,
}


def sizes(shape: dict, tp_rank: int = 0, tp_size: int = 1) -> dict[str, int]:
    tp = Group("tp", tuple(range(tp_size)), tp_rank, None)
    mesh = dataclasses.replace(single_process_mesh(torch.device("meta")), tp=tp)
    model = build_model(ModelConfig(**shape), LossConfig(), mesh, AttentionBackend.SDPA)
    assert all(param.device.type == "meta" for param in model.parameters())
    return {name: param.numel() for name, param in model.named_parameters()}


def test_internlm_20b():
    assert sum(sizes(INTERNLM_20B).values()) == 20_089_943_040


def test_four_ranks_hold_equal_parts_of_internlm_20b():
    """Row-parallel biases are stored on all ranks: 60 * 5120 elements more than on one rank alone."""
    assert [sum(sizes(INTERNLM_20B, rank, 4).values()) for rank in range(4)] == [5_023_180_800] * 4


def test_small_tied_llama():
    counts = sizes(SMALL_LLAMA)
    assert sum(counts.values()) == 8_483_616
    assert sum(n for name, n in counts.items() if "norm" in name) == 4_896


def test_olmo2_7b():
    norms = {"norm_position": "reordered", "qk_norm": "full"}
    shape = {"num_attention_heads": 32, "vocab_size": 100352, "hidden_size": 4096, "num_layers": 32, "no_bias": True}
    counts = sizes(shape | norms)
    assert sum(counts.values()) == 7_298_617_344
    assert sum(n for name, n in counts.items() if "norm" in name) == 32 * 4 * 4096 + 4096


@pytest.mark.parametrize(
    ("changes", "tp_size", "found"),
    [
        ({"num_kv_attention_heads": 5}, 2, "5 key/value heads"),
        ({"vocab_size": 103167}, 2, "output.weight"),
        ({"tie_word_embeddings": True}, 2, "embed_split_hidden=False"),
    ],
)
def test_shapes_that_do_not_divide_are_refused(changes, tp_size, found):
    with pytest.raises(ConfigError, match=found):
        sizes(INTERNLM_20B | changes, 0, tp_size)
