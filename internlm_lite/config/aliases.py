"""Aliases: keys of InternLM's and InternEvo's configs, each translated to keys of the schema with one note.

    parallel.tensor = dict(size=4, mode="mtp")                 ->  parallel.tensor = 4
    ckpt.load_ckpt_info = dict(path=P, content=("model",))     ->  ckpt.load_model_only_folder = P

A key without effect here is dropped, with a note that says why. A request for an unsupported feature is a problem.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from internlm_lite.config.problems import Problem
from internlm_lite.config.source import DELETE, Layer

_RENAMED = {
    "use_fp32_norm": "model.use_fp32_norm",
    "hybrid_zero_optimizer.zero_overlap_communication": "hybrid_zero_optimizer.overlap_sync_grad",
}
_NO_EFFECT = {
    "ckpt.universal_ckpt": "every checkpoint loads into every layout",
    "data.num_worker": "one thread prepares the next batch",
    "data.empty_cache_and_diag_interval": "the memory allocator's cache is left alone during training",
    "data.diag_outlier_ratio": "there is no periodic diagnosis of slow ranks",
    "model.mlp_layer_fusion": "the result is the same with and without",
    "metric_dtype": "metrics are always summed in float32",
    "generation": "training does not generate with these; tools/generate.py takes them as arguments",
}
_ONLY = {
    "data.type": ("tokenized", "training data are tokenised folders: run tools/tokenizer.py first"),
    "data.use_packed_dataset": (True, "training rows are always packed"),
    "model.qk_interleaved": (False, "rotary embedding pairs element i with i + head_dim/2: convert such weights first"),
}
_BIAS_FREE = {"INTERNLM": False, "INTERNLM2": True, "INTERNLM2_PUBLIC": True, "LLAMA": True, "LLAMA2": True}
_LOADED = {"model", "optimizer", "scheduler", "sampler"}
_ALL, _NO_OPTIMIZER = ("all",), ("model", "sampler", "scheduler")
_WHOLE, _MODEL_ONLY = "ckpt.load_ckpt_folder", "ckpt.load_model_only_folder"
_EVO_ALERT = {"enable_feishu_alert", "feishu_alert_address", "light_monitor_address", "alert_file_path"}
_OWN_FORMATS = (None, "internlm", "internevo", "normal")


class Translation:
    """Rewrites one layer in place; collects notes about translated keys and problems with unsupported ones."""

    def __init__(self, layer: Layer, below: Layer) -> None:
        self.layer, self.below = layer, below
        self.notes: list[str] = []
        self.problems: list[Problem] = []

    def replace(self, old: str, new: dict[str, Any], why: str = "") -> None:
        """Drop `old` and set the keys of `new` in its place."""
        value, origin = self.layer.drop(old)
        for key, new_value in new.items():
            self.layer.put(key, new_value, origin)
        meaning = ", ".join(f"{key}={new_value!r}" for key, new_value in new.items())
        understood = f"understood as {meaning}" if new else "understood, without effect here"
        self.notes.append(f"{origin}: {old}={value!r} {understood}{f': {why}' if why else ''}")

    def refuse(self, key: str, text: str) -> None:
        """Report a problem and drop the key, so that the schema does not report it too. Its origin is kept."""
        _, origin = self.layer.drop(key)
        self.layer.origins[key] = origin
        self.problems.append(Problem((key,), text))


def translate(layer: Layer, below: Layer) -> Translation:
    """Rewrite all aliases in `layer`, which will cover `below`. Idempotent."""
    t = Translation(layer, below)
    _renamed(t)
    _without_effect(t)
    _model_type(t)
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
        t.replace("monitor.tensorboard", {}, "there is one queue for all sinks")
    _alert(t)
    return t


def _renamed(t: Translation) -> None:
    for old, new in _RENAMED.items():
        if t.layer.has(old):
            t.replace(old, {new: t.layer.get(old)})
    if isinstance(t.layer.get("ckpt.load_given_ckpt"), bool):
        t.replace("ckpt.load_given_ckpt", {"ckpt.auto_resume": not t.layer.get("ckpt.load_given_ckpt")})


def _without_effect(t: Translation) -> None:
    for key, why in _NO_EFFECT.items():
        if t.layer.has(key):
            t.replace(key, {}, why)
    for key, (value, why) in _ONLY.items():
        if t.layer.has(key):
            if t.layer.get(key) == value:
                t.replace(key, {}, why)
            else:
                t.refuse(key, f"found {t.layer.get(key)!r}, expected {value!r} or no such key; {why}")


def _model_type(t: Translation) -> None:
    if not t.layer.has("model_type"):
        return
    found = t.layer.get("model_type")
    if not isinstance(found, str) or found not in _BIAS_FREE:
        t.refuse(
            "model_type", f"found {found!r}, expected one of {', '.join(map(repr, _BIAS_FREE))}; only these are built"
        )
    elif t.layer.has("model.no_bias"):
        t.replace("model_type", {}, "model.no_bias says which biases there are")
    else:
        t.replace("model_type", {"model.no_bias": _BIAS_FREE[found]})


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
    if wrong or not isinstance(info.get("path"), str):
        t.refuse(key, f"found {written!r}, expected a folder, or dict(path=..., content=..., ckpt_type=...)")
    elif info.get("ckpt_type") not in _OWN_FORMATS:
        t.refuse(key, f"found ckpt_type={info['ckpt_type']!r}; only the checkpoints written here are read")
    elif parts == {"model"}:
        _give_way(t, key)
        t.replace(key, {_MODEL_ONLY: info["path"], _WHOLE: None})
    elif parts in (_LOADED, set(_NO_OPTIMIZER)):
        _give_way(t, key)
        t.replace(key, {_WHOLE: info["path"], "ckpt.load_optimizer": parts == _LOADED, _MODEL_ONLY: None})
    else:
        t.refuse(
            key,
            f"found content={content!r}, expected ('model',), {_ALL} or {_NO_OPTIMIZER}: "
            "a run starts from weights alone, or goes on with everything, or with everything but the optimizer",
        )


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
    """None: the other keys of this layer decide, and those of layers below are reset."""
    if t.layer.get(key) is None:
        t.replace(key, {folder: None for folder in (_MODEL_ONLY, _WHOLE) if not t.layer.has(folder)})
    else:
        t.refuse(key, f"found {t.layer.get(key)!r}, expected dict(path=..., content=..., ckpt_type=...) or None")


def _parallel(t: Translation) -> None:
    zero1, tensor = t.layer.get("parallel.zero1"), t.layer.get("parallel.tensor")
    if isinstance(zero1, dict) and _has_only(t, "parallel.zero1", ("size", "fsdp")):
        if zero1.get("fsdp"):
            t.refuse("parallel.zero1", f"found {zero1!r}: fsdp is not available; write fsdp=False")
        else:
            t.replace("parallel.zero1", {"parallel.zero1": zero1.get("size", -1)})
    if isinstance(tensor, dict) and _has_only(t, "parallel.tensor", ("size", "mode")):
        mode = tensor.get("mode", "mtp")
        new = {"parallel.tensor": tensor.get("size", 1)}
        if mode in ("msp", "fsp"):
            t.replace("parallel.tensor", {**new, "parallel.sequence_parallel": True})
        elif mode == "mtp" or tensor.get("size", 1) == 1:
            t.replace("parallel.tensor", new)
        else:
            t.refuse("parallel.tensor", f"found mode={mode!r}, expected 'mtp', 'msp' or 'fsp'; write mode='mtp'")
    _pipeline(t)
    weight = t.layer.get("parallel.weight")
    if t.layer.has("parallel.weight"):
        if (weight.get("size", 1) if isinstance(weight, dict) else weight) in (1, None):
            t.replace("parallel.weight", {}, "weights are not spread")
        else:
            t.refuse("parallel.weight", f"found {weight!r}, expected size 1: use parallel.tensor or parallel.pipeline")


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
            t.refuse("parallel.pipeline.mode", f"found {mode!r}, expected '1f1b', 'zbv' or no such key")


def _has_only(t: Translation, key: str, names: Sequence[str]) -> bool:
    """Whether the dict at `key` has only entries called `names`; otherwise it is refused."""
    found = t.layer.get(key)
    other = set(found) - set(names)
    if other:
        t.refuse(key, f"found {found!r}, expected a number, or dict({', '.join(name + '=...' for name in names)})")
    return not other


def _alert(t: Translation) -> None:
    """InternEvo's Feishu alerts. The address is a secret: no note or problem contains it."""
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
