"""An encoder-decoder trains alike in all layouts, with every part of the families on both sides: loss, gradient norm
and weights of one process, in fp64."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from internlm_lite.config.cross import cross_problems
from internlm_lite.config.schema import Config
from internlm_lite.mesh.mesh import Mesh, single_process_mesh
from tests.torches import HAS_ZBV
from tests.train.family_layouts import PARTS
from tests.train.layout_runs import Job, check_layouts_of_one_size, run_one
from tests.train.layouts import LIMIT, Keys, Layout, config_of
from tests.train.runs import curve, run_training
from tests.train.test_layout_dtypes import ADAM
from tests.world import run_world

SAMPLE = int(os.environ.get("ENCODER_LAYOUTS", "4"))
"""`ENCODER_LAYOUTS=24 pytest tests/train/test_encoder_layouts.py` runs all."""
GROWING = {"initial_scale": 2.0**10, "growth_interval": 2}
SHAPES: tuple[dict[str, Any], ...] = (
    {"tp": 2, "sp": True, "tied": True, "split_hidden": False},
    {"pp": 2, "tied": True, "checkpoint": 1},
    {"dp": 2, "zero_stage": 3, "tied": True, "bucket": 1500},
    {"pp": 2, "schedule": "zbv" if HAS_ZBV else "interleaved", "chunks": 2, "tied": True},
    {"dp": 2, "pp": 2, "zero_stage": 2, "checkpoint": "selective"},
    {"tp": 2, "pp": 2, "sp": True, "checkpoint": 0.5},
    {"dp": 2, "tp": 2, "zero_stage": 3, "checkpoint": "offload", "sp": True, "bucket": 1500},
    {"tp": 4, "split_hidden": False, "parallel_output": False},
    {"pp": 4, "zero_stage": 3, "checkpoint": "selective"},
    {"dp": 4, "zero1": 2, "zero_stage": 2, "micro_bsz": 2},
    {"pp": 2, "dp": 2, "schedule": "interleaved", "chunks": 2, "overlap_grad": False, "overlap_param": False},
    {"dp": 2, "tp": 2, "pp": 2, "sp": True, "tied": True, "split_hidden": False, "zero_stage": 2},
)
"""Each comes twice, in other company."""
PADS = (("loss.pad_id", 0),)
"""What no label of the built-in pairs is."""
DROPOUT = tuple((f"model.{kind}_dropout", 0.1) for kind in ("embedding", "residual", "feed_forward", "attention"))


def config_with_sources(layout: Layout, **ckpt: Any) -> Config:
    """With AdamW's epsilon of 1e-8, rounding of the few gradients that are as small shows in weights: 2.5e-10 in one of
    these layouts, where 1e-4 leaves 8e-14."""
    config = config_of(layout, None, data={"source_seq_len": 48}, ckpt=ckpt)
    return config.model_copy(update={"adam": config.adam.model_copy(update={"adam_eps": 1e-4})})


def build(number: int, shift: int) -> Layout:
    """Layout number `number`, whose parts are moved on by `shift`."""
    parts = {**PARTS, "norm": (*PARTS["norm"], (("model.norm_type", "sample_layernorm"),))}
    steps = dict(zip(parts, (1, 2, 1, 3, 1, 1, 1, 1, 2, 1), strict=True))
    keys: Keys = sum((values[(number * steps[name] + shift) % len(values)] for name, values in parts.items()), ())
    keys += (
        ("model.num_encoder_layers", 2 + number % 2),
        *(PADS if number % 4 else ()),
        *(DROPOUT if number % 2 else ()),
    )
    keys += (("model.tie_source_embeddings", True),) if number % 3 else (("model.source_vocab_size", 320),)
    shape = SHAPES[number % len(SHAPES)]
    return Layout(**shape, layers=2 + number % 2, smoothing=0.1 if number % 4 else 0, rows=4, keys=keys)


@cache
def encoder_layouts() -> tuple[Layout, ...]:
    """Parts that do not stand together are moved on until they do."""
    layouts = [
        next(
            layout
            for layout in (build(number, shift) for shift in range(100))
            if not list(cross_problems(config_with_sources(layout), layout.world))
        )
        for number in range(2 * len(SHAPES))
    ]
    return tuple(sorted(layouts, key=lambda layout: layout.world))


def test_parts_of_families_are_on_both_sides() -> None:
    layouts = encoder_layouts()
    assert len(layouts) >= 20
    met = {key for layout in layouts for key in layout.keys}
    for name in (
        "norm_type",
        "norm_position",
        "position",
        "mlp_type",
        "sliding_window",
        "attention_softcap",
        "qk_norm",
    ):
        assert any(key == f"model.{name}" for key, _ in met), name


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_an_encoder_decoder_gives_the_curve_of_one_process(ranks: int, tmp_path: Path) -> None:
    sample = encoder_layouts()[:: len(encoder_layouts()) // SAMPLE]
    if layouts := [layout for layout in sample if layout.world == ranks]:
        check_layouts_of_one_size(layouts, config_with_sources, LIMIT, tmp_path)


def resume(mesh: Mesh, layout: Layout, folder: Path) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
    """The curve from step 2 on, and that of a run that goes on from the checkpoint of step 2."""
    saved = {"enable_save_ckpt": True, "checkpoint_every": 2, "async_upload": False}
    config = config_with_sources(layout, save_ckpt_folder=str(folder / "ckpt"), **saved)
    whole = curve(run_training(mesh, config, folder / "whole"))
    (commit,) = (folder / "ckpt" / "commits").glob(f"{2:010d}-*.json")
    again = run_training(mesh, config_with_sources(layout, load_ckpt_folder=str(commit)), folder / "again")
    return whole[2:], curve(again)


def test_a_run_resumes_to_the_bit(tmp_path: Path) -> None:
    layout = next(one for one in encoder_layouts() if one.pp == 2 and one.world == 2)
    whole, again = run_world(resume, 2, (layout, tmp_path), pipeline=2)[0]
    assert len(again) == 3 and again == whole


def in_dtypes(mesh: Mesh, folder: Path) -> dict[str, list[list[dict[str, Any]]]]:
    """dtype -> step objects of two ranks, and of one process."""
    keys: Keys = (("model.num_encoder_layers", 1), ("model.tie_source_embeddings", True), *PADS)
    layout = Layout(tp=2, sp=True, layers=1, rows=2, smoothing=0.1, keys=keys)
    found: dict[str, list[list[dict[str, Any]]]] = {}
    for dtype, scaler in (("float32", None), ("bfloat16", None), ("float16", {"fp16": GROWING})):
        for where, of in ((mesh, layout), (single_process_mesh(), layout.same_model)):
            sections = {"adam": dict(ADAM), "data": {"source_seq_len": 48}, "grad_scaler": scaler}
            config = config_of(of, None, f"torch.{dtype}", **{key: value for key, value in sections.items() if value})
            name = f"{dtype}-{where.world.size}-{mesh.rank}"
            found.setdefault(dtype, []).append(run_one(where, Job(of, config), folder / name).metrics)
    return found


def test_half_precision_is_near_fp32(tmp_path: Path) -> None:
    """Of a step's loss, a mean over some sixty labels, half a unit of rounding: 2^-10 of bf16, 2^-12 of fp16. Updates
    and norms take part in it, so four units. fp16 scales its loss, by twice as much after every second step."""
    found = run_world(in_dtypes, 2, (tmp_path,), tensor=2, timeout_seconds=300)[0]
    expected = found["float32"][1]
    assert expected[-1]["loss"] < expected[0]["loss"]
    for dtype, limit in (("float32", 1e-5), ("bfloat16", 2**-7), ("float16", 2**-9)):
        for steps in found[dtype]:
            worst = max(abs(a["loss"] / b["loss"] - 1) for a, b in zip(steps, expected, strict=True))
            print(f"{dtype}: {worst:.1e}, {[step['loss'] for step in steps]}")
            assert worst < limit, dtype
    assert all([step["loss_scale"] for step in steps][::2] == [2.0**10, 2.0**11, 2.0**12] for steps in found["float16"])
