"""Aliases: keys of InternLM's and InternEvo's configs, each translated to keys of the schema with one note.

    parallel.tensor = dict(size=4, mode="mtp")                 ->  parallel.tensor = 4
    ckpt.load_ckpt_info = dict(path=P, content=("model",))     ->  ckpt.load_model_only_folder = P

A key without effect here is dropped, with a note that says why. A request for an unsupported feature is a problem.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from internlm_lite.config.foreign import NO_EFFECT, NO_EFFECT_IF, asks_for_nothing, missing_feature
from internlm_lite.config.keys import accepts_text, known_keys, section_of
from internlm_lite.config.paths import is_folder, is_s3, normalize_path
from internlm_lite.config.plain import shown
from internlm_lite.config.problems import Problem
from internlm_lite.config.source import DELETE, Layer

_RENAMED = {
    "use_fp32_norm": "model.use_fp32_norm",
    "hybrid_zero_optimizer.zero_overlap_communication": "hybrid_zero_optimizer.overlap_sync_grad",
    "model.o_bias": "model.out_bias",
    "model.add_unit_offset": "model.zero_centered_norm",
}
_MODELS: Mapping[str, Mapping[str, object]] = {
    "INTERNLM": {"model.no_bias": False},
    "INTERNLM2": {"model.no_bias": True},
    "INTERNLM2_PUBLIC": {"model.no_bias": True},
    "INTERNLM3": {"model.no_bias": True},
    "LLAMA": {"model.no_bias": True},
    "LLAMA2": {"model.no_bias": True},
    "QWEN2": {"model.no_bias": True, "model.qkv_bias": True},
}
_OTHER_MODELS = {
    "moe|mixtral|deepseek": "its blocks have experts",
    "llava|chameleon|vl$|dit": "it reads images",
    "gemma": "its MLP is GeGLU, and its embedding is scaled",
    "baichuan": "the rows of its head are normalised",
    "hf|huggingface": "it is built by transformers",
}
_LOADED = {"model", "optimizer", "scheduler", "sampler"}
_ALL, _NO_OPTIMIZER = ("all",), ("model", "sampler", "scheduler")
_WHOLE, _MODEL_ONLY = "ckpt.load_ckpt_folder", "ckpt.load_model_only_folder"
_WITHOUT_LIMITS = ("optimizer", "lr_scheduler", "ema")
"""Sections in which None is no limit that infinity could stand for, but another rate or momentum."""
_EVO_ALERT = {"enable_feishu_alert", "feishu_alert_address", "light_monitor_address", "alert_file_path"}
_OWN_FORMATS = (None, "internlm", "internevo", "normal")
_FROM_HF = "to make one of a Hugging Face folder: internlm-lite convert from-hf FOLDER OUT; then path=OUT"
_MODES = {
    None: "mtp",
    "none": "mtp",
    "origin_tp": "mtp",
    "megatron": "msp",
    "flash-attn": "fsp",
    "intern": "isp",
    "fstp": "isp",
}
"""Values of `sp` and `mode` of 2023, and what they were called later."""
_OVERLAPS = ("intern_overlap", "memory_pool")
_SAME = {
    "data.batch_size": "data.micro_num",
    "data.gradient_accumulation": "data.micro_num",
    "model.sequence_parallel": "parallel.sequence_parallel",
}


class Translation:
    """Rewrites one layer in place; collects notes about translated keys and problems with unsupported ones."""

    def __init__(self, layer: Layer, below: Layer) -> None:
        self.layer, self.below = layer, below
        self.notes: list[str] = []
        self.dropped: dict[str, str] = {}
        """Keys without effect here, and where they were written: they share a note."""
        self.problems: list[Problem] = []

    def replace(self, old: str, new: dict[str, Any], why: str = "") -> None:
        """Drop `old` and set the keys of `new` in its place."""
        value, origin = self.layer.drop(old)
        for key, new_value in new.items():
            self.layer.put(key, new_value, origin)
        meaning = ", ".join(f"{key}={new_value!r}" for key, new_value in new.items())
        understood = f"understood as {meaning}" if new else "understood, without effect here"
        self.notes.append(f"{origin}: {old}={shown(value)} {understood}{f': {why}' if why else ''}")

    def drop(self, key: str) -> None:
        self.dropped[key] = self.layer.drop(key)[1]

    def refuse(self, key: str, text: str) -> None:
        """Report a problem and drop the key, so that the schema does not report it too. Its origin is kept."""
        _, origin = self.layer.drop(key)
        self.layer.origins[key] = origin
        self.problems.append(Problem((key,), text))


def translate(layer: Layer, below: Layer) -> Translation:
    """Rewrite all aliases in `layer`, which will cover `below`. Idempotent."""
    t = Translation(layer, below)
    _placeholders(t)
    _model_type(t)
    _renamed(t)
    _foreign(t)
    for key in ("ckpt.load_ckpt_info", _WHOLE):
        if isinstance(layer.get(key), dict):
            _load_info(t, key)
        elif key != _WHOLE and layer.has(key):
            _no_load_info(t, key)
    if layer.has("ckpt.auto_resume"):
        folder = "the newest checkpoint in ckpt.save_ckpt_folder"
        meaning = f"go on from {folder}" if layer.get("ckpt.auto_resume") else f"leave {folder} alone"
        t.notes.append(
            f"{layer.origin('ckpt.auto_resume')}: ckpt.auto_resume={layer.get('ckpt.auto_resume')!r} "
            f"understood as {meaning}, unless --resume is given"
        )
    _parallel(t)
    if isinstance(layer.get("monitor.tensorboard"), dict):
        t.drop("monitor.tensorboard")
    _alert(t)
    if t.dropped:
        where = next(iter(t.dropped.values()))
        t.notes.append(f"{where}: understood, without effect here (docs/config.md says why): {', '.join(t.dropped)}")
    return t


def _renamed(t: Translation) -> None:
    for old, new in _RENAMED.items():
        if t.layer.has(old):
            t.replace(old, {new: t.layer.get(old)})
    if isinstance(t.layer.get("ckpt.load_given_ckpt"), bool):
        t.replace("ckpt.load_given_ckpt", {"ckpt.auto_resume": not t.layer.get("ckpt.load_given_ckpt")})


def _placeholders(t: Translation) -> None:
    """Empty texts, infinity and None ask for the default where they are no values themselves."""
    for key, field in known_keys().items():
        value, optional = t.layer.get(key), not field.is_required() and field.get_default() is None
        endless = value == float("inf") and key.partition(".")[0] not in _WITHOUT_LIMITS
        if optional and (endless or (value == "" and accepts_text(key))):
            t.replace(key, {key: None})
        elif value is None and t.layer.has(key) and not optional and (section_of(field) or field.default == ""):
            t.replace(key, {}, "the default holds")


def _foreign(t: Translation) -> None:
    """Keys of other frameworks: one note names those that change nothing; the others are refused by what they mean."""
    for key in list(_unknown_keys(t.layer.values)):
        value, feature = t.layer.get(key), missing_feature(key.rpartition(".")[2])
        accepted, why = NO_EFFECT_IF.get(key, ((), ""))
        same, said = _said_by(t, key)
        if key in NO_EFFECT or value in accepted or (same and value == said) or (accepted and value is None):
            t.drop(key)
        elif accepted:
            t.refuse(key, f"found {shown(value)}, expected {accepted[0]!r} or no such key; {why}")
        elif same and not t.layer.has(same):
            t.replace(key, {same: value})
        elif same:
            t.refuse(key, f"found {shown(value)}, but {same} is {shown(said)}: that one counts; remove this one")
        elif feature and asks_for_nothing(value):
            t.drop(key)
        elif feature:
            t.refuse(key, f"found {shown(value)}: {feature}")


def _said_by(t: Translation, key: str) -> tuple[str, Any]:
    """The key of ours that says the same as `key`, and its value; "" if there is none."""
    same = _SAME.get(key, "")
    written = t.layer.get(same) if t.layer.has(same) else t.below.get(same)
    return same, same and (known_keys()[same].default if written is None else written)


def _unknown_keys(values: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in values.items():
        key = f"{prefix}{name}"
        field = known_keys().get(key)
        if field is None and isinstance(name, str) and "." not in name and name != DELETE:
            yield key
        elif field is not None and section_of(field) is not None and isinstance(value, dict):
            yield from _unknown_keys(value, f"{key}.")


def _model_type(t: Translation) -> None:
    if not t.layer.has("model_type"):
        return
    found = t.layer.get("model_type")
    if not isinstance(found, str) or found not in _MODELS:
        text = f"found {shown(found)}, expected one of {', '.join(map(repr, _MODELS))}; only these are built"
        why = [why for names, why in _OTHER_MODELS.items() if re.search(names, str(found), re.IGNORECASE)]
        t.refuse("model_type", ": ".join([text, *why[:1]]))
    elif t.layer.has("model.no_bias"):
        t.replace("model_type", {}, "model.no_bias says which biases there are")
    else:
        t.replace("model_type", {key: value for key, value in _MODELS[found].items() if not t.layer.has(key)})


def _load_info(t: Translation, key: str) -> None:
    """dict(path, content, ckpt_type), merged key by key with the layers below; `content` selects our key."""
    written: dict[str, Any] = t.layer.get(key)
    info = written if written.get(DELETE) else {**_info_below(t.below), **written}
    content = info.get("content", "all")
    parts = (
        {content} if isinstance(content, str) else set(map(str, content)) if isinstance(content, Sequence) else set()
    )
    parts = _LOADED if parts == {"all"} else parts
    wrong = set(info) - {"path", "content", "ckpt_type", DELETE}
    path, kind = info.get("path", info or None), info.get("ckpt_type")
    if not wrong and path in (None, ""):
        _no_load_info(t, key)
    elif wrong or not isinstance(path, str):
        t.refuse(key, f"found {shown(written)}, expected a folder, or dict(path=..., content=..., ckpt_type=...)")
    elif t.layer.get("ckpt.auto_resume") is True and _is_missing(path):
        why = f"there is no folder {path!r}, and with auto_resume=True InternEvo never looks for it"
        t.replace(key, {_MODEL_ONLY: None, _WHOLE: None}, why)
    elif kind not in _OWN_FORMATS:
        text = f"found ckpt_type={shown(kind)}; only the checkpoints written here are read"
        first = "Meta's files become a Hugging Face folder by transformers' convert_llama_weights_to_hf; "
        t.refuse(key, f"{text}; {first if kind == 'llama' else ''}{_FROM_HF}")
    elif parts == {"model"}:
        _give_way(t, key)
        t.replace(key, {_MODEL_ONLY: info["path"], _WHOLE: None})
    elif parts in (_LOADED, set(_NO_OPTIMIZER)):
        _give_way(t, key)
        t.replace(key, {_WHOLE: info["path"], "ckpt.load_optimizer": parts == _LOADED, _MODEL_ONLY: None})
    else:
        t.refuse(
            key,
            f"found content={shown(content)}, expected ('model',), {_ALL} or {_NO_OPTIMIZER}: "
            "a run starts from weights alone, or goes on with everything, or with everything but the optimizer",
        )


def _is_missing(path: str) -> bool:
    return is_folder(path) and not is_s3(path) and not os.path.exists(normalize_path(path))


def _info_below(below: Layer) -> dict[str, Any]:
    """The load keys of the layers below, in the form of `load_ckpt_info`; empty if they load nothing."""
    if below.get(_MODEL_ONLY) is not None:
        return {"path": below.get(_MODEL_ONLY), "content": ("model",)}
    if below.get(_WHOLE) is not None:
        content = _NO_OPTIMIZER if below.get("ckpt.load_optimizer") is False else _ALL
        return {"path": below.get(_WHOLE), "content": content}
    return {}


def _give_way(t: Translation, key: str) -> None:
    """If a layer has several of these keys, InternLM uses `load_ckpt_info` and ignores the others."""
    for other in (_WHOLE, _MODEL_ONLY):
        if other != key and t.layer.get(other) is not None:
            t.replace(other, {}, f"{key} goes before it")


def _no_load_info(t: Translation, key: str) -> None:
    """Nothing to load: the other keys of this layer decide, and those of layers below are reset."""
    if t.layer.get(key) is None or isinstance(t.layer.get(key), dict):
        t.replace(key, {folder: None for folder in (_MODEL_ONLY, _WHOLE) if not t.layer.has(folder)})
    else:
        t.refuse(key, f"found {shown(t.layer.get(key))}, expected dict(path=..., content=..., ckpt_type=...) or None")


def _zero1(t: Translation, zero1: dict[str, Any]) -> None:
    key, fsdp, stage = "parallel.zero1", zero1.get("fsdp") or False, t.layer.get("parallel.zero_stage")
    if not isinstance(fsdp, bool):
        t.refuse(key, f"found fsdp={shown(fsdp)}, expected True or False; write parallel.zero_stage=3, or remove it")
    elif fsdp and stage not in (None, 3):
        t.refuse(key, f"found fsdp=True, which is parallel.zero_stage=3, beside {shown(stage)}; remove one of them")
    else:
        t.replace(key, {key: zero1.get("size", -1), **({"parallel.zero_stage": 3} if fsdp else {})})


def _parallel(t: Translation) -> None:
    zero1, tensor = t.layer.get("parallel.zero1"), t.layer.get("parallel.tensor")
    if isinstance(zero1, dict) and _has_only(t, "parallel.zero1", ("size", "fsdp")):
        _zero1(t, zero1)
    if isinstance(tensor, dict) and _has_only(t, "parallel.tensor", ("size", "mode", "sp", *_OVERLAPS)):
        _tensor(t, tensor)
    _pipeline(t)
    context = t.layer.get("parallel.context")
    if isinstance(context, int) and not isinstance(context, bool):
        t.replace("parallel.context", {"parallel.context.size": context})
    weight = t.layer.get("parallel.weight")
    if t.layer.has("parallel.weight"):
        if asks_for_nothing(weight):
            t.drop("parallel.weight")
        else:
            t.refuse(
                "parallel.weight",
                f"found {shown(weight)}, expected size 1: weight parallelism is not supported; parallel.zero_stage=3 "
                "spreads the weights over the ranks of parallel.zero1, too, and gathers them block by block",
            )


def _tensor(t: Translation, tensor: dict[str, Any]) -> None:
    size, name = tensor.get("size", 1), "mode" if tensor.get("mode") else "sp"
    mode = tensor.get(name)
    mode = _MODES.get(mode, mode) if isinstance(mode, str | None) else mode
    new = {"parallel.tensor": size}
    if mode == "mtp" or size == 1:
        t.replace("parallel.tensor", new)
    elif mode in ("msp", "fsp"):
        t.replace("parallel.tensor", {**new, "parallel.sequence_parallel": True})
    else:
        isp = (
            ": weight parallelism is not supported",
            "'msp', or parallel.zero_stage=3 without tensor ranks, is nearest",
        )
        meaning, nearest = isp if mode == "isp" else ("", "'msp' is nearest")
        text = f"found {name}={shown(tensor[name])}{meaning}, expected mode='mtp', 'msp' or 'fsp'; {nearest}"
        t.refuse("parallel.tensor", text)


def _pipeline(t: Translation) -> None:
    pipeline = t.layer.get("parallel.pipeline")
    if isinstance(pipeline, int) and not isinstance(pipeline, bool):
        t.replace("parallel.pipeline", {"parallel.pipeline.size": pipeline})
    elif t.layer.has("parallel.pipeline.mode"):
        mode = t.layer.get("parallel.pipeline.mode")
        name = mode.lower() if isinstance(mode, str) else mode
        if name == "1f1b":
            t.replace("parallel.pipeline.mode", {}, "1F1B is the schedule; model.num_chunks > 1 interleaves it")
        elif name == "zbv":
            t.replace("parallel.pipeline.mode", {"parallel.pipeline.schedule": "zbv"})
        else:
            t.refuse("parallel.pipeline.mode", f"found {shown(mode)}, expected '1f1b', 'zbv' or no such key")


def _has_only(t: Translation, key: str, names: Sequence[str]) -> bool:
    """Whether the dict at `key` has only entries called `names`; otherwise it is refused."""
    found = t.layer.get(key)
    other = set(found) - set(names)
    if other:
        t.refuse(key, f"found {shown(found)}, expected a number, or dict({', '.join(name + '=...' for name in names)})")
    return not other


def _alert(t: Translation) -> None:
    """InternEvo's Feishu alerts. The address is a secret: no note or problem contains it."""
    if t.layer.has("alert_address"):
        address, origin = t.layer.drop("alert_address")
        t.layer.put("monitor.alert", {"feishu_alert_address": address or None}, origin)
    alert = t.layer.get("monitor.alert")
    if not isinstance(alert, dict) or not set(alert) <= _EVO_ALERT:
        return  # an unknown key, probably meant to be monitor.alerts
    address = alert.get("feishu_alert_address")
    new: dict[str, str] = {}
    if alert.get("light_monitor_address"):
        t.refuse("monitor.alert", "found light_monitor_address; there is no heartbeat to send: remove it")
        return
    if alert.get("enable_feishu_alert", address):
        if not isinstance(address, str):
            t.refuse("monitor.alert", "found no feishu_alert_address; add the address, or enable_feishu_alert=False")
            return
        new = {"monitor.alerts.webhook": address, "monitor.alerts.format": "feishu"}
    _, origin = t.layer.drop("monitor.alert")
    for key, value in new.items():
        t.layer.put(key, value, origin)
    t.notes.append(f"{origin}: monitor.alert understood as {', '.join(new) or 'no webhook'}")
