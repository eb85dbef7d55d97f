"""The embedding's gradient scale."""

import pytest
import torch
import torch.nn.functional as F

from internlm_lite.layers.embedding import Embedding
from internlm_lite.layers.tensor_parallel import TensorParallelContext
from internlm_lite.mesh.mesh import single_process_mesh
from tests.models.small import VOCAB, small_config


@pytest.mark.parametrize("split_hidden", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_the_scale_changes_gradients_and_no_value(split_hidden, dtype):
    tp_ctx = TensorParallelContext(single_process_mesh().tp, dtype, torch.device("cpu"))
    tokens = torch.tensor([3, 1, 3, 0])
    layers = [
        Embedding("e", small_config(embed_split_hidden=split_hidden, embed_grad_scale=scale), tp_ctx)
        for scale in (1.0, 0.25)
    ]
    weights = torch.randn(VOCAB, 32).to(dtype)
    for layer in layers:
        with torch.no_grad():
            layer.weight.copy_(weights)
        assert torch.equal(layer(tokens), F.embedding(tokens, weights))
        layer(tokens).sum().backward()
    assert torch.equal(layers[1].weight.grad, layers[0].weight.grad * 0.25)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_gradients_of_rows_are_added_to_the_buffer(dtype):
    """In its precision: 257 gradients of 1 are 256 in bf16."""
    tp_ctx = TensorParallelContext(single_process_mesh().tp, dtype, torch.device("cpu"))
    layer, told = Embedding("e", small_config(), tp_ctx), []
    layer.weight.main_grad = torch.zeros(layer.weight.shape, dtype=torch.promote_types(dtype, torch.float32))
    layer.weight.on_grad = told.append
    for _ in range(2):
        layer(torch.tensor([3] * 257 + [1])).sum().backward()
    assert layer.weight.grad is None and len(told) == 2
    sums = layer.weight.main_grad.sum(dim=1) / layer.weight.shape[1]
    assert sums.nonzero().flatten().tolist() == [1, 3] and sums[[1, 3]].tolist() == [2, 514]
