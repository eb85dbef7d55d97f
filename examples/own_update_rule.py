"""Train with an update rule of your own: Signum, the sign of a momentum (arXiv:1802.04434).

    python examples/own_update_rule.py

The optimizer shards gradients and state over the ranks and saves the state; the rule sees flat shards. An elementwise
rule, like this one, is therefore right in every layout.
"""

from collections.abc import Sequence

import torch

from internlm_lite.cli import train
from internlm_lite.cli.starter import starter_folder
from internlm_lite.optim.rules import RULES
from internlm_lite.optim.update_rule import UpdateRule


class Signum(UpdateRule):
    """momentum = beta2 * momentum + (1 - beta2) * grad;  weights -= lr * (sign(momentum) + weight_decay * weights)"""

    roles = ("momentum",)

    def update(self, grads: Sequence[torch.Tensor], lr: torch.Tensor, beta2: float, skipped: torch.Tensor) -> None:
        for shard, grad in zip(self._shards, grads, strict=True):
            momentum = shard.state["momentum"]
            new = torch.where(skipped, momentum, momentum.lerp(grad, 1 - beta2))  # a skipped step changes nothing
            momentum.copy_(new)
            step = new.sign()
            if self._group.weight_decay:
                step.add_(shard.weights, alpha=self._group.weight_decay)
            shard.weights.sub_(step.mul_(lr).masked_fill_(skipped, 0.0))


def main() -> None:
    # The config knows a closed list of names. To keep the rule, add its name to `OptimizerConfig` in config/schema.py;
    # here it takes the place of "lion".
    RULES["lion"] = Signum
    config = str(starter_folder() / "configs" / "tiny.py")
    train.main(["--config", config, "optimizer.name=lion", "adam.lr=3e-4", "JOB_NAME=signum"])  # ends the process


if __name__ == "__main__":
    main()
