"""Ways to run the training step: keys of the model, and patches that are measured before they are implemented.

Variants are combined by "+": "compile+varlen". "eager" is the unchanged step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from internlm_lite.config.schema import Config
from internlm_lite.layers import compiled, linear, mlp, norm


def apply(variant: str, smoke: bool) -> None:
    """Patch the modules of this process. Raises KeyError for an unknown name."""
    for name in variant.split("+"):
        VARIANTS[name](smoke)


def configured(config: Config, variant: str) -> Config:
    """The config with the keys of the model that the variant sets."""
    names = variant.split("+")
    keys = {
        "compile": "compile" in names,
        "checkpoint": "selective" if "selective" in names else "recompute" in names,
        "attention": "torch_varlen" if "varlen" in names and torch.cuda.is_available() else "auto",
        "fp8": "fp8" in names,
    }
    return config.model_copy(update={"model": config.model.model_copy(update=keys)})


def _nothing(smoke: bool) -> None:
    """No patch: keys of the model (`configured`), and `bare`."""


def _only_trace(smoke: bool) -> None:
    """model.compile; a smoke run only traces, as the C++ compiler would take minutes."""
    if smoke:
        _put(compiled, "COMPILER", "aot_eager")


def _liger(smoke: bool) -> None:
    """Replace RMSNorm and SwiGLU by those of liger-kernel."""
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    def forward(self: mlp.FeedForward, x: torch.Tensor) -> torch.Tensor:
        assert self.w3 is not None, "the bench's model is gated"
        gate, up = linear.columns(x, self.w1, self.w3)
        out: torch.Tensor = self.w2(LigerSiLUMulFunction.apply(gate, up))
        return out

    _put(mlp.FeedForward, "forward", forward)
    _put(
        norm.RMSNorm,
        "forward",
        lambda self, x: LigerRMSNormFunction.apply(x, self.weight, self.eps, 0.0, "llama", False),
    )


def _bare_compiled(smoke: bool) -> None:
    from internlm_lite.apps.bench import bare

    _only_trace(smoke)
    _put(bare.BareBlock, "forward", compiled.compiled(bare.BareBlock.forward))


def _put(owner: Any, name: str, value: Any) -> None:
    """setattr that raises AttributeError if `owner` has no `name`: the patch would have no effect."""
    getattr(owner, name)
    setattr(owner, name, value)


VARIANTS: dict[str, Callable[[bool], None]] = {
    "eager": _nothing,
    "bare": _nothing,
    "recompute": _nothing,
    "selective": _nothing,
    "varlen": _nothing,
    "fp8": _nothing,
    "compile": _only_trace,
    "compiled": _bare_compiled,
    "liger": _liger,
}
