"""Each pair of conjugate collectives against plain autograd on the inputs of all ranks, in fp64 on two and three ranks.

Every rank draws the inputs x and the weights w of all ranks. The loss is the sum over ranks of w * output, counted once
where all ranks hold the same output. What a rank gets from our operation must be what autograd gives on one process.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from internlm_lite.mesh import conjugate
from internlm_lite.mesh.mesh import Group, Mesh, single_process_mesh
from tests.world import run_world

Tensors = list[torch.Tensor]


@dataclass(frozen=True)
class Pair:
    """`plain`: outputs of all ranks from the inputs of all ranks, with nothing but torch."""

    ours: Callable[[torch.Tensor, Group], torch.Tensor]
    plain: Callable[[Tensors], Tensors]
    same_output: bool = False
    """Whether what follows is the same computation on every rank, so that the loss counts once."""


def rows(x: torch.Tensor, size: int) -> Tensors:
    return list(x.chunk(size, dim=0))


PAIRS = {
    "copy_to_group": Pair(conjugate.copy_to_group, lambda xs: [xs[0]] * len(xs)),
    "reduce_from_group": Pair(conjugate.reduce_from_group, lambda xs: [sum(xs[1:], xs[0])] * len(xs), same_output=True),
    "gather_rows": Pair(conjugate.gather_rows, lambda xs: [torch.cat(xs)] * len(xs)),
    "scatter_rows": Pair(conjugate.scatter_rows, lambda xs: rows(sum(xs[1:], xs[0]), len(xs))),
    "gather_last": Pair(conjugate.gather_last, lambda xs: [torch.cat(xs, dim=-1)] * len(xs), same_output=True),
    "columns_to_rows": Pair(conjugate.columns_to_rows, lambda xs: rows(torch.cat(xs, dim=-1), len(xs))),
}


def draw(name: str, size: int) -> tuple[Tensors, Tensors]:
    """(inputs [6, 4] of all ranks, weights of all ranks in the shape of their outputs)."""
    generator = torch.Generator().manual_seed(sum(map(ord, name)))

    def normal(shape: torch.Size | tuple[int, ...]) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    xs = [normal((6, 4)) for _ in range(size)]
    if name == "copy_to_group":
        xs = [xs[0]] * size
    ws = [normal(out.shape) for out in PAIRS[name].plain(xs)]
    return xs, [ws[0]] * size if PAIRS[name].same_output else ws


def expected(name: str, size: int) -> tuple[Tensors, Tensors]:
    """(outputs, gradients of the inputs) of all ranks."""
    xs, ws = draw(name, size)
    leaves = [x.clone().requires_grad_() for x in xs]
    if name == "copy_to_group":
        leaves = [leaves[0]] * size
    outs = PAIRS[name].plain(leaves)
    terms = [(w * out).sum() for w, out in zip(ws, outs, strict=True)]
    loss = terms[0] if PAIRS[name].same_output else torch.stack(terms).sum()
    return [out.detach() for out in outs], list(torch.autograd.grad(loss, leaves, materialize_grads=True))


def _run_pairs(mesh: Mesh) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """(output, gradient of the input) of this rank, for every pair; inputs and gradients are not contiguous."""
    found = {}
    for name, pair in PAIRS.items():
        xs, ws = draw(name, mesh.tp.size)
        x = xs[mesh.tp.rank].clone()
        if name != "reduce_from_group":  # which asks for a contiguous input
            x = x.t().contiguous().t()
        x.requires_grad_()
        out = pair.ours(x * 1.0, mesh.tp)  # `* 1.0`: reduce_from_group writes into its input, which must be no leaf
        (grad,) = torch.autograd.grad(out, x, ws[mesh.tp.rank].t().contiguous().t())
        found[name] = (out.detach(), grad)
    return found


@pytest.mark.parametrize("size", [2, 3])
def test_every_pair_has_the_values_and_gradients_of_autograd(size: int) -> None:
    results = run_world(_run_pairs, size, tensor=size)
    for name in PAIRS:
        outs, grads = expected(name, size)
        for rank, found in enumerate(results):
            torch.testing.assert_close(found[name][0], outs[rank], rtol=1e-14, atol=1e-14, msg=f"{name} output {rank}")
            torch.testing.assert_close(found[name][1], grads[rank], rtol=1e-14, atol=1e-14, msg=f"{name} grad {rank}")


def _expanded_gradient(mesh: Mesh) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of a sum, an expanded scalar, through the pairs that reduce in the backward pass."""
    x = torch.ones(6, 4, dtype=torch.float64, requires_grad=True)
    y = torch.ones(6, 4, dtype=torch.float64, requires_grad=True)
    conjugate.copy_to_group(x, mesh.tp).sum().backward()
    conjugate.gather_rows(y, mesh.tp).sum().backward()
    assert x.grad is not None and y.grad is not None
    return x.grad, y.grad


def test_an_expanded_gradient_is_reduced() -> None:
    for grads in run_world(_expanded_gradient, 3, tensor=3):
        assert all(torch.equal(grad, torch.full((6, 4), 3.0, dtype=torch.float64)) for grad in grads)


def _copies_are_independent(mesh: Mesh) -> torch.Tensor:
    """The gradient that copy_to_group reduces also reaches another input, where it must stay this rank's own."""
    x, y = (torch.ones(2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    (conjugate.copy_to_group(x, mesh.tp) + y).backward(torch.full((2,), mesh.tp.rank + 1.0, dtype=torch.float64))
    assert x.grad is not None and y.grad is not None
    return torch.stack((x.grad, y.grad))


def test_reducing_a_gradient_leaves_that_of_other_inputs_alone() -> None:
    for rank, grads in enumerate(run_world(_copies_are_independent, 2, tensor=2)):
        assert grads.tolist() == [[3.0, 3.0], [rank + 1.0, rank + 1.0]]


@pytest.mark.parametrize("name", PAIRS)
def test_a_group_of_one_is_the_identity(name: str) -> None:
    x = torch.randn(6, 4, dtype=torch.float64)
    assert PAIRS[name].ours(x, single_process_mesh().tp) is x
