"""Two and four tensor-parallel ranks give the losses and gradients of one process: float64, to 1e-10."""

from typing import Any

import pytest
import torch

from internlm_lite.mesh.comm import all_reduce
from internlm_lite.mesh.layout import Parameter
from internlm_lite.mesh.mesh import Group, Mesh
from tests.models.small import documents, run, small_model
from tests.world import run_world

LENGTHS = [5, 9, 9, 1, 12]
LEARNED = {"position": "learned", "max_position_embeddings": 15}
CASES: dict[str, dict[str, Any]] = {
    "hidden-split embedding": {"embed_split_hidden": True},
    "vocabulary-split embedding": {"embed_split_hidden": False, "embed_grad_scale": 0.1},
    "gathered logits": {"parallel_output": False, "label_smoothing": 0.1},
    "tied, smoothed": {"tie_word_embeddings": True, "embed_split_hidden": False, "label_smoothing": 0.1},
    "tied, gathered logits": {"tie_word_embeddings": True, "embed_split_hidden": False, "parallel_output": False},
    "recomputed": {"checkpoint": True},
    "half recomputed, no bias": {"checkpoint": 0.5, "no_bias": True},
    "post norm": {"apply_post_layer_norm": True},
    "gelu, biases": {"mlp_type": "gelu", "mlp_bias": True, "head_bias": True, "z_loss": 0.01},
    "geglu, capped logits": {"mlp_type": "geglu_tanh", "logit_softcap": 0.5, "logit_scale": 0.7, "embed_scale": 2.5},
    "relu, tied with bias": {
        "mlp_type": "relu",
        "mlp_bias": True,
        **{"tie_word_embeddings": True, "embed_split_hidden": False, "embed_scale": 5.0, "z_loss": 0.1},
        **{"head_bias": True, "logit_softcap": 2.0, "parallel_output": False, "label_smoothing": 0.1},
    },
    "one query per key": {"num_kv_attention_heads": None},
    "layer norms, also of heads": {"norm_type": "layernorm", "qk_norm": "head", "norm_position": "post"},
    "norms over all heads": {"norm_position": "reordered", "qk_norm": "full", "zero_centered_norm": True},
    "norms over all heads, recomputed": {"norm_position": "sandwich", "qk_norm": "full", "checkpoint": 0.5},
    "norms over all heads, made again": {"norm_position": "reordered", "qk_norm": "full", "checkpoint": "selective"},
    "learned positions": LEARNED,
    "learned positions, by vocabulary": {**LEARNED, "embed_split_hidden": False, "embed_grad_scale": 0.1},
    "sinusoidal": {"position": "sinusoidal"},
    "sinusoidal, by vocabulary": {"position": "sinusoidal", "embed_split_hidden": False},
    "kinds of rotations": {
        "partial_rotary_factor": 0.5,
        "no_rope_every": 3,
        "sliding_window": 99,
        "layer_types": ["full_attention", "sliding_attention"],
        "rope_local_base": 50.0,
    },
    "dynamic": {"rope_scaling": {"rope_type": "dynamic", "factor": 3.0, "original_max_position_embeddings": 6}},
}
CASES |= {f"by sequence, {name}": {**changes, "by_sequence": True} for name, changes in CASES.items()}


def summed(param: Parameter, tp: Group) -> torch.Tensor:
    """The gradient, once partial sums over the tensor-parallel ranks are added up, as the optimizer does."""
    if "tp" in param.shard_spec.partial_over:
        all_reduce(param.grad, tp).wait()
    return param.grad


def train_once(mesh: Mesh | None, changes: dict[str, Any]) -> dict[str, Any]:
    """Losses, and each gradient with its place in the whole."""
    model = small_model(mesh, **changes)
    losses = run(model, documents(LENGTHS))
    losses.scaled_sum.backward()
    tp = model.tp_ctx.group
    return {
        "scaled_sum": losses.scaled_sum.detach(),
        "train_loss_sum": losses.train_loss_sum,
        "token_loss": losses.token_loss,
        "correct": losses.correct,
        "grads": {name: (param.shard_spec.box, summed(param, tp)) for name, param in model.named_parameters()},
    }


def train_all(mesh: Mesh) -> dict[str, dict[str, Any]]:
    return {name: train_once(mesh, changes) for name, changes in CASES.items()}


@pytest.fixture(scope="module", params=[2, 4])
def world(request) -> list[dict[str, Any]]:
    return run_world(train_all, request.param, tensor=request.param)


@pytest.mark.parametrize("case", CASES)
def test_ranks_agree_with_one_process(world, case):
    alone = train_once(None, CASES[case])
    for rank in world:
        ours = rank[case]
        for key in ("scaled_sum", "train_loss_sum", "token_loss"):
            torch.testing.assert_close(ours[key], alone[key], rtol=1e-10, atol=1e-12)
        assert torch.equal(ours["correct"], alone["correct"])
        for name, (box, grad) in ours["grads"].items():
            whole = alone["grads"][name][1]
            part = whole[tuple(slice(*side) for side in box)]
            torch.testing.assert_close(grad, part, rtol=1e-10, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


def test_whole_parameters_have_bitwise_equal_gradients(world):
    for case in CASES:
        for name, (box, grad) in world[0][case]["grads"].items():
            if all(rank[case]["grads"][name][0] == box for rank in world):
                assert all(torch.equal(rank[case]["grads"][name][1], grad) for rank in world), (case, name)
