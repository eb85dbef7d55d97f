"""Tokens of each step, and warm-ups that are counted in them."""

from __future__ import annotations

from itertools import islice

import pytest

from internlm_lite.batch import Position
from internlm_lite.config.batch_sizes import step_tokens, with_warmup_steps
from internlm_lite.config.ranges import parse_skip_batches
from internlm_lite.config.run_stages import rampup_of, stages_of
from internlm_lite.config.schema import Config
from internlm_lite.data.order import BatchOrder
from internlm_lite.errors import ConfigError
from internlm_lite.optim.lr_schedule import learning_rate
from tests.train.runs import tiny

ROW = 64
"""Tokens of a packed row of `tiny`."""


def _first_steps(config: Config, dp_size: int, count: int) -> list[int]:
    each = (tokens for steps, tokens, _ in step_tokens(config, dp_size) for tokens in [tokens] * min(steps, count))
    return list(islice(each, count))


@pytest.mark.parametrize("dp", [1, 2, 4])
@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"skip_batches": "0,4-6,9"},
        {"rampup_batch_size": "{0} {0} 3"},
        {"rampup_batch_size": "{0} {0} 1000 tokens", "skip_batches": "1,7-8,20"},
    ],
)
def test_tokens_of_a_step_are_those_of_its_rows(keys: dict[str, str], dp: int) -> None:
    """In every layout the same."""
    texts = {key: text.format(4 // dp) for key, text in keys.items()}
    data = tiny(None, data={"micro_num": 16 // dp, **texts}).data
    order = BatchOrder(data.micro_num, dp, parse_skip_batches(data.skip_batches), rampup_of(data, stages_of(data), dp))
    position, sizes = Position(), []
    for _ in range(40):
        rows, position = order.take(position)
        sizes.append(len(rows) * ROW)
    assert _first_steps(tiny(None, data=data.model_dump()), dp, 40) == sizes
    one = tiny(None, data={"micro_num": 16, **{key: text.format(4) for key, text in keys.items()}})
    assert _first_steps(one, 1, 40) == sizes
    if "rampup_batch_size" in keys:
        assert len(set(sizes)) == 4


@pytest.mark.parametrize(
    ("tokens", "steps"), [(0, 0), (1, 1), (128, 1), (129, 2), (384, 3), (385, 4), (640, 4), (641, 5)]
)
def test_a_warm_up_in_tokens_is_the_first_steps_that_have_them(tokens: int, steps: int) -> None:
    """With a ramp: 128, 128, 128, 256, ... tokens a step. The rate depends on the step alone, not on the layout."""
    for dp in (1, 2):
        data = {"micro_num": 4 // dp, "rampup_batch_size": f"{2 // dp} {2 // dp} 3"}
        curve = {"warmup_tokens": tokens, "warmup_ratio": None, "total_steps": 20}
        config = with_warmup_steps(tiny(None, data=data, lr_scheduler=curve), dp)
        assert config.lr_scheduler.num_warmup_steps == steps and config.lr_scheduler.warmup_tokens is None
        rates = [learning_rate(step, 1.0, config.lr_scheduler) for step in range(steps + 1)]
        assert rates == [*((step + 1) / steps for step in range(steps)), 1.0]
        assert with_warmup_steps(config, dp) is config


@pytest.mark.parametrize("kind", ["cosine", "wsd"])
def test_a_warm_up_in_tokens_leaves_room_for_the_decay(kind: str) -> None:
    curve = {"warmup_tokens": 256 * 6, "warmup_ratio": None, "total_steps": 8, "kind": kind}
    fits = {"decay_steps": 2} if kind == "wsd" else {}
    assert with_warmup_steps(tiny(None, lr_scheduler={**curve, **fits}), 1).lr_scheduler.warmup_steps == 6
    long = {"decay_steps": 3} if kind == "wsd" else {"warmup_tokens": 256 * 9}
    with pytest.raises(ConfigError, match=r"lr_scheduler.warmup_tokens: found \d+, \d steps, after 0 init_steps"):
        with_warmup_steps(tiny(None, lr_scheduler={**curve, **long}), 1)


@pytest.mark.parametrize("dp", [1, 2])
def test_stages_change_the_tokens_of_a_step_and_the_ramp_goes_on(dp: int) -> None:
    """Rows of 64, then of 128 tokens from batch 5 on; two rows more after each 1000 tokens of the order."""
    data = {"micro_num": 8 // dp, "rampup_batch_size": f"{2 // dp} {2 // dp} 1000 tokens", "skip_batches": "3"}
    stages = [{"until": 5}, {"micro_bsz": 4}]
    config = Config.model_validate({**tiny(None, data=data).model_dump(), "stages": stages})
    expected, tokens = [], 0
    for batch in range(30):
        row = ROW if batch < 5 else 2 * ROW
        size = min(8, 2 + 2 * (tokens // 1000)) * row
        tokens += size
        if batch != 3:
            expected.append((size, int(batch >= 5)))
    found = ((each, stage) for steps, each, stage in step_tokens(config, dp) for _ in range(min(steps, 29)))
    assert list(islice(found, 29)) == expected
