"""The embedding's gradient scale."""

import pytest
import torch
import torch.nn.functional as F

from internlm_lite.layers.embedding import Embedding
from internlm_lite.layers.placement import Placement
from internlm_lite.mesh.mesh import single_process_mesh


@pytest.mark.parametrize("split_hidden", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_the_scale_changes_gradients_and_no_value(split_hidden, dtype):
    place = Placement(single_process_mesh().tp, dtype, torch.device("cpu"))
    tokens = torch.tensor([3, 1, 3, 0])
    layers = [
        Embedding("e", 5, 4, split_hidden=split_hidden, grad_scale=scale, init_std=1, place=place)
        for scale in (1.0, 0.25)
    ]
    weights = torch.randn(5, 4).to(dtype)
    for layer in layers:
        with torch.no_grad():
            layer.weight.copy_(weights)
        assert torch.equal(layer(tokens), F.embedding(tokens, weights))
        layer(tokens).sum().backward()
    assert torch.equal(layers[1].weight.grad, layers[0].weight.grad * 0.25)
