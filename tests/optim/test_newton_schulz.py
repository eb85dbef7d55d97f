"""The iteration of Muon: what it does to singular values, and that neither scale nor orientation matter."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from internlm_lite.optim.newton_schulz import COEFFICIENTS, iteration_flops, orthogonalised, update_scale

SHAPES = [(48, 48), (32, 80), (80, 32), (1, 40), (40, 1), (63, 63)]


def gradient(rows: int, cols: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, cols, generator=generator, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("shape", SHAPES)
def test_singular_values_are_those_of_the_polynomial(shape: tuple[int, int]) -> None:
    """x -> a x + b x^3 + c x^5, five times, on each singular value of the normalised matrix; the vectors stay. U V^T is
    not what is computed."""
    g = gradient(*shape)
    u, s, vt = torch.linalg.svd(g, full_matrices=False)
    s = s / s.square().sum().sqrt()
    a, b, c = 3.4445, -4.7750, 2.0315
    assert (a, b, c) == COEFFICIENTS
    for _ in range(5):
        s = a * s + b * s**3 + c * s**5
    found = orthogonalised(g, 5, torch.float64)
    torch.testing.assert_close(found, (u * s) @ vt, rtol=0, atol=1e-11)
    assert found.shape == g.shape
    assert s.max() < 1.3


@pytest.mark.parametrize("shape", SHAPES)
def test_the_transpose_of_a_gradient_gives_the_transpose(shape: tuple[int, int]) -> None:
    g = gradient(*shape)
    torch.testing.assert_close(orthogonalised(g.t(), 5, torch.float64), orthogonalised(g, 5, torch.float64).t())


def test_the_product_is_of_the_smaller_side(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    addmm = torch.addmm
    monkeypatch.setattr(torch, "addmm", lambda *args, **kwargs: seen.append(args[0].shape) or addmm(*args, **kwargs))
    for shape in ((32, 80), (80, 32), (48, 48)):
        orthogonalised(gradient(*shape), 1, torch.float64)
    assert seen == [(32, 32), (32, 80), (32, 32), (32, 80), (48, 48), (48, 48)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("factor", [1e-25, 1e-10, 1e-4, 1e4, 1e8, 1e15])
def test_the_scale_of_a_gradient_does_not_matter(dtype: torch.dtype, factor: float) -> None:
    """A gradient that is divided by its norm after a cast to half precision overflows there, and one whose norm is not
    allowed below 1e-7 is left as small as it was."""
    g = gradient(48, 64, torch.float32)
    power = 2.0 ** round(torch.tensor(factor).log2().item())  # so that the product is exact
    assert torch.equal(orthogonalised(g * power, 5, dtype), orthogonalised(g, 5, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_zeros_stay_zero(dtype: torch.dtype) -> None:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert torch.equal(orthogonalised(torch.zeros(8, 16, dtype=wide), 5, dtype), torch.zeros(8, 16, dtype=dtype))


def test_bits_do_not_depend_on_where_the_gradient_lies() -> None:
    """In a buffer at any offset, or as rows between those of other matrices."""
    g = gradient(24, 40, torch.float32)
    expected = orthogonalised(g, 5, torch.float32)
    for offset in range(1, 9):
        buffer = torch.zeros(2000)
        buffer[offset : offset + g.numel()] = g.flatten()
        assert torch.equal(orthogonalised(buffer[offset : offset + g.numel()].view_as(g), 5, torch.float32), expected)
    assert torch.equal(orthogonalised(g.t().contiguous().t(), 5, torch.float32), expected)


def test_operations_are_those_of_torchs_counter() -> None:
    for shape in ((32, 80), (80, 32), (48, 48)):
        with FlopCounterMode(display=False) as counter:
            orthogonalised(gradient(*shape), 5, torch.float64)
        assert iteration_flops(*shape, 5) == counter.get_total_flops()


def test_scales() -> None:
    """With "rms" the update of a matrix of full rank has an RMS of 0.2 times about 1, whatever its shape."""
    assert update_scale("spectral", 64, 16) == 2
    assert update_scale("spectral", 16, 64) == 1
    for shape in ((64, 64), (64, 256), (256, 64)):
        update = orthogonalised(gradient(*shape), 5, torch.float64) * update_scale("rms", *shape)
        assert update.square().mean().sqrt().item() == pytest.approx(0.2, rel=0.15)
