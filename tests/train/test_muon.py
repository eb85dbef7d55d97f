"""Muon trains alike in every layout: its matrices are whole, wherever their parts are and whoever iterates on them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from internlm_lite.config.schema import Config
from internlm_lite.mesh.mesh import Mesh
from tests.corpus import write_corpus
from tests.train.layout_runs import Job, check, check_layouts_of_one_size, run_layouts, run_references
from tests.train.layouts import LIMIT, Layout, config_of, runnable
from tests.train.runs import curve, run_training
from tests.world import run_world

STEPS = 20
Curve = list[tuple[float, float]]
SAMPLE = int(os.environ.get("MUON_LAYOUTS", "5"))
"""`MUON_LAYOUTS=30 pytest tests/train/test_muon.py` runs all."""
GQA = (("model.num_kv_attention_heads", 2),)
MHA = (("model.num_kv_attention_heads", 8),)
LAYOUTS = runnable(
    [
        Layout(dp=2, tp=2, sp=True, keys=GQA, bucket=1500, layers=2),
        Layout(tp=2, keys=GQA, layers=2),
        Layout(dp=2, zero1=2, layers=2),
        Layout(pp=2, tp=2, sp=True, tied=True, split_hidden=False, layers=3),
        Layout(dp=4, zero1=2, keys=GQA, bucket=3000, layers=2),
        Layout(dp=2, zero1=1, layers=2),
        Layout(dp=2, zero1=2, bucket=1500, layers=2),
        Layout(dp=4, zero1=4, layers=2),
        Layout(dp=4, zero1=1, layers=2),
        Layout(dp=3, rows=6, layers=2),  # 14 matrices for three ranks
        Layout(tp=2, layers=2),
        Layout(tp=2, sp=True, layers=2),
        Layout(tp=2, keys=MHA, layers=2),
        Layout(tp=2, keys=GQA, sp=True, layers=2),
        Layout(tp=4, layers=2),
        Layout(tp=4, sp=True, layers=2),
        Layout(tp=4, keys=MHA, layers=2),
        Layout(tp=2, qk_norm="head", bias="qkv", head_dim=6, layers=2),
        Layout(pp=2, layers=3),
        Layout(pp=2, schedule="interleaved", chunks=2, layers=5),
        Layout(pp=2, schedule="zbv", chunks=2, layers=5, bucket=1500),
        Layout(pp=2, dp=2, layers=3),
        Layout(pp=2, tied=True, layers=3),
        Layout(dp=2, tp=2, layers=2),
        Layout(dp=2, tp=2, zero1=1, keys=MHA, layers=2),
        Layout(dp=4, keys=GQA, layers=1),  # fewer matrices in some buckets than ranks
        Layout(dp=2, tp=2, split_hidden=False, overlap_grad=False, overlap_param=False, layers=2),
        Layout(tp=2, keys=(("model.mlp_type", "gelu"), ("model.mlp_bias", True)), layers=2),
    ]
)


def muon_config(layout: Layout, corpus: Path, **sections: Any) -> Config:
    adam = {"lr": 1e-2, "weight_decay": 0.1}
    dump = config_of(layout, corpus, adam=adam, optimizer={"name": "muon"}).model_dump()
    dump["data"]["total_steps"] = dump["lr_scheduler"]["total_steps"] = STEPS
    for section, changes in sections.items():
        dump[section].update(changes)
    return Config.model_validate(dump)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("layouts") / "corpus", documents=200)


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_every_layout_trains_as_one_process(ranks: int, corpus: Path, tmp_path: Path) -> None:
    layouts = [layout for layout in LAYOUTS[:SAMPLE] if layout.world == ranks]
    if not layouts:
        return
    check_layouts_of_one_size(layouts, lambda layout: muon_config(layout, corpus), LIMIT, tmp_path)


def test_who_owns_a_matrix_changes_no_bit(corpus: Path, tmp_path: Path) -> None:
    """The sum of two gradients has one rounding, whichever rank adds them: so what is left is the iteration."""
    layouts = [Layout(dp=2, zero1=1, layers=2), Layout(dp=2, zero1=2, layers=2), Layout(dp=2, bucket=1500, layers=2)]
    model = {"dtype": "torch.float32"}
    sections = {"hybrid_zero_optimizer": {"clip_grad_norm": 0.0}}  # the norm is summed shard by shard
    jobs = [Job(layout, muon_config(layout, corpus, model=model, **sections)) for layout in layouts]
    first, *others = (ranks[0].after for ranks in run_layouts(jobs, tmp_path))
    assert all(other == first for other in others)


DTYPES = [Layout(dp=2, zero1=2, layers=2), Layout(tp=2, sp=True, keys=GQA, layers=2), Layout(pp=2, layers=3)]


@pytest.mark.parametrize(
    ("dtype", "rel", "norm_rel"), [("torch.float32", 1e-5, 1e-4), ("torch.bfloat16", 2**-9, 2**-5)]
)
def test_lower_precision(dtype: str, rel: float, norm_rel: float, corpus: Path, tmp_path: Path) -> None:
    """Five steps; small gradients of AdamW's parameters are kept from deciding (`eps`)."""

    def job(layout: Layout) -> Job:
        adam = {"lr": 1e-3, "adam_eps": 1e-4}
        steps = {"data": {"total_steps": 5}, "lr_scheduler": {"total_steps": 5}}
        return Job(layout, muon_config(layout, corpus, adam=adam, model={"dtype": dtype}, **steps))

    singles = run_references([job(model) for model in {one.same_model for one in DTYPES}], tmp_path / "single")
    for layout, seen in zip(DTYPES, run_layouts(map(job, DTYPES), tmp_path / "layouts"), strict=True):
        check(layout, seen, singles[layout.same_model], rel, norm_rel)


def test_fp16_overflows_leave_weights_and_momentum_alone(corpus: Path, tmp_path: Path) -> None:
    """Two steps overflow in any layout; the scaled gradients of the third are beyond fp16 as a whole matrix's norm."""
    scaler = {
        "fp16": {"initial_scale": 2.0**60, "growth_interval": 2},
        "backoff_factor": 2.0**-25,
        "hysteresis": 1,
    }
    steps = {"data": {"total_steps": 5}, "lr_scheduler": {"total_steps": 5}}
    for layout in (Layout(tp=2, sp=True, layers=2), Layout(dp=2, layers=2)):
        dump = muon_config(layout, corpus, model={"dtype": "torch.float16"}, **steps).model_dump()
        config = Config.model_validate({**dump, "grad_scaler": scaler})
        (ranks,) = run_layouts([Job(layout, config)], tmp_path / str(layout))
        metrics = ranks[0].metrics
        assert [step["inf_nan_skip_batches"] for step in metrics] == [1, 2, 2, 2, 2], layout
        assert abs(metrics[0]["loss_from_metric"] - metrics[1]["loss_from_metric"]) < 0.2
        assert metrics[-1]["loss"] < metrics[0]["loss"] and ranks[0].after != ranks[0].before


RESUMED = [
    Layout(dp=2, tp=2, sp=True, zero1=2, layers=2),
    Layout(layers=2),
    Layout(tp=4, layers=2),
    Layout(dp=4, zero1=2, layers=2, bucket=1500),
    Layout(dp=2, zero1=1, layers=2),
]


def _resume(mesh: Mesh, config: Config, folder: Path) -> Curve:
    return curve(run_training(mesh, config, folder))


def test_a_checkpoint_goes_on_in_other_layouts(corpus: Path, tmp_path: Path) -> None:
    """Bit for bit in its own layout; its momentum is cut anew in others, and neither zeroed nor cast."""
    saves, (first, *_) = tmp_path / "ckpt", RESUMED
    ckpt = {"enable_save_ckpt": True, "checkpoint_every": 10, "async_upload": False, "save_ckpt_folder": str(saves)}
    steps = {"data": {"total_steps": 14}}

    def run(layout: Layout, name: str, **sections: Any) -> Curve:
        config = muon_config(layout, corpus, **steps, **sections)
        sizes = {"tensor": layout.tp, "pipeline": layout.pp, "zero1": layout.zero1}
        found: Curve = run_world(_resume, layout.world, (config, tmp_path / name), **sizes)[0]
        return found

    whole = run(first, "whole", ckpt=ckpt)
    assert len(whole) == 14
    (commit,) = (saves / "commits").glob(f"{10:010d}-*.json")
    for number, layout in enumerate(RESUMED):
        resumed = run(layout, f"resumed-{number}", ckpt={"load_ckpt_folder": str(commit)})
        if layout == first:
            assert resumed == whole[10:]
        for ours, expected in zip(resumed, whole[10:], strict=True):
            assert ours == pytest.approx(expected, rel=LIMIT), layout
