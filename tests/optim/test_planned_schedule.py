"""The schedule that is shown before a run, and written beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from internlm_lite.config.batch_sizes import step_tokens
from internlm_lite.config.run_stages import peak_rates
from internlm_lite.config.schema import Config, StageConfig
from internlm_lite.optim.lr_schedule import beta2, learning_rate
from internlm_lite.optim.planned_schedule import MOST_POINTS, borders, planned_schedule, write_schedule
from internlm_lite.train.changes import schedule_change
from tests.train.runs import tiny

WSD = {"kind": "wsd", "warmup_steps": 20, "warmup_ratio": None, "decay_steps": 50}
RAMP = {"rampup_batch_size": "2 2 5000 tokens", "micro_num": 8, "skip_batches": "3-9"}


@pytest.mark.parametrize("total", [100, 20_000])
def test_each_point_is_what_the_step_has(total: int) -> None:
    config = tiny(
        None,
        data={**RAMP, "total_steps": total},
        lr_scheduler={**WSD, "total_steps": total},
        beta2_scheduler={"init_beta2": 0.9, "c": 0.8},
    )
    planned = planned_schedule(config, 2)
    assert planned.step == sorted(set(planned.step)) and (planned.step[0], planned.step[-1]) == (0, total - 1)
    assert len(planned.step) <= MOST_POINTS and (total > MOST_POINTS or len(planned.step) == total)
    assert planned.lr == [learning_rate(step, 1e-2, config.lr_scheduler) for step in planned.step]
    assert planned.beta2 == [beta2(step, config.beta2_scheduler) for step in planned.step]
    sizes = [each for count, each, _ in step_tokens(config, 2) for each in [each] * min(count, total)][:total]
    assert planned.batch_tokens == [sizes[step] for step in planned.step]
    assert planned.tokens == [sum(sizes[:step]) for step in planned.step]
    for border in (19, 20, 21, total - 51, total - 50, total - 49):
        assert border in planned.step


def test_the_rate_of_a_stage_begins_with_its_first_batch() -> None:
    """Batches that are skipped are no updates: the third update trains on batch 4, the sixth on batch 7."""
    stages = [{"until": 4}, {"until": 7, "lr": 5e-3}, {"seq_len": 16, "lr": 2e-3}]
    tables = {"data": {"skip_batches": "1,3,9"}, "lr_scheduler": {"kind": "constant", "warmup_ratio": 0.0}}
    config = Config.model_validate({**tiny(None, **tables).model_dump(), "stages": stages})
    planned = planned_schedule(config, 1)
    assert planned.stage == [0, 0, 1, 1, 1, 2, 2, 2]
    assert planned.lr == list(peak_rates(config, 8)) == [{0: 1e-2, 1: 5e-3, 2: 2e-3}[stage] for stage in planned.stage]
    later = config.model_copy(update={"stages": [*config.stages[:2], StageConfig(seq_len=16, lr=1e-3)]})
    assert (schedule_change(config, later, 0) or "").startswith("update 5 has the learning rate 0.001 instead of 0.002")


def test_parts_of_a_curve() -> None:
    config = tiny(None, data={"total_steps": 100}, lr_scheduler={**WSD, "total_steps": 100, "init_steps": 5})
    assert borders(config) == {"init": 0, "warm-up": 5, "wsd: stable": 25, "wsd: decay": 50, "eta_min": 100}
    later = tiny(None, data={"total_steps": 100}, lr_scheduler={**WSD, "total_steps": 100, "last_epoch": 29})
    assert borders(later) == {"wsd: decay": 20, "eta_min": 70}


@pytest.mark.parametrize(
    ("rule", "momentum"),
    [({}, 0.9), ({"name": "sgd", "momentum": 0.8}, 0.8), ({"name": "sgd"}, 0), ({"name": "muon"}, 0.95)],
)
def test_the_file_has_the_lists(tmp_path: Path, rule: dict[str, Any], momentum: float) -> None:
    write_schedule(tmp_path, tiny(None, optimizer=rule), 1)
    found = json.loads((tmp_path / "schedule.json").read_text())
    assert list(found) == ["step", "lr", "momentum", "beta2", "batch_tokens", "tokens", "stage"]
    assert (
        found["step"] == list(range(8)) and found["momentum"] == [momentum] * 8 and found["batch_tokens"] == [256] * 8
    )
    assert [path.name for path in tmp_path.iterdir()] == ["schedule.json"]
