"""Components of the model, learning rates and the largest batch in a plan, against the model itself."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from internlm_lite.apps.planner.command import PlanOptions, dry_run
from internlm_lite.apps.planner.components import Components, components_of
from internlm_lite.apps.planner.holdings import holdings
from internlm_lite.apps.planner.largest_batch import largest_batch
from internlm_lite.apps.planner.plan import Questions, make_plan
from internlm_lite.config.load import load_config
from internlm_lite.config.schema import Config
from internlm_lite.layers.flash import AttentionBackend
from internlm_lite.mesh.mesh import sizes_of
from internlm_lite.models.stages import meta_model
from internlm_lite.optim.rules import RULES
from tests.apps.planner.kept import config
from tests.apps.planner.test_memory import SHAPES
from tests.cli import ROOT, run
from tests.optim.test_rules import group_of

CONFIG = ROOT / "configs" / "20B_sft.py"
LENGTHS = (24, 100)


def rows(components: Components) -> dict[str, Any]:
    return {row.name: row for row in components.rows}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_components_sum_up_to_the_model(shape: dict[str, Any]) -> None:
    wanted = config(**shape)
    found, model = components_of(wanted, LENGTHS), meta_model(wanted.model)
    held, parameters = holdings(wanted, sizes_of(1, 1, 1, -1), AttentionBackend.SDPA)
    total = found.total
    assert total.parameters == parameters == sum(param.numel() for param in model.parameters())
    assert total.decayed == sum(param.numel() for param in model.parameters() if param.dim() > 1)
    assert total.flops == tuple(model.flops_per_token(n) for n in LENGTHS)
    padding = 256 * len(held[0].buckets)  # a bucket is padded to whole groups of 256 elements
    for ours, theirs in (
        (total.weights, held[0].weights),
        (total.gradients, held[0].gradients),
        (total.optimizer, held[0].optimizer),
    ):
        assert ours <= theirs < ours + 12 * padding * 2


def test_the_rows_of_a_model_that_is_known() -> None:
    found = components_of(load_config(CONFIG).config, [2048, 4096])
    h, width, layers, vocab = 5120, 13824, 60, 103168
    by_name = rows(found)
    assert by_name["tok_embeddings"].parameters == by_name["output"].parameters == vocab * h
    assert by_name["attention.wqkv"].parameters == layers * (3 * h * h + 3 * h)
    assert by_name["feed_forward.w1"].parameters == layers * h * width
    assert by_name["attention.wqkv"].flops == (layers * 6 * h * h,) * 2
    assert by_name["attention"].flops == (layers * 4 * 2048 * h, layers * 4 * 4096 * h)
    assert (
        by_name["norm"].weights == 2 * h and by_name["norm"].gradients == 2 * h and by_name["norm"].optimizer == 12 * h
    )
    assert by_name["tok_embeddings"].flops == () and by_name["attention"].parameters == 0
    decayed = found.total.parameters - layers * (2 * h + 4 * h) - h
    assert found.total.decayed == decayed and found.update_flops == 12 * found.total.parameters + 2 * decayed
    assert found.flops_6n(0) == 6 * 20_089_943_040 + 12 * layers * h * 2048


class Counted(float):
    """A number that counts what is done with such numbers."""

    done = 0


def _counting(name: str) -> Any:
    def operation(self: Counted, other: float) -> Counted:
        Counted.done += 1
        return Counted(getattr(float, name)(self, other))

    return operation


for name in ("__add__", "__sub__", "__mul__", "__truediv__", "__pow__"):
    setattr(Counted, name, _counting(name))


def adamw(w: Counted, g: Counted, m: Counted, v: Counted, decay: float) -> Counted:
    if decay:
        w = w - w * decay
    m = m * 0.9 + g * 0.1
    v = v * 0.95 + g * g * 0.05
    return w - m / (v**0.5 + 1e-8) * 0.001


def lion(w: Counted, g: Counted, m: Counted, v: Counted, decay: float) -> Counted:
    step = m + (g - m) * 0.1
    step = step * math.inf  # stands for its sign
    if decay:
        step = step + w * decay
    m = m - (m - g) * 0.01
    return w - step * 0.001


def sgd(w: Counted, g: Counted, m: Counted, v: Counted, decay: float) -> Counted:
    if decay:
        g = g + w * decay
    return w - g * 0.001


def sgd_with_momentum(w: Counted, g: Counted, m: Counted, v: Counted, decay: float) -> Counted:
    return sgd(w, m * 0.9 + g, m, v, decay)


@pytest.mark.parametrize(
    ("rule", "options", "operations"),
    [
        (adamw, {"name": "adamw"}, 12),
        (adamw, {"name": "adamw_cs336"}, 12),
        (lion, {"name": "lion"}, 9),
        (sgd, {"name": "sgd"}, 2),
        (sgd_with_momentum, {"name": "sgd", "momentum": 0.9}, 4),
    ],
)
def test_operations_of_update_rules_are_those_of_their_formulas(
    rule: Any, options: dict[str, Any], operations: int
) -> None:
    kind = " ".join(map(str, options.values()))
    assert RULES[options["name"]].operations(group_of(kind)) == operations
    for decay in (0.0, 0.1):
        Counted.done = 0
        rule(*map(Counted, (1.0, 2.0, 3.0, 4.0)), decay)
        assert Counted.done == operations + 2 * (decay > 0)


def test_learning_rates_are_those_of_the_optimizer() -> None:
    plan = make_plan(load_config(CONFIG, ["lr_scheduler.warmup_ratio=0.1"]).config, 16, None)
    known = {0: 1e-4 / 5000, 2500: 1e-4 * 2501 / 5000, 5000: 1e-4, 16_250: 8.681981e-05, 27_500: 5.5e-5}
    assert plan.learning_rates == pytest.approx({**known, 38_750: 2.318019e-05, 50_000: 1e-5}, rel=1e-6)
    later = make_plan(load_config(CONFIG, ["lr_scheduler.last_epoch=29999"]).config, 16, None)
    assert list(later.learning_rates) == [7625, 20_000], "steps of this run"
    behind = make_plan(load_config(CONFIG, ["lr_scheduler.last_epoch=59999"]).config, 16, None)
    assert behind.learning_rates == {0: 1e-5}, "a curve that ended before this run"


def peaks_of(changes: list[str], sizes: range) -> list[int]:
    """Bytes of the fullest rank for these micro_bsz, of a plan for each."""
    config = (load_config(CONFIG, [*changes, f"data.micro_bsz={n}"]).config for n in sizes)
    return [max(rank.bytes.peak for rank in make_plan(one, 16, None).ranks) for one in config]


@pytest.mark.parametrize("changes", [[], ["parallel.pipeline.size=4", "parallel.tensor=2", "model.checkpoint=0.5"]])
def test_the_largest_batch_is_that_of_the_plans(changes: list[str]) -> None:
    peaks = peaks_of(changes, range(1, 6))
    for memory in (peaks[0] - 1, peaks[2], peaks[2] - 1, peaks[4]):
        asked = Questions(memory=memory)
        found = make_plan(load_config(CONFIG, changes).config, 16, None, questions=asked).largest_batch
        assert found is not None and found.micro_bsz == sum(peak <= memory for peak in peaks)
        assert found.peak == peaks[max(found.micro_bsz, 1) - 1]


def test_a_batch_without_an_end() -> None:
    found = largest_batch(lambda n: 100 + 3 * n, 10**12, most=1000)
    assert 1000 <= found.micro_bsz < 2048 and found.per_row == 3
    assert largest_batch(lambda n: 100 + 3 * n, 102).micro_bsz == 0


def test_what_a_person_sees(capsys: pytest.CaptureFixture[str]) -> None:
    shown = PlanOptions(lengths=(16_384,), memory=80 * 10**9)
    assert dry_run(load_config(CONFIG).config, 16, shown) == 0
    text = capsys.readouterr().out
    for line in (
        "20,089,943,040: 20,088,094,720 with weight decay, 1,848,320 without",
        "2e-07 in step 0, 5.02e-05 in 250, 0.0001 in 500",
        "4 fits 74.51 GiB: ",
        "the update: 281,255,505,920 FLOPs, 14 each",
        "of all pairs of tokens, masked or not;",
        "in a sliding layer, of those less than sliding_window apart",
        "a token of 2,048, both ways: 124,908,994,560, as mfu counts; 128,089,405,440 as 6 N + attention",
    ):
        assert line in text, line
    assert "…" not in text, "a column was cut"
    dry_run(load_config(CONFIG).config, 16, PlanOptions(memory=10**9))
    text = capsys.readouterr().out
    assert "not even 1 fits" in text and "feed_forward.w1" not in text, "components are shown where they are asked for"


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--dry-run", "--memory=80G"], "argument --memory: found '80G', expected a size with its unit, such as 80GB"),
        (["--dry-run", "--memory=nanGB"], "argument --memory: found 'nanGB', expected"),
        (["--dry-run", "--memory=-1GiB"], "argument --memory: found '-1GiB', expected"),
        (["--dry-run", "--lengths=1024,x"], "argument --lengths: found '1024,x', expected tokens, such as 1024,16384"),
        (["--dry-run", "--lengths=0"], "argument --lengths: found '0', expected"),
        (["--components"], "--components belongs to --dry-run: add it"),
        (["--memory=80GB"], "--memory belongs to --dry-run: add it"),
    ],
)
def test_wrong_options(arguments: list[str], problem: str, tmp_path: Path) -> None:
    ended = run("train.py", "--config", str(CONFIG), *arguments, folder=tmp_path)
    assert ended.code == 2 and problem in ended.output


def test_torch_counts_as_many_bytes() -> None:
    """Of a small model's weights: dtypes are those that the trainer would allocate."""
    wanted: Config = config(dtype="torch.bfloat16", use_fp32_norm=True)
    norms = sum(param.numel() for param in meta_model(wanted.model).parameters() if param.dtype == torch.float32)
    total = components_of(wanted, [8]).total
    assert norms and total.weights == 2 * (total.parameters - norms) + 4 * norms
    assert total.optimizer == 12 * (total.parameters - norms) + 8 * norms


def test_lengths_beyond_learned_positions_are_told() -> None:
    """Rotary positions have no end."""
    config = load_config(CONFIG.with_name("tiny.py")).config
    learned = config.model.model_copy(update={"position": "learned", "max_position_embeddings": 1024})
    cases = ((learned, (512, 2048, 16_384), True), (learned, (512,), False), (config.model, (2048, 16_384), False))
    for model, lengths, told in cases:
        one = config.model_copy(update={"model": model})
        notes = " ".join(make_plan(one, 1, None, questions=Questions(lengths=lengths)).notes)
        assert ("documents of 2,048, 16,384 tokens are longer than the 1,024 learned positions" in notes) == told
