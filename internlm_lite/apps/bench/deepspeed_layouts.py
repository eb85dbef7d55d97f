"""The bare decoder under DeepSpeed's ZeRO, as a user of it would write that: its engine, its norm and clipping, torch's
fused AdamW. Stage 3 gathers a block as a whole, and keeps no weights beyond it."""

from __future__ import annotations

from typing import Any

import torch

from internlm_lite.apps.bench.bare import BareDecoder
from internlm_lite.apps.bench.timing import Side
from internlm_lite.apps.bench.torch_layouts import micro_batches
from internlm_lite.config.schema import Config
from internlm_lite.mesh.mesh import Mesh
from internlm_lite.optim.deepspeed_settings import import_deepspeed, settings
from internlm_lite.runtime.device import torch_dtype


def deepspeed_zero(stage: int, config: Config, mesh: Mesh, seed: int) -> Side:
    """The side of ZeRO-`stage`; its steps return the norm."""
    deepspeed = import_deepspeed(mesh.device)
    bare = BareDecoder(config.model, config.data.seq_len, torch_dtype(config.model.dtype)).to(mesh.device)
    if stage == 3:
        for block in bare.model.layers.values():
            deepspeed.utils.set_z3_leaf_module(block, True)
    adam = config.adam
    rule = torch.optim.AdamW(bare.parameters(), lr=adam.lr, betas=(adam.adam_beta1, adam.adam_beta2), fused=True)
    chosen = config.engine.model_copy(update={"name": "deepspeed", "stage": stage})
    largest = sum(param.numel() for param in bare.parameters())
    wanted = settings(config.model_copy(update={"engine": chosen}), mesh.device, largest)
    wanted |= {
        "gradient_clipping": config.hybrid_zero_optimizer.clip_grad_norm,
        "gradient_accumulation_steps": config.data.micro_num,
    }
    engine: Any
    engine, *_ = deepspeed.initialize(model=bare, optimizer=rule, config=wanted)
    micros = micro_batches(config, mesh, seed)

    def step() -> torch.Tensor:
        for tokens, labels in micros:
            engine.backward(engine(tokens, labels))
            engine.step()
        return torch.as_tensor(engine.get_global_grad_norm())

    return Side(step)
