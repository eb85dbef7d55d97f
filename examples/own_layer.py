"""Train with a layer of your own: a norm by the mean magnitude, in the place of RMSNorm.

    python examples/own_layer.py

The weight knows that gradients of sequence-parallel ranks are partial sums, so the layer is right in every layout.
"""

import torch

from internlm_lite.cli import train
from internlm_lite.cli.starter import starter_folder
from internlm_lite.layers.norm import NORMS, Norm


class MagnitudeNorm(Norm):
    """y = x / (mean(|x|) + eps) * w"""

    statistics = 1  # the divisor is kept of each token: the planner asks for it

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x / (x.abs().mean(dim=-1, keepdim=True) + self.eps) * self.weight).to(x.dtype)


def main() -> None:
    # Its checkpoints say "rmsnorm". To keep the layer, give it a name of its own in `ModelConfig.norm_type`.
    NORMS["rmsnorm"] = MagnitudeNorm
    config = str(starter_folder() / "configs" / "tiny.py")
    train.main(["--config", config, "JOB_NAME=own_layer"])  # ends the process


if __name__ == "__main__":
    main()
