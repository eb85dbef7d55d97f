"""The loss scale against InternLM's rules, written out as plain Python."""

import random

import pytest
import torch

from internlm_lite.config.schema import GradScalerConfig
from internlm_lite.optim.scaler import LossScaler

CPU = torch.device("cpu")
YES, NO = torch.tensor(True), torch.tensor(False)


def reference(config: GradScalerConfig, overflows: list[bool]) -> list[float]:
    scale, counter, good, scales = config.fp16.initial_scale, 0, 0, []
    for overflow in overflows:
        if overflow:
            counter, good = counter + 1, 0
            if counter >= config.hysteresis:
                scale = max(scale * config.backoff_factor, config.fp16.min_scale or 0.0)
        else:
            good += 1
            if good == config.fp16.growth_interval:
                counter, good = 0, 0
                scale = min(scale * config.growth_factor, config.max_scale or float("inf"))
        scales.append(scale)
    return scales


@pytest.mark.parametrize("hysteresis", [1, 2, 3])
@pytest.mark.parametrize("seed", range(4))
def test_random_overflows_follow_the_rules(hysteresis: int, seed: int):
    config = GradScalerConfig.model_validate(
        {
            "fp16": {"initial_scale": 64.0, "min_scale": 2.0, "growth_interval": 3},
            "max_scale": 256.0,
            "hysteresis": hysteresis,
        }
    )
    draw = random.Random(seed)
    overflows = [draw.random() < 0.4 for _ in range(200)]
    scaler, scales = LossScaler(config, CPU), []
    for overflow in overflows:
        scaler.update(torch.tensor(overflow), counts=YES)
        scales.append(scaler.scale.item())
    assert scales == reference(config, overflows)
    assert min(scales) == 2.0 or max(scales) == 256.0


def test_the_state_survives_a_round_trip():
    config = GradScalerConfig.model_validate({"fp16": {"initial_scale": 8.0, "growth_interval": 4}})
    draw = random.Random(7)
    overflows = [draw.random() < 0.3 for _ in range(60)]
    scaler, scales = LossScaler(config, CPU), []
    for overflow in overflows:
        fresh = LossScaler(config, CPU)
        fresh.load_state_dict(scaler.state_dict())
        fresh.update(torch.tensor(overflow), counts=YES)
        scaler = fresh
        scales.append(scaler.scale.item())
    assert scales == reference(config, overflows)


def test_a_step_that_does_not_count_leaves_the_scale_and_its_counters():
    config = GradScalerConfig.model_validate({"fp16": {"initial_scale": 8.0, "growth_interval": 2}})
    scaler = LossScaler(config, CPU)
    scaler.update(NO, counts=YES)
    before = scaler.state_dict()
    scaler.update(NO, counts=NO)
    assert scaler.state_dict() == before
    scaler.update(NO, counts=YES)
    assert scaler.scale.item() == 16


def test_without_a_config_the_scale_is_one():
    scaler = LossScaler(None, CPU)
    scaler.update(torch.tensor(True), counts=YES)
    assert scaler.scale.item() == 1
