"""What the plan says of averages of the weights is what a trainer holds and moves."""

from __future__ import annotations

import pytest

from internlm_lite.apps.planner.clock import update_passes
from internlm_lite.apps.planner.holdings import holdings
from internlm_lite.apps.planner.plan import make_plan
from internlm_lite.config.schema import Config
from internlm_lite.layers.costs import Pass
from internlm_lite.layers.flash import AttentionBackend
from internlm_lite.mesh.mesh import Sizes, single_process_mesh
from internlm_lite.train.trainer import Trainer
from tests.apps.planner.steps import random_batch, run_step, small
from tests.apps.planner.test_passes import Traffic
from tests.apps.planner.test_reality import storages


@pytest.mark.parametrize("dtype", ["torch.float32", "torch.bfloat16", "torch.float64"])
def test_its_bytes_and_its_traffic(dtype: str) -> None:
    """A third of the traffic, as the average is updated in every third step."""
    config, mesh = small(model={"dtype": dtype}, ema={"every": 3}), single_process_mesh()
    trainer = Trainer(config, mesh)
    run_step(trainer, random_batch(config, mesh))
    (plan,) = make_plan(config, 1, None, "cpu").ranks
    assert plan.bytes.weights + plan.bytes.gradients + plan.bytes.optimizer == storages(trainer)
    (plain,) = make_plan(config.model_copy(update={"ema": None}), 1, None, "cpu").ranks
    average = trainer.optimizer.average
    assert average is not None and plain.bytes.optimizer < plan.bytes.optimizer
    with Traffic() as counted:
        average.after_step(3, trainer.optimizer._skips.good_steps)
    (held,), _ = holdings(config, Sizes(), AttentionBackend.SDPA)
    said = sum(bucket.averages_moved for bucket in held.buckets)
    assert 3 * said == pytest.approx(counted.n_bytes, rel=0.01)
    passes = [one for bucket in held.buckets for one in update_passes(bucket, one_pass=False)]
    assert said == sum(one.n_bytes for one in passes) - sum(one.n_bytes for one in _without(config))


def _without(config: Config) -> list[Pass]:
    plain, _ = holdings(config.model_copy(update={"ema": None}), Sizes(), AttentionBackend.SDPA)
    return [one for bucket in plain[0].buckets for one in update_passes(bucket, one_pass=False)]
