"""Initial weights: the same whatever the mesh, and distributed as asked."""

import math

import pytest
import torch

from internlm_lite.layers.flash import AttentionBackend
from internlm_lite.mesh.layout import parameter, split, whole
from internlm_lite.mesh.mesh import Group, single_process_mesh
from internlm_lite.models.decoder import build_model
from internlm_lite.models.initialise import initialise
from tests.models.small import small_config


class Holder(torch.nn.Module):
    def __init__(self, layout, dtype=torch.float32):
        super().__init__()
        self.weight = parameter(layout, dtype, "cpu")
        initialise(self, seed=3)


def group(rank: int, size: int) -> Group:
    return Group("tp", tuple(range(size)), rank, None)


@pytest.mark.parametrize("shape", [(2200, 1200), (12, 4000), (4000, 12)])
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("size", [2, 4])
def test_shards_side_by_side_are_the_whole(shape, dim, size):
    together = Holder(whole("a", shape, init_std=0.1)).weight
    parts = [Holder(split("a", shape, dim, group(rank, size), init_std=0.1)).weight for rank in range(size)]
    assert torch.equal(torch.cat(parts, dim=dim), together)


def test_draws_are_normal_and_differ_by_name_seed_and_tile():
    weight = Holder(whole("a", (2048, 2048), init_std=0.1)).weight
    assert weight.mean().abs() < 1e-3 and weight.std().item() == pytest.approx(0.1, rel=1e-2)
    assert not torch.equal(weight[:1024, :1024], weight[1024:, 1024:])
    assert not torch.equal(weight, Holder(whole("b", (2048, 2048), init_std=0.1)).weight)


def test_half_precision_is_the_rounded_draw():
    layout = whole("a", (64, 64), init_std=0.1)
    assert torch.equal(Holder(layout, torch.bfloat16).weight, Holder(layout).weight.bfloat16())


def test_a_model_follows_its_layouts():
    config = small_config(hidden_size=128, init_std=0.02, num_layers=2)
    model = build_model(config, 0.0, single_process_mesh(), AttentionBackend.SDPA)
    initialise(model, 0)
    for name, param in model.named_parameters():
        if name.endswith("norm.weight"):
            assert torch.equal(param, torch.ones_like(param))
        elif name.endswith("bias"):
            assert not param.any()
        else:
            std = 0.02 / math.sqrt(4) if name.endswith(("wo.weight", "w2.weight")) else 0.02
            assert param.std().item() == pytest.approx(std, rel=0.05), name
