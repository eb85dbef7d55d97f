"""lr and beta2 against the numbers of InternLM's 20B log and closed forms."""

import math
from itertools import pairwise

import pytest

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


def test_inverse_sqrt_counts_from_the_end_of_the_warm_up() -> None:
    plain = LrSchedulerConfig(total_steps=10, warmup_steps=0, decay="inverse_sqrt")
    assert [learning_rate(t, 10.0, plain) for t in range(100)] == [10 / math.sqrt(t + 1) for t in range(100)]
    warm = plain.model_copy(update={"warmup_steps": 4, "eta_min": 2.0})
    found = [learning_rate(t, 10.0, warm) for t in range(50)]
    assert found[:6] == [2.5, 5.0, 7.5, 10.0, 10.0, 10 / math.sqrt(2)] and found[28:] == [2.0] * 22


DECAYS = ["cosine", "constant", "inverse_sqrt"]


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("from_zero", [False, True])
@pytest.mark.parametrize("warmup", [0, 1, 3, 10])
def test_no_jump_where_the_warm_up_ends(decay: str, from_zero: bool, warmup: int) -> None:
    """At the peak in the first step after it, also without a warm-up, and with one of all the steps."""
    keys = {"warmup_steps": warmup, "warmup_from_zero": from_zero, "decay": decay, "total_steps": 10}
    schedule = LrSchedulerConfig.model_validate(keys)
    rates = [learning_rate(t, 1.0, schedule) for t in range(12)]
    assert rates[:warmup] == [(t + (not from_zero)) / warmup for t in range(warmup)]
    assert rates[warmup] == (0.0 if decay == "cosine" and warmup == 10 else 1.0)
    assert all(later <= earlier for earlier, later in pairwise(rates[warmup:]))


def test_more_steps_leave_the_rates_of_a_schedule_without_an_end_alone() -> None:
    for decay in DECAYS[1:]:
        short, long = (
            LrSchedulerConfig.model_validate({"total_steps": steps, "warmup_steps": 5, "decay": decay})
            for steps in (20, 1000)
        )
        assert [learning_rate(t, 1.0, short) for t in range(50)] == [learning_rate(t, 1.0, long) for t in range(50)]


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("done", [2, 5, 9])
def test_last_epoch_continues_every_part_of_the_curve(decay: str, done: int) -> None:
    whole = LrSchedulerConfig.model_validate({"total_steps": 12, "warmup_steps": 4, "init_steps": 1, "decay": decay})
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
