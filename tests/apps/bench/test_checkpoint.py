"""Every side of the checkpoint benchmark brings back what it saved, and every figure is measured."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from internlm_lite.apps.bench.checkpoint import bench_saves, bench_writer, sides
from internlm_lite.mesh.mesh import Mesh
from tests.checkpoint.pieces import assert_true_values, pieces_of
from tests.world import run_world

SHAPE: dict[str, Any] = {"hidden": 32, "layers": 2, "heads": 4, "vocab": 64, "dtype": "torch.float32"}
SHAPE |= {"seq_len": 16, "micro_bsz": 2, "micro_num": 2}


def save_and_load(mesh: Mesh, folder: Path) -> list[str]:
    pieces = pieces_of(mesh.rank, zero=2, fill=True)
    truth = [piece.tensor.clone() for piece in pieces]
    found = sides(folder, mesh, pieces)
    for side in found.values():
        for factor in (2, 1):  # the second save is the one that is loaded
            for piece, tensor in zip(pieces, truth, strict=True):
                piece.tensor.copy_(tensor * factor)
            end = side.begin()
            for piece in pieces:
                piece.tensor.fill_(torch.nan)  # training goes on as soon as the stall is over
            end()
        side.load()
        assert_true_values(pieces)
    return list(found)


def test_every_side_loads_what_it_saved(tmp_path: Path) -> None:
    for names in run_world(save_and_load, 2, (tmp_path,)):
        assert names == ["ours", "torch async_save", "torch async_save warm", "torch save"]


def test_every_figure_is_measured(tmp_path: Path) -> None:
    rows = bench_saves(2, 1, tmp_path, **SHAPE)
    assert len(rows) == 4 and {row.ranks for row in rows} == {2}
    for row in rows:
        assert 0 < row.stall <= row.total and row.load > 0 and row.step_seconds > 0
        assert row.megabytes == rows[0].megabytes > 0.1


def test_the_writer_is_measured_and_leaves_nothing(tmp_path: Path) -> None:
    row = bench_writer(tmp_path / "writer", 8, 2)
    assert row.ours > 0 and row.ratio == row.ours / row.dd and row.folder == str(tmp_path)
    assert os.listdir(tmp_path) == []
