"""The embedding's scale, the scale of its gradient, and gradients in the optimizer's buffer."""

import pytest
import torch
import torch.nn.functional as F
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

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


@pytest.mark.parametrize("split_hidden", [True, False])
@pytest.mark.parametrize(("width", "rounded"), [(3072, 55.5), (1152, 34.0)])
def test_the_scale_of_embeddings_is_rounded_first(width, rounded, split_hidden):
    """In bf16 Gemma multiplies by 55.5 and 34 instead of sqrt(3072) and sqrt(1152): another scale drifts with depth."""
    tp_ctx, tokens = (
        TensorParallelContext(single_process_mesh().tp, torch.bfloat16, torch.device("cpu")),
        torch.arange(9),
    )
    config = small_config(hidden_size=width, embed_scale=width**0.5, embed_split_hidden=split_hidden)
    ours, theirs = Embedding("e", config, tp_ctx), Gemma3TextScaledWordEmbedding(VOCAB, width, 0, width**0.5).bfloat16()
    with torch.no_grad():
        ours.weight.copy_(theirs.weight)
    assert ours.scale == rounded
    assert torch.equal(ours(tokens), theirs(tokens))
    assert torch.equal(ours(tokens), (ours.weight[:9].float() * rounded).bfloat16())


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
