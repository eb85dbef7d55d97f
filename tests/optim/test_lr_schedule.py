"""lr and beta2 against the numbers of InternLM's 20B log and closed forms."""

import math
from itertools import pairwise

import pytest
import torch

from internlm_lite.config.schema import Beta2SchedulerConfig, LrSchedulerConfig
from internlm_lite.optim.lr_schedule import beta2, learning_rate

DEMO_20B = LrSchedulerConfig(total_steps=50000, init_steps=0, warmup_ratio=0.01, eta_min=1e-5)


def test_the_lr_of_the_20b_log_is_float_exact():
    printed = [4.0000000000000003e-07, 6.000000000000001e-07, 8.000000000000001e-07]
    printed += [1.0000000000000002e-06, 1.2000000000000002e-06, 1.4000000000000001e-06]
    assert learning_rate(0, 1e-4, DEMO_20B) == pytest.approx(2e-07, rel=1e-15)
    assert [learning_rate(step + 1, 1e-4, DEMO_20B) for step in range(6)] == printed


def test_lr_warms_up_then_falls_and_stays_down():
    assert learning_rate(499, 1e-4, DEMO_20B) == 1e-4
    assert learning_rate(500, 1e-4, DEMO_20B) == 1e-4
    middle = learning_rate((500 + 50000) // 2, 1e-4, DEMO_20B)
    assert middle == pytest.approx((1e-4 + 1e-5) / 2, rel=1e-12)
    assert learning_rate(50000, 1e-4, DEMO_20B) == learning_rate(90000, 1e-4, DEMO_20B) == 1e-5


def test_init_steps_have_no_lr_and_last_epoch_continues():
    schedule = LrSchedulerConfig(total_steps=100, init_steps=5, warmup_ratio=0.1, eta_min=0)
    assert [learning_rate(i, 1.0, schedule) for i in range(7)] == [0, 0, 0, 0, 0, 0.1, 0.2]
    later = schedule.model_copy(update={"last_epoch": 4})
    assert learning_rate(0, 1.0, later) == 0.1


def test_the_cosine_of_a_small_llama():
    schedule = LrSchedulerConfig(total_steps=100000, init_steps=0, warmup_ratio=0.01, eta_min=0)
    assert learning_rate(25750, 5e-4, schedule) == pytest.approx(4.267767e-4, rel=1e-6)
    assert learning_rate(50500, 5e-4, schedule) == pytest.approx(2.5e-4, rel=1e-12)
    assert learning_rate(100000, 5e-4, schedule) == 0


def test_no_warm_up_starts_at_the_peak():
    assert learning_rate(0, 1.0, LrSchedulerConfig(total_steps=10, warmup_ratio=0)) == 1.0


def test_a_warm_up_from_zero_meets_the_numbers_of_a_cosine_over_100000_steps() -> None:
    schedule = LrSchedulerConfig(total_steps=100000, warmup_steps=1000, warmup_from_zero=True)
    known = {0: 0.0, 500: 2.5e-4, 1000: 5e-4, 25750: 4.267767e-4, 50500: 2.5e-4, 100000: 0.0, 100001: 0.0}
    for step, lr in known.items():
        assert learning_rate(step, 5e-4, schedule) == pytest.approx(lr, rel=1e-6, abs=1e-20), step
    counted_from_one = schedule.model_copy(update={"warmup_from_zero": False})
    assert [learning_rate(step - 1, 5e-4, counted_from_one) for step in (500, 1000)] == [2.5e-4, 5e-4]


def test_warm_up_and_cosine_equal_their_closed_form_at_every_step() -> None:
    """t / W of the peak before W, then the cosine down to the least at C, then the least."""
    schedule = LrSchedulerConfig(total_steps=21, warmup_steps=7, warmup_from_zero=True, eta_min=0.1)
    for t in range(25):
        down = 0.5 * (1 + math.cos(math.pi * (t - 7) / 14))
        expected = t / 7 if t < 7 else 0.1 + down * 0.9 if t <= 21 else 0.1
        assert learning_rate(t, 1.0, schedule) == pytest.approx(expected, rel=1e-14), t


def test_inverse_sqrt_falls_from_the_end_of_the_warm_up() -> None:
    plain = LrSchedulerConfig(total_steps=10, warmup_steps=0, kind="inverse_sqrt")
    assert [learning_rate(t, 10.0, plain) for t in range(100)] == pytest.approx(
        [10 / math.sqrt(t + 1) for t in range(100)], rel=1e-15
    )
    warm = plain.model_copy(update={"warmup_steps": 4, "eta_min": 2.0})
    found = [learning_rate(t, 10.0, warm) for t in range(120)]
    assert (
        found[:5] == [2.5, 5.0, 7.5, 10.0, 10.0] and found[12] == 10 * math.sqrt(4 / 12) and found[100:] == [2.0] * 20
    )


def test_noam_is_its_formula_at_every_step() -> None:
    """In step k = 1, 2, ...; highest at k = W."""
    schedule = LrSchedulerConfig(total_steps=100, warmup_steps=20, kind="noam", noam_width=512)
    for k in range(1, 101):
        assert learning_rate(k - 1, 2.0, schedule) == pytest.approx(
            2 * 512**-0.5 * min(k**-0.5, k * 20**-1.5), rel=1e-14
        )


def test_a_table_of_steps() -> None:
    schedule = LrSchedulerConfig(total_steps=20, warmup_steps=2, kind="steps", step_factors=[[5, 0.5], [8, 0.1]])
    assert [learning_rate(t, 2.0, schedule) for t in range(10)] == [1.0, 2.0, 2.0, 2.0, 2.0, 1.0, 1.0, 1.0, 0.2, 0.2]


SHAPES = {
    "linear": lambda x: 1 - x,
    "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2,
    "1-sqrt": lambda x: 1 - math.sqrt(x),
    "exponential": lambda x: None,
}


@pytest.mark.parametrize("shape", SHAPES)
def test_wsd_is_stable_then_falls_by_its_shape_to_the_end(shape: str) -> None:
    keys = {"total_steps": 100, "warmup_steps": 10, "decay_steps": 40, "decay_shape": shape, "eta_min": 0.1}
    schedule = LrSchedulerConfig.model_validate({"kind": "wsd", **keys})
    rates = [learning_rate(t, 1.0, schedule) for t in range(120)]
    assert rates[9:61] == [1.0] * 52 and rates[100:] == [0.1] * 20
    for t in range(60, 101):
        x = (t - 60) / 40
        expected = 0.1**x if shape == "exponential" else 0.1 + 0.9 * SHAPES[shape](x)
        assert rates[t] == pytest.approx(expected, rel=1e-14)
    assert all(later < earlier for earlier, later in pairwise(rates[60:101]))


def test_more_steps_move_the_decay_of_wsd_and_nothing_before() -> None:
    """The decay is counted from the end, and its progress from its own start."""
    short, long = (
        LrSchedulerConfig(total_steps=steps, warmup_steps=5, kind="wsd", decay_steps=20) for steps in (100, 250)
    )
    rates = [[learning_rate(t, 1.0, one) for t in range(260)] for one in (short, long)]
    assert rates[0][:81] == rates[1][:81] and rates[0][80:101] == rates[1][230:251]


def test_the_curves_of_transformers() -> None:
    """Its warm-up begins at 0; where it rounds, it differs in the last bit."""
    from transformers import optimization

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    ours = {"total_steps": 50, "warmup_steps": 8, "warmup_from_zero": True, "eta_min": 0.0}
    wsd = {"num_warmup_steps": 8, "num_decay_steps": 12, "num_training_steps": 50}
    theirs = {
        "linear": ({}, optimization.get_linear_schedule_with_warmup(optimizer, 8, 50)),
        "cosine": ({}, optimization.get_cosine_schedule_with_warmup(optimizer, 8, 50)),
        "constant": ({}, optimization.get_constant_schedule_with_warmup(optimizer, 8)),
        "inverse_sqrt": ({}, optimization.get_inverse_sqrt_schedule(optimizer, 8)),
    }
    for shape in ("linear", "cosine", "1-sqrt"):
        made = optimization.get_wsd_schedule(optimizer, **wsd, decay_type=shape)
        theirs[f"wsd {shape}"] = ({"decay_steps": 12, "decay_shape": shape}, made)
    for name, (keys, made) in theirs.items():
        schedule = LrSchedulerConfig.model_validate({**ours, **keys, "kind": name.split()[0]})
        steps = range(51)  # theirs rises again after a cosine
        expected = [made.lr_lambdas[0](t) for t in steps]
        found = [learning_rate(t, 1.0, schedule) for t in steps]
        assert found == pytest.approx(expected, rel=1e-12, abs=1e-15), name


KEYS: dict[str, dict[str, object]] = {
    "wsd": {"decay_steps": 2},
    "steps": {"step_factors": [[11, 0.5]]},
}
KINDS = ["constant", "inverse_sqrt", "steps", "cosine", "linear", "wsd"]
ENDLESS = KINDS[:3]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("from_zero", [False, True])
@pytest.mark.parametrize("warmup", [0, 1, 3, 10])
def test_no_jump_where_the_warm_up_ends(kind: str, from_zero: bool, warmup: int) -> None:
    """At the peak in the first step after it, also without a warm-up, and with one of all the steps."""
    keys = {
        "warmup_steps": warmup,
        "warmup_from_zero": from_zero,
        "kind": kind,
        "total_steps": 10,
        **KEYS.get(kind, {}),
    }
    schedule = LrSchedulerConfig.model_validate(keys)
    rates = [learning_rate(t, 1.0, schedule) for t in range(12)]
    assert rates[:warmup] == [(t + (not from_zero)) / warmup for t in range(warmup)]
    assert rates[warmup] == (0.0 if kind not in ENDLESS and warmup == 10 else 1.0)
    assert all(later <= earlier for earlier, later in pairwise(rates[warmup:]))


def test_more_steps_leave_the_rates_of_a_schedule_without_an_end_alone() -> None:
    for kind in ENDLESS:
        short, long = (
            LrSchedulerConfig.model_validate(
                {"total_steps": steps, "warmup_steps": 5, "kind": kind, **KEYS.get(kind, {})}
            )
            for steps in (20, 1000)
        )
        assert [learning_rate(t, 1.0, short) for t in range(50)] == [learning_rate(t, 1.0, long) for t in range(50)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("done", [2, 5, 9])
def test_last_epoch_continues_every_part_of_the_curve(kind: str, done: int) -> None:
    keys = {"total_steps": 12, "warmup_steps": 4, "init_steps": 1, **KEYS.get(kind, {})}
    whole = LrSchedulerConfig.model_validate({"kind": kind, **keys})
    later = whole.model_copy(update={"last_epoch": done - 1})
    assert [learning_rate(t, 1.0, later) for t in range(9)] == [learning_rate(t + done, 1.0, whole) for t in range(9)]


def test_warm_up_is_a_hundredth_unless_it_is_given() -> None:
    given: dict[int, dict[str, float]] = {
        5: {},
        50: {"warmup_ratio": 0.1},
        7: {"warmup_steps": 7},
        0: {"warmup_steps": 0},
    }
    for steps, keys in given.items():
        assert LrSchedulerConfig.model_validate({"total_steps": 500, **keys}).num_warmup_steps == steps


def test_beta2_is_constant_or_rises_with_the_step():
    assert beta2(1000, Beta2SchedulerConfig(init_beta2=0.95, c=0)) == 0.95
    rising = Beta2SchedulerConfig(init_beta2=0.9, c=0.8)
    assert beta2(0, rising) == beta2(1, rising) == 0.9
    assert beta2(1000, rising) == 1 - math.pow(1000, -0.8)
