"""The feed-forward part against its formula with transformers' activations: values, gradients, biases, every type."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers.activations import ACT2FN

from internlm_lite.layers.mlp import FeedForward
from internlm_lite.mesh.mesh import single_process_mesh
from internlm_lite.models.decoder import tensor_parallel_context
from tests.models.small import small_config

ACTIVATIONS: dict[str, Any] = {
    "swiglu": ACT2FN["silu"],
    "geglu": ACT2FN["gelu"],
    "geglu_tanh": ACT2FN["gelu_pytorch_tanh"],  # Gemma
    "gelu": ACT2FN["gelu"],
    "gelu_tanh": ACT2FN["gelu_new"],  # GPT-2
    "relu": ACT2FN["relu"],
}


@pytest.mark.parametrize("checkpoint", [False, "selective"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("mlp_type", ACTIVATIONS)
def test_values_and_gradients_equal_the_formula(mlp_type: str, bias: bool, checkpoint: Any) -> None:
    config = small_config(mlp_type=mlp_type, mlp_bias=bias, checkpoint=checkpoint)
    layer = FeedForward("f", 0, config, tensor_parallel_context(config, single_process_mesh(), by_sequence=False))
    generator = torch.Generator().manual_seed(1)
    for param in layer.parameters():
        torch.nn.init.normal_(param, generator=generator)
    x = torch.randn(7, config.hidden_size, dtype=torch.float64, generator=generator).requires_grad_()
    named = dict(layer.named_parameters())
    expected_names = {"w1.weight", "w2.weight"} | ({"w3.weight"} if "glu" in mlp_type else set())
    assert {name for name in named if name.endswith("weight")} == expected_names
    assert {name.replace("weight", "bias") for name in expected_names if bias} == set(named) - expected_names

    def product(which: str, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, named[f"{which}.weight"], named.get(f"{which}.bias"))

    inner = ACTIVATIONS[mlp_type](product("w1", x))
    expected = product("w2", inner * product("w3", x) if "glu" in mlp_type else inner)
    inputs = [x, *layer.parameters()]
    grads = torch.autograd.grad(expected.square().sum(), inputs)
    ours = layer(x)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    for mine, theirs in zip(torch.autograd.grad(ours.square().sum(), inputs), grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-11)


def test_the_two_gelus_differ_where_they_are_known_to() -> None:
    """GPT-2 and Gemma are the approximation: at -2.7 the two are 5e-4 apart."""
    x = torch.tensor(-2.7, dtype=torch.float64)
    exact, tanh = ACTIVATIONS["gelu"](x), ACTIVATIONS["gelu_tanh"](x)
    assert exact == pytest.approx(-0.00936, abs=1e-5)
    assert 1e-4 < abs(exact - tanh) < 1e-3
