"""RMSNorm against its formula and against F.rms_norm."""

import pytest
import torch
import torch.nn.functional as F

from internlm_lite.layers.costs import RowShape
from internlm_lite.layers.norm import build_norm
from internlm_lite.layers.tensor_parallel import TensorParallelContext
from internlm_lite.mesh.mesh import single_process_mesh
from tests.models.counted import saved_bytes
from tests.models.small import small_config


def norm(dtype, fp32_weight=False, size=12, device="cpu"):
    tp_ctx = TensorParallelContext(single_process_mesh().tp, dtype, torch.device(device))
    made = build_norm("norm", small_config(hidden_size=size, use_fp32_norm=fp32_weight), tp_ctx)
    with torch.no_grad():
        made.weight.copy_(torch.linspace(0.5, 1.5, size))
    return made


def test_the_written_out_gradient_is_right():
    layer = norm(torch.float64)
    x = torch.randn(5, 12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, _: layer(x), (x, layer.weight))
    torch.testing.assert_close(layer(x), F.rms_norm(x, (12,), layer.weight, 1e-5), rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fp32_weight", [False, True])
def test_half_precision_is_float32_inside(dtype, fp32_weight):
    layer = norm(dtype, fp32_weight)
    assert layer.weight.dtype == (torch.float32 if fp32_weight else dtype)
    x = (torch.randn(5, 12) * 500).to(dtype).requires_grad_()  # squares overflow float16
    y = layer(x)
    y.sum().backward()
    expected = F.rms_norm(x.detach().double(), (12,), layer.weight.detach().double(), 1e-5)
    assert y.dtype == x.grad.dtype == dtype and layer.weight.grad.dtype == layer.weight.dtype
    torch.testing.assert_close(y.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA has its own kernel")
@pytest.mark.parametrize("fp32_weight", [False, True])
def test_saved_bytes_on_a_gpu(fp32_weight):
    """A kernel with an fp32 weight keeps the fp32 copy of its input, and not the input."""
    layer = norm(torch.bfloat16, fp32_weight, device="cuda")
    x = torch.randn(5, 12, device="cuda").bfloat16().requires_grad_()
    assert saved_bytes(lambda: layer(x), layer) == sum(layer.saved_bytes(RowShape(5, "cuda")).values())
