"""lr and beta2 against the numbers of InternLM's 20B log and closed forms."""

import math

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


def test_beta2_is_constant_or_rises_with_the_step():
    assert beta2(1000, Beta2SchedulerConfig(init_beta2=0.95, c=0)) == 0.95
    rising = Beta2SchedulerConfig(init_beta2=0.9, c=0.8)
    assert beta2(0, rising) == beta2(1, rising) == 0.9
    assert beta2(1000, rising) == 1 - math.pow(1000, -0.8)
