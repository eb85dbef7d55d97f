"""The plan of a run with stages."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from internlm_lite.apps.planner.plan import make_plan
from internlm_lite.apps.planner.render_plan import render
from internlm_lite.config.schema import StageConfig
from internlm_lite.errors import DataError
from tests.corpus import write_corpus
from tests.train.runs import STEPS, tiny

STAGES = [{"until": 3}, {"until": 5, "seq_len": 64, "rope_base": 5e4}, {"weights": {"code": 1.0}, "lr": 1e-3}]


def test_memory_is_that_of_the_longest_rows_and_data_are_counted_by_stage(tmp_path: Path) -> None:
    config = tiny(write_corpus(tmp_path / "corpus"))
    staged = config.model_copy(update={"stages": [StageConfig(**stage) for stage in STAGES]})
    longest = config.model_copy(update={"data": config.data.model_copy(update={"seq_len": 64})})
    plan, plain, long = (make_plan(one, 1, None, "cpu") for one in (staged, config, longest))
    assert plan.ranks[0].bytes == long.ranks[0].bytes != plain.ranks[0].bytes
    assert (plan.tokens_per_step, plan.flops_per_step) == (plain.tokens_per_step, plain.flops_per_step)
    assert plan.tokens_total == 3 * 256 + 2 * 512 + 3 * 256 and plain.tokens_total == STEPS * 256
    stages = plan.to_json()["stages"]
    assert [stage["batches"] for stage in stages] == [[0, 3], [3, 5], [5, None]]
    assert [stage["tokens"] for stage in stages] == [768, 1024, 768]
    assert stages[2]["folders"]["code"]["tokens"] == 768 and stages[2]["folders"]["docs"]["tokens"] == 0
    assert stages[1]["values"] == {"weights": None, "seq_len": 64, "rope_base": 5e4, "micro_bsz": 2, "lr": None}
    rates, plain_rates = plan.learning_rates, plain.learning_rates
    assert all(rates[step] == rate for step, rate in plain_rates.items() if step < 5)
    assert all(rates[step] < rate for step, rate in plain_rates.items() if 5 <= step < STEPS)
    console = Console(width=110, record=True, file=io.StringIO())
    console.print(render(plan))
    text = console.export_text()
    assert "Data, by stage and folder" in text and "those of stage 1, whose rows are the longest (128 tokens)" in text


def test_a_plan_refuses_what_the_run_would(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus")
    config = tiny(corpus, data={"max_epochs": {"code": 0.3}})
    staged = config.model_copy(update={"stages": [StageConfig(**stage) for stage in STAGES]})
    with pytest.raises(DataError, match=r"would read folder 'code' .* times .allowed 0.3"):
        make_plan(staged, 1, None, "cpu")


def test_a_plan_of_a_token_budget_has_its_steps(tmp_path: Path) -> None:
    config = tiny(write_corpus(tmp_path / "corpus"), data={"total_steps": 0, "total_tokens": 10_000})
    for ranks in (1, 2):
        plan = make_plan(config, ranks, None, "cpu")
        assert plan.steps_total == -(-10_000 // (256 * ranks)) and plan.tokens_total >= 10_000
