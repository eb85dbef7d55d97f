"""Shapes for given compute: parameters as the model counts them, and the figures of the rules' own papers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from internlm_lite.apps.planner.sizes import RULES, Shape, nearest_shape, sizes
from internlm_lite.config.schema import ModelConfig
from internlm_lite.errors import ConfigError
from internlm_lite.models.stages import meta_model
from tests.cli import run


@pytest.mark.parametrize("compute", [1e15, 1e18, 1e20, 1e22])
def test_a_shape_counts_its_parameters_as_its_model_does(compute: float) -> None:
    for row in sizes(compute, vocab_size=1000, seq_len=256):
        shape = row.shape
        config = ModelConfig(
            num_layers=shape.num_layers,
            hidden_size=shape.hidden_size,
            num_attention_heads=shape.num_attention_heads,
            num_kv_attention_heads=shape.num_kv_attention_heads,
            mlp_ratio=8 / 3,
            multiple_of=min(256, shape.hidden_size),
            vocab_size=1000,
            tie_word_embeddings=shape.tie_word_embeddings,
            no_bias=True,
        )
        assert config.mlp_hidden_size == shape.mlp_hidden_size
        assert sum(param.numel() for param in meta_model(config).parameters()) == shape.parameters
        assert row.tokens * shape.flops_per_token(row.rule.measure, 256) == pytest.approx(compute, rel=1e-3)


def test_the_rules_give_what_their_papers_say() -> None:
    size = {rule.name: rule.size for rule in RULES}
    # 70B parameters and 1.4T tokens for Chinchilla's 5.76e23 FLOPs, and about 20 tokens a parameter everywhere.
    assert size["chinchilla"](5.76e23) / 6 == pytest.approx(70e9, rel=0.05)
    for compute in (1e19, 1e21, 1e23):
        parameters = size["chinchilla"](compute) / 6
        assert 18 < compute / 6 / parameters**2 < 26
        tokens = compute / size["deepseek"](compute)
        assert tokens == pytest.approx(5.8316 * compute**0.4757, rel=0.01)  # the paper's own D
        parameters = size["minicpm"](compute) / 6
        assert compute / 6 / parameters / parameters == pytest.approx(192)


def test_steps_spend_the_tokens_and_batches_are_whole_rows() -> None:
    for row in sizes(3e20, 50_304, 4096):
        assert row.batch_tokens % 4096 == 0
        assert row.steps * row.batch_tokens == pytest.approx(row.tokens, rel=1e-3)
        assert row.shape.num_attention_heads % row.shape.num_kv_attention_heads == 0


def test_the_nearest_shape_of_a_known_size() -> None:
    shape = nearest_shape(lambda one: one.parameters, 8.03e9, 128_256)
    assert abs(shape.parameters / 8.03e9 - 1) < 0.05
    assert isinstance(shape, Shape) and not shape.tie_word_embeddings


@pytest.mark.parametrize(("compute", "advice"), [(1e9, "more compute"), (1e29, "less compute")])
def test_compute_that_no_shape_fits_is_refused(compute: float, advice: str) -> None:
    with pytest.raises(ConfigError, match=advice):
        sizes(compute, 50_304, 4096)


def test_the_command_shows_a_table_or_json(tmp_path: Path) -> None:
    shown = run("tools/plan.py", "sizes", "--flops", "1e20", folder=tmp_path)
    assert shown.code == 0, shown.output
    assert all(rule.name in shown.output and rule.source in shown.output for rule in RULES)
    wanted = ("--gpus", "8", "--days", "2", "--device", "h100", "--mfu", "0.5")
    rows = json.loads(run("tools/plan.py", "sizes", *wanted, "--json", folder=tmp_path).output)
    assert [row["rule"] for row in rows] == [rule.name for rule in RULES]
    assert rows[0]["flops"] == pytest.approx(8 * 2 * 86_400 * 0.5 * 989.4e12)


@pytest.mark.parametrize("wrong", [[], ["--gpus", "8"], ["--flops", "x"], ["--flops", "1e20", "--mfu", "2"]])
def test_wrong_options_end_with_one_line(wrong: list[str], tmp_path: Path) -> None:
    ended = run("tools/plan.py", "sizes", *wrong, folder=tmp_path)
    assert ended.code == 2 and "error: " in ended.output and "Traceback" not in ended.output
