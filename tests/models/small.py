"""A small decoder and a packed row of documents, for tests."""

import torch

from internlm_lite.batch import IGNORE
from internlm_lite.config.schema import LossConfig, ModelConfig
from internlm_lite.layers.flash import AttentionBackend, packed
from internlm_lite.mesh.mesh import Mesh, single_process_mesh
from internlm_lite.models.decoder import Transformer, build_model
from internlm_lite.models.initialise import initialise

VOCAB = 64


def small_config(**changes: object) -> ModelConfig:
    defaults = {
        "num_attention_heads": 8,
        "num_kv_attention_heads": 4,
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "num_layers": 3,
        "mlp_ratio": 2,
        "multiple_of": 16,
        "dtype": "torch.float64",
        "init_std": 0.2,
        "checkpoint": False,
    }
    return ModelConfig(**{**defaults, **changes})


def small_model(
    mesh: Mesh | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    by_sequence: bool = False,
    **changes: object,
) -> Transformer:
    """Initialised; biases and norm weights too get distinct values, so that a wrong gradient of theirs shows."""
    mesh = mesh or single_process_mesh()
    model = build_model(
        small_config(**changes),
        LossConfig(label_smoothing=label_smoothing, z_loss=z_loss),
        mesh,
        AttentionBackend.SDPA,
        by_sequence=by_sequence,
    )
    initialise(model, seed=7)
    with torch.no_grad():
        for param in model.parameters():
            if param.shard_spec.init_std is None:
                whole = torch.linspace(0.5, 1.5, param.shard_spec.shape[0]).to(param.dtype)
                param.copy_(whole[slice(*param.shard_spec.box[0])])
    return model


def documents(lengths: list[int], seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, VOCAB, (length,), generator=generator) for length in lengths]


def row_of(docs: list[torch.Tensor]) -> tuple:
    """(tokens, positions, labels, attend) of documents packed in one row; the last token of each has no label."""
    boundaries = [0]
    for doc in docs:
        boundaries.append(boundaries[-1] + len(doc))
    labels = torch.cat([torch.cat((doc[1:], torch.tensor([IGNORE]))) for doc in docs])
    positions = torch.cat([torch.arange(len(doc)) for doc in docs])
    longest = max(len(doc) for doc in docs)
    cu_seqlens = torch.tensor(boundaries, dtype=torch.int32)
    return torch.cat(docs), positions, labels, packed(AttentionBackend.SDPA, cu_seqlens, tuple(boundaries), longest)


def run(model: Transformer, docs: list[torch.Tensor], scale: float = 0.5):
    """TokenLosses of one row."""
    tokens, positions, labels, attend = row_of(docs)
    return model.losses(model.hidden(tokens, positions, attend), labels, torch.tensor(scale))
