"""An encoder-decoder trains alike in all layouts, with every part of the families on both sides: loss, gradient norm
and weights of one process, in fp64."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from internlm_lite.config.schema import Config
from tests.train.family_layouts import RUNS, family_layouts
from tests.train.layout_runs import check_layouts_of_one_size
from tests.train.layouts import LIMIT, MAX_RANKS, Keys, Layout, config_of, runnable
from tests.train.layouts import feasible as decoder_feasible

ALL = 32
SAMPLE = int(os.environ.get("ENCODER_LAYOUTS", "4"))
"""`ENCODER_LAYOUTS=32 pytest tests/train/test_encoder_layouts.py` runs all."""
SOURCE_LENGTH = 48
CHECKPOINTS = (0, "selective", 0.5, 1, "offload")
NORMS = ((), (("model.norm_type", "sample_layernorm"),))


def config_with_sources(layout: Layout) -> Config:
    return config_of(layout, None, data={"source_seq_len": SOURCE_LENGTH})


def encoder_layouts() -> Iterator[Layout]:
    """Layouts of the families with an encoder of three layers, and in turn stages of ZeRO, ways to recompute, tied
    embeddings and the norm of the annotated transformer."""
    for number, layout in enumerate(family_layouts()[:: RUNS // ALL]):
        keys: Keys = (*layout.keys, ("model.num_encoder_layers", 3))
        keys += (("model.tie_source_embeddings", True),) if number % 3 else (("model.source_vocab_size", 320),)
        keys += (("loss.pad_id", 2),) if layout.smoothing else ()
        if number % 4 == 1 and not any(name in ("model.norm_type", "model.qk_norm") for name, _ in keys):
            keys += NORMS[1]
        layers = max(2, layout.pp * layout.chunks - 2)
        changed = replace(layout, keys=keys, layers=layers, checkpoint=CHECKPOINTS[number % 5])
        staged = [replace(changed, zero_stage=stage) for stage in (1 + number % 3, 2, 1)]
        yield next(one for one in staged if decoder_feasible(one))


def test_there_are_enough_of_every_kind() -> None:
    layouts = list(encoder_layouts())
    assert len(layouts) == ALL
    for name, values in {"zero_stage": (1, 2, 3), "sp": (False, True), "tied": (False, True)}.items():
        assert {getattr(layout, name) for layout in layouts} == set(values)
    assert {layout.checkpoint for layout in layouts} == set(CHECKPOINTS)
    assert all(sum(getattr(layout, axis) > 1 for layout in layouts) >= 8 for axis in ("dp", "tp", "pp"))


@pytest.mark.parametrize("ranks", range(1, MAX_RANKS + 1))
def test_an_encoder_decoder_gives_the_curve_of_one_process(ranks: int, tmp_path: Path) -> None:
    sample = runnable(list(encoder_layouts())[:: ALL // SAMPLE])
    if layouts := [layout for layout in sample if layout.world == ranks]:
        check_layouts_of_one_size(layouts, config_with_sources, LIMIT, tmp_path)
