"""The plan as a whole: golden figures, its JSON, what it refuses, and what a person sees."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from internlm_lite.apps.planner.plan import make_plan
from internlm_lite.apps.planner.render_plan import render
from internlm_lite.config.load import check_config, load_config
from internlm_lite.errors import ConfigError, MissingPackageError
from internlm_lite.evaluate import harness
from tests.cli import ROOT, run

CONFIG = ROOT / "configs" / "20B_sft.py"
LARGE = ["parallel.tensor=8", "parallel.pipeline.size=8", "model.num_chunks=2", "data.micro_num=16", "parallel.zero1=8"]


def test_the_figures_of_the_20b_run() -> None:
    plan = make_plan(load_config(CONFIG).config, 16, 180.0).to_json()
    assert plan["parameters_total"] == 20_089_943_040
    assert plan["flops_per_step"] == 8_124_188_338_421_760
    assert plan["tokens_per_step"] == 65_536
    assert plan["flops_per_token"] == 8_124_188_338_421_760 / 65_536
    assert plan["tokens_total"] == 65_536 * 50_000
    assert plan["bubble_fraction"] == 0
    assert plan["seconds_per_step"] == pytest.approx(8_124_188_338_421_760 / (16 * 180e12))
    assert plan["days"] == pytest.approx(plan["seconds_per_step"] * 50_000 / 86_400)
    assert [rank["rank"] for rank in plan["ranks"]] == list(range(16))
    for rank in plan["ranks"]:
        assert rank["rank"] == rank["dp"] * 4 + rank["tp"]
        assert rank["parameters"] == 5_023_180_800
        assert rank["zero_elements"] == 5_023_180_800 // 4
        assert rank["bytes"]["weights"] == rank["bytes"]["gradients"] == 2 * 5_023_180_800
        assert rank["bytes"]["optimizer"] == 12 * 5_023_180_800 // 4
    first = plan["batches"][0]
    assert list(first.values()) == [0, 60571, 18, 2048, 6, 3]  # as in the seed's log, see golden.md
    assert plan["groups"]["tp"] == {"size": 4, "count": 4, "step": 1, "first": [0, 4, 8, 12]}
    assert plan["groups"]["zero"] == {"size": 4, "count": 4, "step": 4, "first": [0, 1, 2, 3]}


def test_a_large_world_is_listed_by_kind() -> None:
    plan = make_plan(load_config(CONFIG, LARGE).config, 4096, None)
    assert len(plan.ranks) < 64
    assert sum(rank.count for rank in plan.ranks) == 4096
    for pp in range(8):
        kinds = [rank for rank in plan.ranks if rank.pp == pp]
        # Every rank of `zero` once, for each tensor-parallel rank and replica: all elements of this pipeline position.
        assert sum(rank.zero_elements * rank.count for rank in kinds) == kinds[0].parameters * 8 * 8
    assert plan.seconds_per_step is None and plan.days is None
    assert json.loads(json.dumps(plan.to_json())) == plan.to_json()


def test_a_ramp_up_lowers_the_tokens_of_the_run() -> None:
    config = load_config(
        CONFIG, ["data.rampup_batch_size='1 1 100'", "data.total_steps=1000", "data.skip_batches='0-49'"]
    )
    plan = make_plan(config.config, 16, 100.0)
    micro_batches = 50 * 1 + 100 * 2 + 100 * 3 + 750 * 4
    assert plan.tokens_total == micro_batches * 4 * 4096
    assert plan.days == pytest.approx(plan.seconds_per_step * micro_batches / 4 / 86_400)


def test_recomputation_lowers_activations() -> None:
    plan = make_plan(load_config(CONFIG, ["model.checkpoint=0.5"]).config, 16, None)
    off, configured, every = (sum(plan.activations[name].values()) for name in ("off", "configured", "all"))
    assert every < configured < off
    assert plan.ranks[0].bytes.activations == configured
    sizes = plan.ranks[0].bytes
    assert sizes.peak == sizes.weights + sizes.gradients + sizes.optimizer + configured + sizes.workspace


@pytest.mark.parametrize("world", [16, 4096])
def test_the_tables_fit_two_screens(world: int) -> None:
    plan = make_plan(load_config(CONFIG, LARGE if world > 16 else []).config, world, 180.0)
    console = Console(width=110, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(render(plan))
    text = console.export_text()
    assert "20,089,943,040" in text and "180 TFLOP/s" in text
    assert "…" not in text, "a column was cut"
    assert len(text.splitlines()) < 80


WRONG = [
    (16, ["model.num_attention_heads=33", "model.hidden_size=4224"]),
    (48, ["model.num_layers=10", "parallel.pipeline.size=4", "model.num_chunks=3", "data.micro_num=4"]),
    (16, ["parallel.pipeline.size=4", "model.num_chunks=2", "data.micro_num=3"]),
    (16, ["model.vocab_size=103169"]),
    (15, []),
]


@pytest.mark.parametrize(("world", "overrides"), WRONG)
def test_it_refuses_what_the_trainer_refuses(
    world: int, overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # messages name files as seen from here
    with pytest.raises(ConfigError) as refused:
        check_config(load_config(CONFIG, overrides), world)
    ended = run("train.py", "--config", str(CONFIG), "--dry-run", f"--world-size={world}", *overrides, folder=tmp_path)
    assert ended.code == 2
    assert ended.output == f"ConfigError: {refused.value}\n"


def test_data_that_cannot_be_opened_is_refused_like_a_run(tmp_path: Path) -> None:
    arguments = ("--config", str(CONFIG), "data.train_folder=nowhere", "parallel.tensor=1")
    planned = run("train.py", "--dry-run", *arguments, folder=tmp_path)
    trained = run("train.py", "--device=cpu", *arguments, folder=tmp_path)
    assert planned.code == trained.code == 2
    assert planned.output.startswith("DataError: ")
    assert planned.output.strip() in trained.output


def test_tasks_that_are_not_there_are_refused_like_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    changes = ["evaluation.tasks=['piqa']", "evaluation.every=1"]
    config = load_config(CONFIG, changes).config
    monkeypatch.setattr(harness, "find_spec", lambda _: None)
    with pytest.raises(
        MissingPackageError, match=r"evaluation.tasks: found 'piqa', .* lm_eval, which is not installed"
    ):
        make_plan(config, 16, None)


def test_the_command_prints_json_and_makes_no_run_folder(tmp_path: Path) -> None:
    arguments = ("--config", str(CONFIG), "--dry-run", "--world-size=16", "--json", "--tflops=180")
    ended = run("train.py", *arguments, folder=tmp_path)
    assert ended.code == 0
    assert json.loads(ended.output)["world_size"] == 16
    assert [path.name for path in tmp_path.iterdir()] == ["output.log"]


def test_its_options_are_nothing_without_it(tmp_path: Path) -> None:
    ended = run("train.py", "--config", str(CONFIG), "--json", folder=tmp_path)
    assert ended.code == 2
    assert "--dry-run" in ended.output
