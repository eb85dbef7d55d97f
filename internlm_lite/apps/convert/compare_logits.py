"""Compares the logits of a converted model, ours against transformers', in fp32.

Both sides get the weights of the folder: ours are rounded to its dtype first. The remaining difference comes from the
order of floating point operations, far below BOUND; a misplaced tensor gives differences as large as the logits.

InternLM's models are remote code in transformers, which is not run: their weights are loaded into a Llama.
transformers computes rotary angles in fp32.
"""

from __future__ import annotations

import gc
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from packaging.version import Version

from internlm_lite.apps.convert.hf_config import HFConfig, from_hf, to_hf
from internlm_lite.apps.convert.hf_folder import HFFolder, read_json
from internlm_lite.errors import CheckpointError, MissingPackageError
from internlm_lite.layers.flash import packed
from internlm_lite.models.stages import WholeModel

BOUND = 1e-4
"""Largest allowed difference of two logits, relative to the largest logit."""
_TOKENS = 64


@dataclass(frozen=True)
class LogitDifference:
    """Difference of both sides' logits for the same random tokens."""

    largest: float
    largest_logit: float
    n_tokens: int

    @property
    def bound(self) -> float:
        return BOUND * self.largest_logit

    @property
    def is_small(self) -> bool:
        return self.largest <= self.bound

    def __str__(self) -> str:
        return (
            f"logits of {self.n_tokens} tokens, ours against transformers', fp32: largest difference "
            f"{self.largest:.3g}, bound {self.bound:.3g} ({BOUND:g} of the largest logit {self.largest_logit:.4g})"
        )


def require_transformers() -> Any:
    """Import transformers. Raises MissingPackageError."""
    try:
        transformers: Any = importlib.import_module("transformers")
    except ImportError:
        raise MissingPackageError(
            "--verify computes with transformers, which is not installed: pip install internlm_lite[hf]"
        ) from None
    transformers.utils.logging.disable_progress_bar()
    return transformers


@torch.no_grad()
def compare(load_ours: Callable[[], WholeModel], folder: Path) -> LogitDifference:
    """`load_ours`: the model in fp32 on the CPU. Only one side is in memory at a time. Raises CheckpointError."""
    require_transformers()
    source = HFFolder(folder)
    hf = from_hf(read_json(folder / "config.json"), str(folder / "config.json"))
    n_tokens = min(_TOKENS, hf.max_positions)
    tokens = torch.randint(hf.model.vocab_size, (n_tokens,), generator=torch.Generator().manual_seed(0))
    dtypes = set(source.dtypes.values())
    ours = _our_logits(load_ours(), tokens, dtypes.pop() if len(dtypes) == 1 else torch.float32)
    gc.collect()
    theirs = _their_logits(source, hf, tokens)
    largest = (ours - theirs).abs().max().item()
    if not torch.isfinite(ours).all() or not torch.isfinite(theirs).all():
        raise CheckpointError(f"{folder}: the logits are not finite, so they cannot be compared")
    return LogitDifference(largest, theirs.abs().max().item(), n_tokens)


def _our_logits(model: WholeModel, tokens: torch.Tensor, stored: torch.dtype) -> torch.Tensor:
    for param in model.any_stage.parameters():
        param.copy_(param.to(stored).to(param.dtype))
    borders = (0, len(tokens))
    attend = packed(model.any_stage.backend, torch.tensor(borders, dtype=torch.int32), borders, len(tokens))
    return model.logits(tokens, torch.arange(len(tokens)), attend)


def _their_logits(source: HFFolder, hf: HFConfig, tokens: torch.Tensor) -> torch.Tensor:
    transformers = require_transformers()
    if not hf.family.startswith("internlm"):
        try:
            model = transformers.AutoModelForCausalLM.from_pretrained(
                source.path, use_safetensors=True, local_files_only=True, **in_fp32(transformers.__version__)
            )
        except (ValueError, OSError, RuntimeError) as error:  # such as a family that is newer
            what = str(error).strip().partition("\n")[0]
            text = f"transformers {transformers.__version__} does not load {source.path}: {what}"
            raise CheckpointError(f"{text}; the conversion itself is done, see whether a newer one loads it") from error
    else:
        model = _as_llama(transformers, source, hf)
    logits = model.float().eval()(tokens[None]).logits[0]
    assert isinstance(logits, torch.Tensor)
    return logits


def in_fp32(version: str) -> dict[str, torch.dtype]:
    """The argument of from_pretrained, by the name that this version of transformers takes without a warning."""
    return {"torch_dtype" if Version(version) < Version("4.56") else "dtype": torch.float32}


def _as_llama(transformers: Any, source: HFFolder, hf: HFConfig) -> Any:
    """A Llama with biases computes what InternLM does; biases that it lacks are 0. InternLM2's fused rows are split."""
    biased = hf.model.model_copy(update={"qkv_bias": True, "out_bias": True, "mlp_bias": True})
    config = transformers.LlamaConfig(**to_hf(biased, "llama", hf.max_positions, "float32"))
    weights: dict[str, torch.Tensor] = {}
    for name, size in source.shapes.items():
        tensor = source.read(name, 0, size[0]).float()
        weights |= _split(name, tensor, hf) if hf.family == "internlm2" else {name: tensor}
    if hf.model.tie_word_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    missing = {name: param.shape for name, param in model.named_parameters() if name not in weights}
    weights |= {name: torch.zeros(shape) for name, shape in missing.items() if name.endswith(".bias")}
    model.load_state_dict(weights, strict=True, assign=True)
    # The folder has weights only; buffers of the rotary embedding are recomputed on a real device.
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config)
    return model


def _split(name: str, tensor: torch.Tensor, hf: HFConfig) -> dict[str, torch.Tensor]:
    """An InternLM2 tensor under Llama's names. (modeling_internlm2.py: wqkv is "(h gs d)", k and v at -2 and -1)"""
    renamed = name
    for theirs, llamas in (
        ("tok_embeddings", "embed_tokens"),
        ("attention_norm", "input_layernorm"),
        ("ffn_norm", "post_attention_layernorm"),
        ("attention.wo", "self_attn.o_proj"),
        ("feed_forward.w1", "mlp.gate_proj"),
        ("feed_forward.w2", "mlp.down_proj"),
        ("feed_forward.w3", "mlp.up_proj"),
    ):
        renamed = renamed.replace(theirs, llamas)
    if renamed == "output.weight":
        renamed = "lm_head.weight"
    if ".wqkv." not in renamed:
        return {renamed: tensor}
    heads = tensor.unflatten(0, (hf.model.kv_heads, -1, hf.model.head_size))
    parts = {"q_proj": heads[:, :-2], "k_proj": heads[:, -2], "v_proj": heads[:, -1]}
    return {
        renamed.replace("attention.wqkv", f"self_attn.{part}"): rows.reshape(-1, *tensor.shape[1:])
        for part, rows in parts.items()
    }
