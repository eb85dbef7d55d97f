"""What layers and optimizer say that their kernels move, against the operations of a whole eager step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from internlm_lite.apps.bench.shapes import bench_config, random_batch
from internlm_lite.apps.planner.clock import update_passes
from internlm_lite.apps.planner.holdings import holdings
from internlm_lite.layers import norm
from internlm_lite.layers.costs import Pass, RowShape
from internlm_lite.layers.flash import AttentionBackend
from internlm_lite.mesh.mesh import Sizes, single_process_mesh
from internlm_lite.train.trainer import Trainer

SHAPE = {"hidden": 512, "layers": 3, "heads": 4, "vocab": 4096, "seq_len": 512, "micro_bsz": 4, "micro_num": 2}
BY_OPERATIONS = ("mm", "addmm", "attention", "attn", "adam")
"""Names of operations whose time is not that of memory, or that have their own bandwidth: the fused update."""
NO_KERNELS = (
    "empty",
    "detach",
    "alias",
    "view",
    "select",
    "slice",
    "split",
    "unbind",
    "reshape",
    "expand",
    "t.",
    "lift",
)


class Traffic(TorchDispatchMode):
    """Bytes and number of the operations that go through memory."""

    def __init__(self) -> None:
        super().__init__()
        self.n_bytes = self.kernels = 0

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out, name = func(*args, **(kwargs or {})), func._schema.name.removeprefix("aten::")
        if func.is_view or any(word in name for word in NO_KERNELS):
            return out
        tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)]
        self.kernels += 1
        if not any(word in name for word in BY_OPERATIONS):
            self.n_bytes += sum(map(own_bytes, tensors[1:] if name in ("zero_", "fill_", "copy_") else tensors))
        return out


def own_bytes(x: torch.Tensor) -> int:
    return x.itemsize * prod(size for size, stride in zip(x.shape, x.stride(), strict=True) if stride)


SCALED = {"logit_scale": 0.5, "logit_softcap": 3.0, "embed_scale": 3.0}
WITH_BIASES = {"mlp_type": "gelu_tanh", "mlp_bias": True, "head_bias": True, "no_bias": False}


@pytest.mark.parametrize(
    ("dtype", "model", "within"),
    [
        ("bfloat16", {}, 0.1),
        ("bfloat16", {"embedding_dropout": 0.1, "residual_dropout": 0.1}, 0.1),
        ("float32", {}, 0.01),
        ("float32", {**WITH_BIASES, **SCALED}, 0.02),
        ("float32", {"mlp_type": "geglu", "logit_scale": 0.5, "checkpoint": "selective"}, 0.02),
    ],
    ids=str,
)
def test_an_eager_step_moves_what_the_layers_say(
    dtype: str, model: dict[str, Any], within: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the CPU, where single operations are those of CUDA, but for norms, which do nothing here, and for gradients of
    weights, which are 2 bytes more: an addition of a bf16 product."""
    monkeypatch.setattr(norm.RMSNorm, "forward", lambda self, x: x.view_as(x))
    config = bench_config(**SHAPE, dtype=f"torch.{dtype}", bucket_size=10**9)
    config = config.model_copy(update={"model": config.model.model_copy(update=model)})
    trainer = Trainer(config, single_process_mesh())
    with Traffic() as counted:
        trainer.step(random_batch(config, 0, torch.device("cpu")), 0)
        trainer.optimizer.wait_weights()
    (held,), _ = holdings(config, Sizes(), AttentionBackend.FLASH_ATTN)
    data, (stage,) = config.data, held.stages.values()
    row = RowShape(
        data.micro_bsz * data.seq_len, "cpu", fused=frozenset({"gradients"}), selective="checkpoint" in model
    )
    passes: list[Pass] = [one for unit in stage.units() for one in unit.passes(row)] * data.micro_num
    passes += [one for bucket in held.buckets for one in update_passes(bucket, one_pass=False)]
    kinds = {"norm": 0.0, "update": 0.0, "accumulate": 10 / 8}
    said = sum(one.n_bytes * kinds.get(one.kind, 1.0) for one in passes)
    assert said == pytest.approx(counted.n_bytes, rel=within)
