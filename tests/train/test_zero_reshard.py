"""What one stage of ZeRO saves, in any layout or under DeepSpeed, any other loads bit by bit, and goes on; in its own
layout to the bit.

Pairs of our own layouts train in fp64 and keep an average of the weights. DeepSpeed's master weights are fp32 and it
keeps no average, so that pairs with it are of fp32 runs, with parameters in two groups.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from internlm_lite.config.schema import Config
from tests.corpus import write_corpus
from tests.train.layouts import LIMIT, Keys, Layout, config_of
from tests.train.test_reshard import SAVED, assert_same, job, loading, run_all, saving

SHARE = int(os.environ.get("ZERO_RESHARD_SHARE", "6"))
"""One pair in so many; `ZERO_RESHARD_SHARE=1` looks at all."""
FP32_LIMIT = 1e-6
"""Relative, of a loss or norm that another layout or engine computes in fp32."""


def deepspeed(stage: int, offload: str = "none") -> Keys:
    return ("engine.name", "deepspeed"), ("engine.stage", stage), ("engine.offload", offload)


OURS = {
    "stage 1": Layout(dp=2, rows=12),
    "stage 1 tp": Layout(tp=2, split_hidden=False, rows=12),
    "stage 2": Layout(dp=4, zero1=2, bucket=1500, rows=12, zero_stage=2),
    "stage 2 pp": Layout(dp=2, pp=2, rows=12, zero_stage=2),
    "stage 3": Layout(dp=4, rows=12, zero_stage=3),
    "stage 3 tp sp": Layout(dp=2, tp=2, sp=True, split_hidden=False, bucket=1500, rows=12, zero_stage=3),
    "context": Layout(dp=2, cp=2, rows=12),
    "context ring, stage 3": Layout(cp=2, exchange="ring", rows=12, zero_stage=3),
    "context Ulysses, stage 2, tp": Layout(
        tp=2, cp=2, exchange="ulysses", sp=True, split_hidden=False, rows=12, zero_stage=2
    ),
    "stage 3 of three": Layout(dp=3, rows=12, zero_stage=3),  # shards of sizes that no power of two divides
}
DEEPSPEED = {
    "DeepSpeed 1": Layout(dp=2, rows=12, keys=deepspeed(1)),
    "DeepSpeed 2, offload": Layout(dp=2, rows=12, keys=deepspeed(2, "cpu")),
    "DeepSpeed 3 of three": Layout(dp=3, rows=12, keys=deepspeed(3)),
    "DeepSpeed 3 alone": Layout(rows=12, keys=deepspeed(3)),
}
LAYOUTS = {**OURS, **DEEPSPEED}


def chosen(pairs: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Each layout with itself, and one pair in SHARE."""
    return [pair for n, pair in enumerate(pairs) if pair[0] == pair[1] or n % SHARE == 0]


def reshard(
    pairs: list[tuple[str, str]], config: Callable[[Layout, dict[str, Any]], Config], limit: float, folder: Path
) -> None:
    """The first of a pair saves, the second loads that and goes on. `config`: of a layout and its section `ckpt`."""
    sources = {first: LAYOUTS[first] for first, _ in pairs}
    saves = folder / "saves"
    jobs = [(layout, config(layout, saving(saves / name))) for name, layout in sources.items()]
    saved = dict(zip(sources, run_all(jobs, folder / "sources"), strict=True))
    jobs = [(LAYOUTS[second], config(LAYOUTS[second], loading(saves / first))) for first, second in pairs]
    for (first, second), (tensors, went_on) in zip(pairs, run_all(jobs, folder / "targets"), strict=True):
        held, whole_curve = saved[first]
        assert_same(tensors, held)
        if first == second:
            assert went_on == whole_curve[SAVED:], first
        for ours, expected in zip(went_on, whole_curve[SAVED:], strict=True):
            assert ours == pytest.approx(expected, rel=limit), (first, second)


@pytest.mark.parametrize("tied", [False, True])
def test_every_stage_reshards_into_every_other_and_goes_on(tied: bool, tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus", documents=200)
    pairs = chosen(product(OURS, OURS))
    reshard(pairs, lambda layout, ckpt: job(layout, tied, corpus, ckpt), LIMIT, tmp_path)


def test_every_layout_reshards_into_deepspeed_and_back(tmp_path: Path) -> None:
    """DeepSpeed's own checkpoints are tied to engine, stage and number of ranks."""
    corpus = write_corpus(tmp_path / "corpus", documents=200)
    pairs = chosen(pair for pair in product(LAYOUTS, LAYOUTS) if DEEPSPEED.keys() & set(pair))
    groups = {"groups": [{"pattern": "*norm*", "lr": 3e-3, "betas": [0.8, 0.9]}]}

    def config(layout: Layout, ckpt: dict[str, Any]) -> Config:
        return config_of(layout, corpus, "torch.float32", ckpt=ckpt, optimizer=groups)

    reshard(pairs, config, FP32_LIMIT, tmp_path)
