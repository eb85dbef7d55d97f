"""A proposal as a config file with comments."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from internlm_lite.apps.planner.propose import Proposal


def config_text(proposal: Proposal, name: str) -> str:
    """The text of the config file of a job called `name`."""
    values, why = proposal.sections(), proposal.reasons
    data, model, parallel = values["data"], values["model"], values["parallel"]
    launcher = "python" if proposal.hardware.ranks == 1 else f"torchrun --nproc_per_node={_per_node(proposal)}"
    lines = [
        f"# {why['shape']}.",
        "#",
        f"#   {launcher} train.py --config THIS_FILE",
        "#",
        f"# Written for {proposal.hardware.ranks} rank(s). Reasons stand beside the values; change what you like.",
        f"JOB_NAME = {json.dumps(name)}",
        "",
        f"SEQ_LEN = {data['seq_len']}  # {why['seq_len']}",
        f"MICRO_BSZ = {data['micro_bsz']}  # {why['layout']}",
        f"MICRO_NUM = {data['micro_num']}  # {proposal.tokens_per_step} tokens a step; {why['batch']}",
        f"STEPS = {data['total_steps']}  # {why['steps']}",
        f"LEARNING_RATE = {proposal.lr:g}  # {why['lr']}",
        "",
        _section("ckpt", _checkpoints(proposal, name)),
        _section("data", _data(proposal)),
        _section("model", model, _MODEL_COMMENTS),
        _section("parallel", {"zero1": -1, **parallel}, {"tensor": "as few ranks as the memory allows"}),
        _section("adam", {"lr": _Name("LEARNING_RATE"), "adam_beta2": 0.95, "weight_decay": 0.1}),
        _section(
            "lr_scheduler",
            {
                "total_steps": _Name("STEPS"),
                "warmup_steps": _Name(f"min({_warmup(proposal.steps)}, max(1, STEPS // 10))"),
                "kind": "wsd",
                "decay_ratio": 0.2,
                "decay_shape": "1-sqrt",
            },
            {"kind": "stable in between: a longer run, or train.py --branch-from, goes on from any checkpoint of it"},
        ),
        _section("beta2_scheduler", {"init_beta2": 0.95}),
        _section("hybrid_zero_optimizer", {"clip_grad_norm": 1.0}),
    ]
    return "\n".join(lines).rstrip() + "\n"


_MODEL_COMMENTS = {
    "tie_word_embeddings": "usual below 1e9 parameters",
    "init_std": "sqrt(2 / (5 * hidden_size)) (arXiv:1910.05895)",
    "checkpoint": "recomputation: as much as the memory asks for",
}


class _Name(str):
    """An expression of the file, not a text."""

    __repr__ = str.__str__


def _section(name: str, values: Mapping[str, Any], comments: Mapping[str, str] | None = None) -> str:
    said = comments or {}
    lines = [
        f"    {key}={_literal(value)}," + (f"  # {said[key]}" if key in said else "") for key, value in values.items()
    ]
    return "\n".join([f"{name} = dict(", *lines, ")", ""])


def _literal(value: Any) -> str:
    if isinstance(value, Mapping):
        return "dict(" + ", ".join(f"{key}={_literal(inner)}" for key, inner in value.items()) + ")"
    return json.dumps(value) if type(value) is str else repr(value)


def _checkpoints(proposal: Proposal, name: str) -> dict[str, Any]:
    return {
        "enable_save_ckpt": True,
        "save_ckpt_folder": f"local:ckpts/{name}",
        "checkpoint_every": max(1, proposal.steps // 10),
        "keep": 3,
    }


def _data(proposal: Proposal) -> dict[str, Any]:
    data, found = proposal.data, dict(proposal.sections()["data"])
    found |= {"seq_len": _Name("SEQ_LEN"), "micro_num": _Name("MICRO_NUM"), "micro_bsz": _Name("MICRO_BSZ")}
    found["total_steps"] = _Name("STEPS")
    if data.valid is not None:
        found |= {"valid_folder": str(data.valid), "valid_every": max(1, proposal.steps // 20)}
    if data.tokenizer is not None:
        found["tokenizer"] = str(data.tokenizer)
    return found


def _warmup(steps: int) -> int:
    """A hundredth of the run, but not so few that AdamW's second moment is not yet known."""
    return min(max(steps // 100, 100), max(1, steps // 10))


def _per_node(proposal: Proposal) -> int:
    device = proposal.hardware.device
    return proposal.hardware.ranks if device is None else min(proposal.hardware.ranks, device.gpus_per_node)
