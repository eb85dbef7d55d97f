"""A recipe in a few layouts: each resumes to the bit, and trains as one process does."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from internlm_lite.mesh.mesh import Mesh
from tests.corpus import write_corpus
from tests.train.layouts import LIMIT, Layout, config_of
from tests.train.runs import curve, run_training
from tests.world import run_world

Curve = list[tuple[float, float]]
"""(loss, gradient norm) of each step."""

LAYOUTS = {
    "one process": Layout(),
    "dp2": Layout(dp=2, bucket=1500),
    "dp2 replicas": Layout(dp=2, zero1=1),
    "tp2 sp": Layout(tp=2, sp=True),
    "pp2": Layout(pp=2, bucket=1500),
    "one process, tied": Layout(tied=True),
    "pp2, tied": Layout(pp=2, bucket=1500, tied=True),
}


def train_and_resume(
    mesh: Mesh, layout: Layout, corpus: Path, folder: Path, sections: Mapping[str, Any]
) -> tuple[Curve, Curve]:
    """Curves of all steps, and of those after the checkpoint of step 2, resumed from it."""
    ckpt = {"enable_save_ckpt": True, "checkpoint_every": 2, "async_upload": False}
    ckpt |= {"save_ckpt_folder": str(folder / "ckpt")}
    whole = run_training(mesh, config_of(layout, corpus, ckpt=ckpt, **sections), folder / "whole")
    (commit,) = (folder / "ckpt" / "commits").glob(f"{2:010d}-*.json")
    resumed = config_of(layout, corpus, ckpt={"load_ckpt_folder": str(commit)}, **sections)
    return curve(whole), curve(run_training(mesh, resumed, folder / "resumed"))


def check_layouts(names: list[str], sections: Mapping[str, Any], folder: Path) -> dict[str, Curve]:
    """Train with these `sections` of a config in the layouts of these names; their curves."""
    corpus = write_corpus(folder / "corpus")
    curves: dict[str, Curve] = {}
    for name in names:
        layout = LAYOUTS[name]
        sizes = {"tensor": layout.tp, "pipeline": layout.pp, "zero1": layout.zero1}
        args = (layout, corpus, folder / name, sections)
        whole, resumed = run_world(train_and_resume, layout.world, args, **sizes)[0]
        assert len(whole) == 5 and resumed == whole[2:], name
        curves[name] = whole
    for name, found in curves.items():
        for step, one in zip(found, curves["one process" + ", tied" * LAYOUTS[name].tied], strict=True):
            assert step == pytest.approx(one, rel=LIMIT), name
    return curves
