"""The same global batches give the same curve in every data-parallel and tensor-parallel layout."""

from __future__ import annotations

from pathlib import Path

import pytest

from internlm_lite.config.schema import Config
from internlm_lite.mesh.mesh import Mesh, build_mesh, single_process_mesh, sizes_of
from tests.corpus import FOLDERS, write_corpus
from tests.train.runs import curve, run_training, tiny
from tests.world import TIMEOUT, run_world

DTYPES = {"torch.float64": 1e-10, "torch.float32": 1e-5}


def config_for(corpus: Path, dp: int, dtype: str, **model: object) -> Config:
    """The global batch stays 4 rows: micro_num = 4 / dp."""
    return tiny(corpus, data={"micro_num": 4 // dp}, model={"dtype": dtype, **model}, loss={"label_smoothing": 0.1})


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("parity") / "corpus")


@pytest.fixture(scope="module")
def single(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    folder = tmp_path_factory.mktemp("single")
    return {
        dtype: run_training(single_process_mesh(), config_for(corpus, 1, dtype), folder / dtype) for dtype in DTYPES
    }


def sweep(world: Mesh, corpus: Path, folder: Path, layouts: list[tuple[int, int]]) -> dict:
    results = {}
    for tensor, zero1 in layouts:
        sizes = sizes_of(world.world.size, tensor, 1, zero1)
        mesh = build_mesh(sizes, world.rank, world.device, TIMEOUT)
        for dtype in DTYPES:
            name = f"world {world.world.size} tp {tensor} zero1 {zero1} {dtype}"
            results[tensor, zero1, dtype] = run_training(mesh, config_for(corpus, sizes.dp, dtype), folder / name)
    return results


LAYOUTS = {2: [(1, -1), (1, 1), (2, -1)], 4: [(1, -1), (1, 2), (1, 1), (2, 1), (2, -1)]}


@pytest.mark.parametrize("size", LAYOUTS)
def test_every_layout_gives_the_curve_of_one_process(size: int, corpus: Path, single: dict, tmp_path: Path):
    results = run_world(sweep, size, (corpus, tmp_path, LAYOUTS[size]))[0]
    assert len(results) == len(LAYOUTS[size]) * len(DTYPES)
    for (tensor, zero1, dtype), metrics in results.items():
        for ours, expected in zip(curve(metrics), curve(single[dtype]), strict=True):
            assert ours == pytest.approx(expected, rel=DTYPES[dtype]), (tensor, zero1, dtype)
        for step, expected in zip(metrics, single[dtype], strict=True):
            for name in FOLDERS:
                tokens, loss, acc = expected["folders"][name]
                approximate = [tokens, None if loss is None else pytest.approx(loss, rel=1e-4), pytest.approx(acc)]
                assert step["folders"][name] == approximate
            assert step["num_consumed_tokens"] == expected["num_consumed_tokens"]


def test_the_loss_falls_and_every_folder_is_seen(single: dict):
    metrics = single["torch.float64"]
    assert metrics[-1]["loss"] < 0.9 * metrics[0]["loss"]
    assert all(sum(step["folders"][name][0] for step in metrics) > 0 for name in FOLDERS)
    assert metrics[0]["loss_from_metric"] == pytest.approx(4.56, abs=0.1)  # ln(96)
