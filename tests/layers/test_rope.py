"""The rotary embedding against Llama's published form."""

import torch

from internlm_lite.layers.rope import RopeFrequencies, Rotary, plain_frequencies


def rotary_of(positions, head_dim, base):
    return Rotary(positions, RopeFrequencies(plain_frequencies(head_dim, base)), torch.float64)


def llama(x, positions, base):
    """transformers' apply_rotary_pos_emb: x * cos + rotate_half(x) * sin."""
    inverse = 1.0 / base ** (torch.arange(0, x.shape[-1], 2, dtype=torch.float64) / x.shape[-1])
    angle = torch.outer(positions.double(), inverse)
    angle = torch.cat((angle, angle), dim=-1)[:, None, None]
    first, second = x.chunk(2, dim=-1)
    return x * angle.cos() + torch.cat((-second, first), dim=-1) * angle.sin()


def test_it_is_llamas_rotate_half_form():
    positions = torch.tensor([0, 1, 2, 0, 1, 4095])
    x = torch.randn(6, 2, 3, 8, dtype=torch.float64)
    for base in (10000.0, 1e6):
        turned = rotary_of(positions, 8, base)(x)
        torch.testing.assert_close(turned, llama(x, positions, base), rtol=1e-12, atol=1e-12)


def test_the_gradient_is_right_for_strided_input():
    positions = torch.arange(4)
    rotary = rotary_of(positions, 6, 100.0)
    x = torch.randn(4, 2, 5, 6, dtype=torch.float64, requires_grad=True)
    assert rotary(x[:, :, 1:3]).is_contiguous()
    assert torch.autograd.gradcheck(lambda x: rotary(x[:, :, 1:3]), x)


def test_scores_depend_on_distance_only():
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64)

    def score(at: int, other: int) -> torch.Tensor:
        turned_q = rotary_of(torch.tensor([at]), 16, 10000.0)(q)
        return (turned_q * rotary_of(torch.tensor([other]), 16, 10000.0)(k)).sum()

    torch.testing.assert_close(score(5, 2), score(100_005, 100_002), rtol=1e-9, atol=1e-9)
