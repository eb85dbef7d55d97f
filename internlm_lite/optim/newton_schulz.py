"""Newton-Schulz iteration of Muon: a matrix with singular values near 1 and the singular vectors of another.

    X <- G / |G|                      Frobenius norm, so that no singular value is above 1
    X <- a X + (b A + c A A) X        with A = X X^T, a few times

(K. Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024; arXiv:2502.16982, section 2.1.)
The coefficients have the steepest slope at 0: after five steps most singular values are between 0.5 and 1.5, and the
matrix is not U V^T.
"""

from __future__ import annotations

import math

import torch

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""a, b, c of the paper."""
TINY = 1e-30
"""Keeps a zero gradient zero; a larger number would leave small gradients as they are."""


def orthogonalised(gradient: torch.Tensor, steps: int, dtype: torch.dtype) -> torch.Tensor:
    """[rows, cols] in `dtype` for `gradient` [rows, cols] in fp32 or fp64.

    It is divided by its norm before it is cast, so its scale does not matter. Zeros stay zero.
    """
    x = gradient / torch.linalg.vector_norm(gradient, dtype=torch.float64).clamp(min=TINY).to(gradient.dtype)
    tall = gradient.shape[0] > gradient.shape[1]
    # The same strides for a given shape, whatever part of which buffer `gradient` is: so the products round the same.
    x = (x.t() if tall else x).to(dtype).contiguous()
    a, b, c = COEFFICIENTS
    for _ in range(steps):
        products = x @ x.t()
        x = torch.addmm(x, torch.addmm(products, products, products, beta=b, alpha=c), x, beta=a)
    return x.t() if tall else x


def iteration_flops(rows: int, cols: int, steps: int) -> int:
    """Operations of `steps` steps: the products X X^T [m, m], A A [m, m] and A X [m, n], with m the smaller side."""
    m, n = sorted((rows, cols))
    return steps * (4 * m * m * n + 2 * m**3)


def update_scale(kind: str, rows: int, cols: int) -> float:
    """Factor of an orthogonalised [rows, cols]. "rms": its elements get an RMS of about 0.2, that of AdamW's updates,
    so that both take one learning rate (arXiv:2502.16982, section 2.2). "spectral": K. Jordan's."""
    return 0.2 * math.sqrt(max(rows, cols)) if kind == "rms" else math.sqrt(max(1, rows / cols))
