"""torch's layouts of the bare decoder train what the bare loop trains, and every pair of the table is measured."""

from __future__ import annotations

from typing import Any

import pytest

from internlm_lite.apps.bench import single, torch_layouts
from internlm_lite.apps.bench.layouts import bench_layouts, worlds
from internlm_lite.apps.bench.shapes import bench_config
from internlm_lite.apps.bench.step import bare_side
from internlm_lite.apps.bench.timing import Side
from internlm_lite.mesh.mesh import Mesh, single_process_mesh
from tests.world import run_world

SHAPE: dict[str, Any] = {"hidden": 32, "layers": 4, "heads": 4, "vocab": 64, "dtype": "torch.float64"}
SHAPE |= {"seq_len": 16, "micro_bsz": 2, "micro_num": 4}


def norms(side: Side) -> list[float]:
    """Gradient norms of three steps: from the second on they depend on the updates."""
    return [float(side.step()) for _ in range(3)]  # type: ignore[arg-type]


def norms_of(mesh: Mesh, kinds: tuple[str, ...], parallel: dict[str, Any]) -> list[list[float]]:
    config = bench_config(**SHAPE, parallel=parallel)
    return [norms(getattr(torch_layouts, kind)(config, mesh, 1)) for kind in kinds]


def bare_norms() -> list[float]:
    found = norms(bare_side(bench_config(**SHAPE), single_process_mesh(), 1))
    assert found[0] != pytest.approx(found[2], rel=1e-4), "the updates must show"
    return found


@pytest.mark.parametrize("by_sequence", [False, True])
def test_torch_tensor_parallel_trains_like_the_bare_loop(by_sequence: bool):
    parallel = {"tensor": 2, "sequence_parallel": by_sequence}
    for (found,) in run_world(norms_of, 2, (("tp",), parallel), tensor=2):
        assert found == pytest.approx(bare_norms(), rel=1e-5)  # the bare loop takes its loss in fp32


def test_torch_pipeline_trains_like_the_bare_loop():
    parallel = {"pipeline": {"size": 2}}
    for (found,) in run_world(norms_of, 2, (("pp",), parallel), pipeline=2):
        assert found == pytest.approx(bare_norms(), rel=1e-5)


def test_torch_data_parallel_sides_agree():
    for found in run_world(norms_of, 2, (("ddp", "ddp_zero", "fsdp"), {})):
        assert found[1] == pytest.approx(found[0], rel=1e-9)
        assert found[2] == pytest.approx(found[0], rel=1e-9)
        assert found[0] != pytest.approx(bare_norms(), rel=1e-3), "every rank must have data of its own"


def test_pairs_name_sides():
    for world in worlds():
        assert {name for pair in world.pairs for name in pair} == set(world.sides)
        assert all(entry.parallel.get("zero1", -1) <= world.dp for entry in world.sides.values())


def test_every_layout_is_measured():
    rows = bench_layouts(worlds(), 1, **{**SHAPE, "dtype": "torch.float32"})
    assert [(row.ours, row.against) for row in rows] == [pair for world in worlds() for pair in world.pairs]
    assert all(row.ratio == pytest.approx(row.against_tokens_per_second / row.tokens_per_second) for row in rows)


def test_single_device_rows():
    ours, bare = single.bench_single({"tiny": {key: SHAPE[key] for key in SHAPE if key != "dtype"}}, "torch.float32", 2)
    assert (ours.side, bare.side) == ("ours", "bare loop")
    assert ours.layers == bare.layers == 4
    assert min(ours.tokens_per_second, bare.tokens_per_second, ours.peak_bytes, bare.peak_bytes) > 0
    assert ours.mfu is None, "no peak is known of a CPU"


def test_single_device_tries_fewer_layers(monkeypatch: pytest.MonkeyPatch):
    """As on a GPU whose memory holds three quarters of the layers."""

    def on_ranks(size: int, work: Any, config: Any, model: str, side: str, steps: int) -> Any:
        return None if config.model.num_layers > 3 else (model, side, config.model.num_layers)

    monkeypatch.setattr(single, "on_ranks", on_ranks)
    rows: Any = single.bench_single({"tiny": {key: SHAPE[key] for key in SHAPE if key != "dtype"}}, "torch.float32", 1)
    assert rows == [("tiny", "ours", 3), ("tiny", "bare loop", 3)]
