"""Random models for the tests of conversion: ours in a checkpoint, and transformers' in a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from internlm_lite.apps.convert.to_hf import MasterRows, open_checkpoint
from internlm_lite.checkpoint.manager import CheckpointManager
from internlm_lite.config.render_config import resolved
from internlm_lite.config.schema import Config, LossConfig
from internlm_lite.data.tokenizer import Tokenizer, train_tokenizer
from internlm_lite.layers.flash import AttentionBackend, packed
from internlm_lite.mesh.layout import LocalShard, Parameter
from internlm_lite.mesh.mesh import Mesh, single_process_mesh
from internlm_lite.models.decoder import build_model
from internlm_lite.models.initialise import initialise
from internlm_lite.models.stages import WholeModel

TOKENS = torch.randint(96, (40,), generator=torch.Generator().manual_seed(3))
MODEL = {
    "num_attention_heads": 8,
    "num_kv_attention_heads": 2,
    "vocab_size": 96,
    "hidden_size": 64,
    "num_layers": 2,
    "mlp_ratio": 2.5,
    "multiple_of": 16,
    "rope_base": 50000,
    "layer_norm_epsilon": 1e-4,
    "dtype": "torch.float32",
    "init_std": 0.1,
}


def config_of(tokenizer: str | None = None, **changes: Any) -> Config:
    return Config.model_validate(
        {
            "data": {"seq_len": 64, "total_steps": 4, "tokenizer": tokenizer},
            "lr_scheduler": {"total_steps": 4},
            "model": {**MODEL, **changes},
        }
    )


def save_ours(folder: Path, mesh: Mesh | None = None, tokenizer: str | None = None, **changes: Any) -> Config:
    """A checkpoint of random masters; every norm and bias has values of its own."""
    mesh = mesh or single_process_mesh()
    config = config_of(tokenizer, **changes)
    model = build_model(config.model, LossConfig(), mesh, AttentionBackend.SDPA)
    initialise(model, seed=11)
    pieces = []
    for number, param in enumerate(model.parameters()):
        assert isinstance(param, Parameter)
        part = param.shard_spec
        if part.init_std is None:
            whole = 0.5 + torch.rand(part.shape, generator=torch.Generator().manual_seed(number))
            param.data.copy_(whole[slice(*part.box[0])])
        pieces.append(LocalShard(part.name, "master", part.shape, part.box, None, param.data.float()))
    CheckpointManager(str(folder), mesh, config=resolved(config)).save(4, "final", pieces, {})
    return config


def save_ours_on(mesh: Mesh, folder: Path) -> None:
    save_ours(folder, mesh)


def masters(folder: Path) -> dict[str, torch.Tensor]:
    """All masters of the newest checkpoint, whole."""
    rows = MasterRows(open_checkpoint(str(folder))[0])
    return {name: rows.read(name, 0, shape[0]).clone() for name, shape in rows.shapes.items()}


def save_llama(folder: Path, *, tied: bool = False, bias: bool = False, kv_heads: int = 2, **more: Any) -> Any:
    """A random Llama of transformers, saved in several files; the model."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=100,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=kv_heads,
        rope_theta=50000.0,
        attention_bias=bias,
        tie_word_embeddings=tied,
        max_position_embeddings=64,
        **more,
    )
    torch.manual_seed(5)
    model = transformers.LlamaForCausalLM(config).eval()
    for name, param in model.named_parameters():
        if param.dim() == 1:
            torch.nn.init.uniform_(param, -0.2, 0.2)
            param.data += 1.0 if "norm" in name else 0.0
    model.save_pretrained(folder, max_shard_size="60KB")
    return model


@torch.no_grad()
def our_logits(model: WholeModel) -> torch.Tensor:
    borders = (0, len(TOKENS))
    attend = packed(AttentionBackend.SDPA, torch.tensor(borders, dtype=torch.int32), borders, len(TOKENS))
    return model.logits(TOKENS, torch.arange(len(TOKENS)), attend)


@torch.no_grad()
def their_logits(model: Any) -> torch.Tensor:
    return model(TOKENS[None]).logits[0]


def small_tokenizer(folder: Path) -> Tokenizer:
    text = [f"def f{n}(x):\n    return x + {n}\n" for n in range(300)]
    return train_tokenizer(text, folder / "small.model", 300, 1)
