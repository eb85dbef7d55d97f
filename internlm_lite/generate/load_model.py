"""A model with the weights of a training checkpoint, for use outside training."""

from __future__ import annotations

import torch

from internlm_lite.checkpoint.format.weight_roles import MASTER, Weights, with_weights
from internlm_lite.checkpoint.load.checkpoint_loader import Loader
from internlm_lite.config.schema import Config, S3Config
from internlm_lite.layers.flash import choose_backend
from internlm_lite.mesh.layout import LocalShard, Parameter
from internlm_lite.mesh.mesh import Mesh
from internlm_lite.models.decoder import build_model
from internlm_lite.models.stages import WholeModel


def load_model(
    path: str, mesh: Mesh, dtype: str | None = None, s3: S3Config | None = None, *, weights: Weights = "model"
) -> tuple[WholeModel, Config]:
    """The model with the weights of the checkpoint at `path` (see `Loader.open`), and the checkpoint's config.

    `dtype`: a name as in the config, such as "torch.bfloat16", to use instead of the trained one; `weights`: "ema" for
    the averaged ones. Raises CheckpointError. Collective over the mesh.
    """
    loader = Loader(mesh, s3=s3)
    found = with_weights(loader.open(path), weights)
    config = found.config_of_stage()
    shape = config.model if dtype is None else config.model.model_copy(update={"dtype": dtype})
    kept = shape.model_copy(update={"attention_dropout": 0.0})  # nothing is dropped in generation
    backend = choose_backend(kept, mesh.device, strict=False)  # this machine may be another one
    model = build_model(shape, config.loss, mesh, backend)
    loader.load(found, [piece_of(param) for param in model.parameters()])
    return WholeModel({0: model}, mesh), config


def piece_of(param: torch.Tensor) -> LocalShard:
    """The local parameter as the destination of a checkpoint's master weights, which loading casts to its dtype."""
    assert isinstance(param, Parameter), "parameters of the model know their part"
    part = param.shard_spec
    return LocalShard(part.name, MASTER, part.shape, part.box, None, param.detach())
