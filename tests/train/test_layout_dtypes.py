"""fp32, bf16, fp16 in every kind of layout: as close to one process as the dtype allows; fp16 skips the same steps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.corpus import write_corpus
from tests.train.layout_runs import Job, Seen, check, run_layouts, run_references
from tests.train.layouts import Layout, config_of, runnable

FP32_LIMIT = 1e-5
BF16_LIMITS = 2**-10, 2**-7
"""Relative, of a loss and of a gradient norm, between tensor-parallel layouts and one process.

bf16 rounds to 8 bits: u = 2^-9. Tensor parallelism rounds each rank's part of a row layer before the sum, one process
the sum; the errors of single elements, up to u each, are independent. A loss is a mean over more than a hundred labels,
so half a u is far above what is left of them (measured: u/60). A norm is led by a few large sums (measured: u/2).
"""
BF16_LIMIT_WHOLE = 1e-6
"""Without tensor parallelism nothing is rounded elsewhere: gradients of micro-batches and ranks are summed in fp32."""
ADAM = {"lr": 1e-3, "adam_eps": 1e-4}
"""eps above the rounding noise of gradients: AdamW with a smaller one moves an element whose gradient is nothing but
noise by a whole lr in a random direction, and curves part for no fault of the layout (fp32 by more than 1e-5 here)."""

GPT2 = (("model.mlp_type", "gelu_tanh"), ("model.mlp_bias", True), ("model.head_bias", True), ("loss.z_loss", 1e-3))
GEMMA = (("model.mlp_type", "geglu_tanh"), ("model.logit_softcap", 3.0), ("model.embed_scale", 5.6))

LAYOUTS = runnable(
    [
        Layout(dp=2, bucket=1500),
        Layout(tp=2, overlap_grad=False),
        Layout(tp=2, sp=True, tied=True, split_hidden=False),
        Layout(pp=2, schedule="zbv", chunks=2, keys=GPT2),
        Layout(dp=4, zero1=2, fp32_norm=True, bucket=1500),
        Layout(tp=4, sp=True, parallel_output=False, keys=GEMMA),
        Layout(dp=2, tp=2, zero1=1, sp=True, fp32_norm=True, checkpoint=0.5),
        Layout(dp=2, pp=2, tied=True, overlap_param=False),
        Layout(tp=2, pp=2, schedule="zbv", chunks=2, sp=True, fp32_norm=True, bucket=1500),
        Layout(tp=2, pp=2, schedule="interleaved", chunks=2, post_norm=True, checkpoint=1),
        Layout(pp=4, tied=True),
    ]
)

LOSS_SCALE = {
    # 2^60 and 2^35 overflow whatever the layout, 2^10 and the 2^11 it grows to do not: no layout is near the border.
    "fp16": {"initial_scale": 2.0**60, "growth_interval": 2},
    "backoff_factor": 2.0**-25,
    "hysteresis": 1,
}
SCALES = [2.0**60, 2.0**35, 2.0**10, 2.0**10, 2.0**11]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("dtypes") / "corpus", documents=200)


FLOAT8 = [
    Layout(fp8=True, dp=2, bucket=1500, checkpoint=0.5),
    Layout(fp8=True, tp=2, sp=True),
    Layout(fp8=True, pp=2, schedule="zbv", chunks=2, keys=GPT2),
    Layout(fp8=True, tp=2, pp=2, schedule="zbv", chunks=2, sp=True),
    Layout(fp8=True, tp=2, pp=2, schedule="interleaved", chunks=2, checkpoint=1),
]


def run_all(
    corpus: Path, dtype: str, folder: Path, layouts: Sequence[Layout] = LAYOUTS, **sections: Any
) -> list[tuple[Layout, Sequence[Seen], Seen]]:
    """(layout, what its ranks saw, what one process saw)"""

    def job(layout: Layout) -> Job:
        return Job(layout, config_of(layout, corpus, dtype, adam=dict(ADAM), **sections))

    singles = run_references([job(model) for model in {layout.same_model for layout in layouts}], folder / "single")
    found = []
    for ranks in (2, 4):
        mine = [layout for layout in layouts if layout.world == ranks]
        results = run_layouts([job(layout) for layout in mine], folder / str(ranks))
        found += [(layout, seen, singles[layout.same_model]) for layout, seen in zip(mine, results, strict=True)]
    return found


def test_fp32(corpus: Path, tmp_path: Path) -> None:
    for layout, seen, single in run_all(corpus, "torch.float32", tmp_path):
        check(layout, seen, single, FP32_LIMIT)


@pytest.mark.parametrize("layouts", [LAYOUTS, FLOAT8], ids=["bf16", "float8"])
def test_bf16(layouts: Sequence[Layout], corpus: Path, tmp_path: Path) -> None:
    """float8 does not part the layouts further: scales are powers of two, so which one a rank takes changes no rounding
    but that of very small numbers; and there is no state that recomputation or deferred gradients could change."""
    for layout, seen, single in run_all(corpus, "torch.bfloat16", tmp_path, layouts):
        if layout.tp == 1:
            check(layout, seen, single, BF16_LIMIT_WHOLE)
        else:
            check(layout, seen, single, *BF16_LIMITS)


def test_fp16_skips_the_same_steps_in_every_layout(corpus: Path, tmp_path: Path) -> None:
    for layout, seen, single in run_all(corpus, "torch.float16", tmp_path, grad_scaler=LOSS_SCALE):
        for metrics in (single.metrics, seen[0].metrics):
            assert [step["loss_scale"] for step in metrics] == SCALES, layout
            assert [step["inf_nan_skip_batches"] for step in metrics] == [1, 2, 2, 2, 2], layout
        for ours, expected in zip(seen[0].metrics, single.metrics, strict=True):
            assert ours["lr"] == expected["lr"], layout  # a skipped step is no step of the learning rate
            assert ours["loss"] == pytest.approx(expected["loss"], rel=2e-3), layout
        first, second = (step["loss_from_metric"] for step in seen[0].metrics[:2])
        assert seen[0].after.keys() == seen[0].before.keys() and seen[0].after != seen[0].before, layout
        assert abs(first - second) < 0.2  # nothing was updated in between
