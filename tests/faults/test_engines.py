"""A job that is killed under one engine goes on under the other, as a job that nobody killed."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.worlds import Job, arguments, curve_of, events

STEPS = 12
EVERY = 4
"""Steps between snapshots."""
AT = 10
"""Step of the kill: between two snapshots."""
LIMIT = 1e-6
"""Relative, of losses and norms of two engines in fp32."""
ENGINES = {"ours": ("parallel.zero_stage=2",), "DeepSpeed": ("engine.name=deepspeed", "engine.stage=3")}


def job(folder: Path, engine: str, faults: str = "") -> Job:
    """Of two ranks with two micro-batches a step; each snapshot is there before the next step."""
    keys = ("ckpt.async_upload=False", "data.micro_num=2", *ENGINES[engine])
    return Job(folder, 2, *arguments(*keys, steps=STEPS, every=EVERY), faults=faults)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[tuple[float, float]]]:
    folder = tmp_path_factory.mktemp("undisturbed")
    with job(folder, "ours") as ran:
        ran.finish()
    yield curve_of(folder)


@pytest.mark.parametrize(("first", "second"), [("DeepSpeed", "ours"), ("ours", "DeepSpeed")])
def test_killed_under_one_engine_goes_on_under_the_other(
    first: str, second: str, undisturbed: list[tuple[float, float]], tmp_path: Path
) -> None:
    with job(tmp_path, first, faults=f"kill 1 {AT}") as killed:
        assert killed.codes() == [5, -signal.SIGKILL], killed.output()[-6000:]
    assert len(curve_of(tmp_path)) == AT
    with job(tmp_path, second) as resumed:
        resumed.finish()
    assert events(tmp_path, "start")[-1]["step"] == AT // EVERY * EVERY
    found = curve_of(tmp_path)
    assert len(found) == STEPS
    for ours, expected in zip(found, undisturbed, strict=True):
        assert ours == pytest.approx(expected, rel=LIMIT)
