"""tgs arithmetic against the seed's six lines, block refreshes, intervals of several steps, and resume."""

from __future__ import annotations

import json

import pytest

from internlm_lite.monitor.speed import SpeedMeter
from tests.monitor.test_line import SEED

TOKENS = 65536  # of one step of the 20B demo
WORLD = 16


def test_seed_speeds():
    meter = SpeedMeter(WORLD)
    for record in SEED:
        seed = record.speed
        speed = meter.add(TOKENS, TOKENS / WORLD / seed.last_tgs_1)
        assert speed.last_tgs_1 == seed.last_tgs_1
        assert speed.tgs_all == pytest.approx(seed.tgs_all, abs=0.0101)  # its durations are known to 6 digits only
        assert speed.tgs_sma == pytest.approx(seed.tgs_sma, abs=0.0101)
        assert speed.tgs_avg == seed.tgs_avg
        assert speed.tgs == pytest.approx(seed.tgs, abs=0.0101)  # read off a later clock
        assert (speed.last_tgs_10, speed.last_tgs_50) == (0, 0)


def test_block_speeds():
    meter = SpeedMeter(1)
    figures = [meter.add(100, 1.0 if step < 15 else 0.5) for step in range(60)]
    tens = [speed.last_tgs_10 for speed in figures]
    assert tens[:9] == [0] * 9
    assert tens[9:19] == [100.0] * 10  # steps 0-9
    assert tens[19:29] == [133.33] * 10  # 1000 tokens in 5 * 1.0 + 5 * 0.5 s
    assert tens[29:] == [200.0] * 31
    fifties = [speed.last_tgs_50 for speed in figures]
    assert fifties[:49] == [0] * 49 and fifties[49:] == [round(5000 / (15 + 17.5), 2)] * 11


def test_moving_average():
    meter = SpeedMeter(2)
    for _ in range(50):
        meter.add(200, 1.0)
    for _ in range(50):
        speed = meter.add(200, 0.25)
    assert speed.tgs_sma == 400.0
    assert speed.tgs_all == round(100 * 100 / 62.5, 2)
    assert speed.tgs_avg == (100 + 400) / 2
    assert meter.seconds_per_step == 0.25


def test_several_steps_between_two_lines():
    one, several = SpeedMeter(4), SpeedMeter(4)
    for _ in range(3):
        for _ in range(20):
            by_step = one.add(4096, 0.5)
        at_once = several.add(20 * 4096, 10.0, steps=20)
        assert at_once == by_step


def test_interval_across_block():
    meter = SpeedMeter(1)
    meter.add(700, 7.0, steps=7)
    speed = meter.add(1400, 7.0, steps=7)  # steps 7-13 at 200 tokens/s
    assert speed.last_tgs_1 == speed.tgs == 200.0
    assert speed.last_tgs_10 == round((7 * 100 + 3 * 200) / 10, 2)


def test_saved_and_restored_through_json():
    through, saved = SpeedMeter(2), SpeedMeter(2)
    for step in range(63):
        through.add(4096, 1 + 0.01 * step)
        saved.add(4096, 1 + 0.01 * step)
    restored = SpeedMeter(2)
    restored.load_state_dict(json.loads(json.dumps(saved.state_dict())))
    for step in range(63, 120):
        assert restored.add(4096, 1 + 0.01 * step) == through.add(4096, 1 + 0.01 * step)
    assert restored.state_dict() == through.state_dict()


def test_before_first_step():
    assert SpeedMeter(1).seconds_per_step is None
