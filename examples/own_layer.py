"""Train with a layer of your own: LayerNorm without a bias, in the place of RMSNorm.

    python examples/own_layer.py

The weight knows that gradients of sequence-parallel ranks are partial sums, so the layer is right in every layout.
"""

import torch
import torch.nn.functional as F

from internlm_lite.cli import train
from internlm_lite.cli.starter import starter_folder
from internlm_lite.layers.norm import NORMS, Norm


class LayerNorm(Norm):
    """y = (x - mean(x)) / sqrt(var(x) + eps) * w   (arXiv:1607.06450)"""

    statistics = 2  # mean and standard deviation are kept of each token: the planner asks for it

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x.to(self.weight.dtype), self.weight.shape, self.weight, None, self.eps).to(x.dtype)


def main() -> None:
    # Its checkpoints say "rmsnorm". To keep the layer, give it a name of its own in `ModelConfig.norm_type`.
    NORMS["rmsnorm"] = LayerNorm
    config = str(starter_folder() / "configs" / "tiny.py")
    train.main(["--config", config, "JOB_NAME=layernorm"])  # ends the process


if __name__ == "__main__":
    main()
