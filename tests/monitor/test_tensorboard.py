"""What TensorBoard's own reader finds in the event files."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.util.tensor_util import make_ndarray

from internlm_lite.monitor.record import Sample
from internlm_lite.monitor.scalars import step_scalars
from internlm_lite.monitor.tensorboard import TensorBoard
from tests.monitor.test_line import SEED
from tests.monitor.test_sinks import VALID


def read(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0}).Reload()


def series(found: EventAccumulator, tag: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in found.Scalars(tag)]


@pytest.fixture(scope="module")
def seed(tmp_path_factory: pytest.TempPathFactory) -> EventAccumulator:
    """The seed's six lines, an evaluation and two samples."""
    folder = tmp_path_factory.mktemp("tensorboard")
    board = TensorBoard(folder, done=0)
    for record in SEED:
        board.step(record)
    board.validation(VALID)
    for prompt in ("def", "<b>\nclass"):
        board.sample(Sample(6, prompt, " f(x):\n  * `x`\n"))
    board.close()
    return read(folder)


def test_folder_series(seed: EventAccumulator) -> None:
    for name in SEED[0].folders:
        figures = [(record.step, record.folders[name]) for record in SEED]
        tokens = [(step, folder) for step, folder in figures if folder.tokens]
        assert series(seed, f"tokens/{name}") == [(step, folder.tokens) for step, folder in figures]
        if not tokens:
            assert f"loss/{name}" not in seed.Tags()["scalars"]
            continue
        assert series(seed, f"loss/{name}") == [(step, pytest.approx(folder.loss)) for step, folder in tokens]
        assert series(seed, f"acc/{name}") == [(step, pytest.approx(folder.acc)) for step, folder in tokens]
        expected = [(step, pytest.approx(math.exp(folder.loss))) for step, folder in tokens]
        assert series(seed, f"perplexity/{name}") == expected
    assert series(seed, "loss/.git")[0][1] == pytest.approx(11.5552) and series(seed, "loss/.git")[5][0] == 5


def test_all_scalars(seed: EventAccumulator) -> None:
    for tag in step_scalars(SEED[0]):
        assert series(seed, tag)[0] == (0, pytest.approx(step_scalars(SEED[0])[tag])), tag
    assert {"train/loss", "train/acc", "lr", "loss_scale", "grad_norm/0_default", "tgs", "tflops"} <= set(
        seed.Tags()["scalars"]
    )
    assert seed.Scalars("train/loss")[1].wall_time == SEED[1].time.timestamp()


def test_validation(seed: EventAccumulator) -> None:
    assert series(seed, "valid/loss") == [(5, 2.0)] and series(seed, "valid/train_loss") == [(5, 1.5)]
    assert series(seed, "val_loss/.git") == [(5, pytest.approx(VALID.folders[".git"].loss))]


def test_folder_charts(seed: EventAccumulator) -> None:
    (event,) = seed.Tensors("custom_scalars__config__")
    layout = Layout.FromString(make_ndarray(event.tensor_proto).item())
    charts = {chart.title: list(chart.multiline.tag) for category in layout.category for chart in category.chart}
    assert charts["loss"] == ["^loss/"] and charts["tokens"] == ["^tokens/"] and charts["val loss"] == ["^val_loss/"]
    assert set(charts) == {
        f"{before}{name}" for before in ("", "val ") for name in ("loss", "acc", "perplexity", "tokens")
    }


def test_samples(seed: EventAccumulator) -> None:
    tags = [tag for tag in seed.Tags()["tensors"] if tag.startswith("samples/")]
    assert tags == ["samples/0 def/text_summary", "samples/1 <b> class/text_summary"]
    (event,) = seed.Tensors(tags[1])
    text = make_ndarray(event.tensor_proto).item().decode()
    assert event.step == 5 and text == "    <b>\n    class\n\n---\n\n     f(x):\n      * `x`\n"


def test_resumed_steps_are_purged(tmp_path: Path) -> None:
    for done, steps, loss in ((0, range(0, 6), 9.0), (3, range(3, 8), 8.0)):
        board = TensorBoard(tmp_path, done)
        for step in steps:
            board.step(dataclasses.replace(SEED[0], step=step, loss=loss))
        board.close()
    assert series(read(tmp_path), "train/loss") == [(step, 9.0 if step < 3 else 8.0) for step in range(8)]


def test_step_is_flushed(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path, 0)
    board.step(SEED[0])
    assert series(read(tmp_path), "train/loss") == [(0, pytest.approx(SEED[0].loss))]
    board.close()
