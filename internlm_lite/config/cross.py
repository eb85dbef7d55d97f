"""Cross checks: keys that are valid one by one but contradict each other. Each check yields a Problem naming them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from packaging.version import InvalidVersion, Version

from internlm_lite.config.engine_checks import engine_problems
from internlm_lite.config.keys import known_keys, value_of
from internlm_lite.config.layout_checks import heads_problems, row_problems, world_problems
from internlm_lite.config.model_checks import model_problems
from internlm_lite.config.pair_checks import pair_problems
from internlm_lite.config.paths import (
    S3_FORM,
    is_folder,
    normalize_path,
    webhook_format,
    webhook_problem,
    without_password,
)
from internlm_lite.config.plain import shown
from internlm_lite.config.problems import Problem
from internlm_lite.config.ranges import parse_rampup, parse_skip_batches
from internlm_lite.config.schema import AlertsConfig, CkptConfig, Config, LrSchedulerConfig, OptimizerConfig, Section
from internlm_lite.config.stage_checks import epoch_problems, length_problems, stage_problems
from internlm_lite.config.task_checks import task_problems
from internlm_lite.config.zero_checks import zero_problems
from internlm_lite.errors import ConfigError

_STAGES = "parallel.pipeline.size"
_SCHEDULE = "parallel.pipeline.schedule"
_CHUNKS = "model.num_chunks"
_OVERLAP = "parallel.pipeline.interleaved_overlap"
_NEVER_IN_PROMPTS = re.compile("[\x00\ud800-\udfff]")
_NEVER_IN_NAMES = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
_UNREAD = {
    "lion": ("adam.adam_eps",),
    "sgd": ("adam.adam_beta1", "adam.adam_beta2", "adam.adam_beta2_c", "adam.adam_eps", "beta2_scheduler.c"),
}
"""Keys of AdamW that other update rules have no use for."""
_OF_KIND = {"wsd": ("decay_steps", "decay_ratio", "decay_shape"), "steps": ("step_factors",)}
"""lr_scheduler.kind -> keys of `lr_scheduler` that only it reads."""
_OF_MUON = ("nesterov", "ns_steps", "ns_dtype", "muon_lr", "muon_weight_decay", "update_scale")
"""Keys of `optimizer` that no other rule reads."""
_MOST = {
    "ckpt.s3.deadline_seconds": 10**6,
    "data.micro_bsz": 2**31 - 1,
    "data.micro_num": 10**6,
    "data.row_pairs": 10**6,
    "data.seq_len": 2**31 - 1,
    "data.source_seq_len": 2**31 - 1,
    "data.epochs": 10**9,
    "data.total_steps": 10**12,
    "data.total_tokens": 2**62,
    "data.valid_batches": 10**9,
    "data.valid_micro_num": 10**6,
    "data.valid_train_batches": 10**9,
    "evaluation.every": 10**12,
    "evaluation.limit": 10**9,
    "evaluation.max_tokens": 2**31 - 1,
    "evaluation.num_fewshot": 10**6,
    "guard.spike_window": 10**6,
    "hybrid_zero_optimizer.reduce_bucket_size": 2**40,
    "lr_scheduler.total_steps": 10**12,
    "model.hidden_size": 2**20,
    "model.max_position_embeddings": 2**31 - 1,
    "model.mlp_ratio": 1024,
    "model.multiple_of": 2**20,
    "model.num_attention_heads": 2**20,
    "model.num_chunks": 10**4,
    "model.num_encoder_layers": 2**11,
    "model.num_layers": 2**11,
    "model.sliding_window": 2**31 - 1,
    "model.source_vocab_size": 2**31 - 1,
    "model.vocab_size": 2**31 - 1,
    "monitor.alerts.silent_seconds": 10**9,
    "monitor.report_every_seconds": 10**9,
    "monitor.sample_tokens": 10**6,
    "parallel.context.size": 10**6,
    "parallel.tensor": 10**6,
    _STAGES: 10**6,
}
"""Far above every run; larger values would fill the memory, or overflow, before anything is checked."""


def cross_problems(config: Config, world_size: int | None) -> Iterator[Problem]:
    """A Problem for each contradiction between keys. `world_size` None: checks that need it are skipped."""
    odd = [*_texts(config), *_sizes(config)]
    if odd:
        yield from odd
        return
    if world_size is not None:
        yield from world_problems(config, world_size)
    yield from model_problems(config)
    yield from _pipeline(config)
    yield from zero_problems(config)
    yield from row_problems(config)
    yield from heads_problems(config)
    yield from _precision(config)
    yield from length_problems(config)
    yield from stage_problems(config, _of_rows)
    yield from _curves(config)
    yield from _rule(config)
    yield from engine_problems(config)
    yield from _evaluation(config)
    yield from _batches(config)
    yield from _data(config)
    yield from _ckpt(config.ckpt)
    yield from _guard(config)
    yield from _alerts(config.monitor.alerts)


def _texts(config: Config) -> Iterator[Problem]:
    """Paths and names that no file system or terminal takes, and paths of what can be read without end."""
    for key in known_keys():
        value = value_of(config, key)
        texts = list(_texts_in(value))
        never = _NEVER_IN_PROMPTS if key == "monitor.sample_prompts" else _NEVER_IN_NAMES
        for text in texts:
            if never.search(text):
                yield Problem((key,), f"found {shown(text)}, expected text without control characters; change it")
            elif os.path.exists(text) and not (os.path.isfile(text) or os.path.isdir(text)):
                yield Problem((key,), f"found {shown(text)}, a pipe, device or socket; expected a file or a folder")


def _texts_in(value: Any) -> Iterator[str]:
    """A text, or those of a list and of the dicts in it, whose keys are no keys of the config by themselves."""
    if isinstance(value, str):
        yield value
    for inner in value if isinstance(value, list) else ():
        yield from _texts_in(list(inner.model_dump().values()) if isinstance(inner, Section) else inner)


def _sizes(config: Config) -> Iterator[Problem]:
    for key, most in _MOST.items():
        value = value_of(config, key)
        if isinstance(value, int | float) and value > most:
            yield Problem((key,), f"found {value}, expected at most {most}; change the value")


def _pipeline(config: Config) -> Iterator[Problem]:
    stages, chunks = config.parallel.pipeline.size, config.model.num_chunks
    if config.model.num_blocks < stages * chunks:
        both = " of both sides" * bool(config.model.num_encoder_layers)
        yield Problem(
            ("model.num_layers", _STAGES, _CHUNKS),
            f"found {config.model.num_blocks}{both}, expected at least {_STAGES} {stages} * {_CHUNKS} {chunks} "
            f"= {stages * chunks}, a layer for each; change one of them",
        )
    if stages == 1 and chunks > 1:
        yield Problem(
            (_CHUNKS, _STAGES), f"found {chunks} with {_STAGES} 1; chunks are stages of a pipeline: set it to 1"
        )
    elif stages == 1 and config.parallel.pipeline.schedule is not None:
        yield Problem(
            (_SCHEDULE, _STAGES),
            f'found "{config.schedule}" with {_STAGES} 1; remove it, or set {_STAGES} to 2 or more',
        )
    else:
        yield from _schedule(config)


def _schedule(config: Config) -> Iterator[Problem]:
    pipeline, chunks, micro_num = config.parallel.pipeline, config.model.num_chunks, config.data.micro_num
    expected = {"1f1b": chunks == 1, "interleaved": chunks > 1, "zbv": chunks == 2}
    if not expected[config.schedule]:
        number = {"1f1b": "1", "interleaved": "2 or more", "zbv": "2"}[config.schedule]
        yield Problem(
            (_CHUNKS, _SCHEDULE),
            f'found {chunks}, expected {number} with {_SCHEDULE} "{config.schedule}"; change one of them',
        )
    elif config.schedule == "zbv" and not pipeline.interleaved_overlap:
        # torch 2.13 would then receive hidden states and gradients of one neighbour in a different order than sent.
        yield Problem(
            (_OVERLAP, _SCHEDULE),
            f'found False with {_SCHEDULE} "zbv", which always receives early; set it to True, or take "interleaved"',
        )
    elif config.schedule == "zbv" and (torch := _old_torch()):
        # It sends from one stage to the next on the same rank, which gloo refuses.
        yield Problem(
            (_SCHEDULE,),
            f'found "zbv" with torch {torch}, expected torch 2.13 or newer; install it, or take "interleaved"',
        )
    elif config.schedule == "interleaved" and not pipeline.interleaved_overlap and (torch := _old_torch()):
        yield Problem((_OVERLAP,), f"found False with torch {torch}, expected torch 2.13 or newer; set it to True")
    elif config.schedule == "interleaved" and micro_num % pipeline.size:
        yield Problem(
            ("data.micro_num", _STAGES, _CHUNKS),
            f"found {micro_num}, expected a multiple of {_STAGES} {pipeline.size}, which interleaved chunks need; "
            f"change one of them, or set {_CHUNKS} to 1",
        )


def _old_torch() -> Version | None:
    """The installed version of torch, read without importing it, if it is known to be older than 2.13."""
    try:
        found = Version(version("torch") or "")
    except (PackageNotFoundError, InvalidVersion):
        return None
    return found if found.release < (2, 13) else None


def _of_rows(config: Config) -> Iterator[Problem]:
    """Problems that the length of a row and the rotary base may make."""
    yield from row_problems(config)
    yield from model_problems(config)


def _precision(config: Config) -> Iterator[Problem]:
    scaler = config.grad_scaler
    if config.model.torch_dtype_name == "float16" and scaler is None:
        yield Problem(
            ("model.dtype", "grad_scaler"),
            f'found "{config.model.dtype}" without grad_scaler; add grad_scaler = dict(fp16=dict(initial_scale=2**16)),'
            ' or use "torch.bfloat16"',
        )
    if config.hybrid_zero_optimizer.grad_dtype == "torch.tf32":
        yield Problem(
            ("hybrid_zero_optimizer.grad_dtype",),
            'found "torch.tf32", which no tensor is stored in; use "torch.float32"',
        )
    if scaler is None:
        return
    start, low, high = scaler.fp16.initial_scale, scaler.fp16.min_scale, scaler.max_scale
    if (low is not None and start < low) or (high is not None and start > high):
        yield Problem(
            ("grad_scaler.fp16.initial_scale", "grad_scaler.fp16.min_scale", "grad_scaler.max_scale"),
            f"found {start:g}, expected at least grad_scaler.fp16.min_scale {_number(low)} "
            f"and at most grad_scaler.max_scale {_number(high)}; change one of them",
        )


def _number(value: float | None) -> str:
    return "None" if value is None else f"{value:g}"


def _curves(config: Config) -> Iterator[Problem]:
    curve = config.lr_scheduler
    ways = ("warmup_ratio", "warmup_steps", "warmup_tokens")
    set_ones = [f"lr_scheduler.{name}" for name in ways if getattr(curve, name) is not None]
    given, warmup = next(reversed(set_ones), "lr_scheduler.warmup_ratio"), curve.num_warmup_steps
    if len(set_ones) > 1:
        found, other = value_of(config, given), set_ones[0].partition(".")[2]
        text = f"found {found} beside {other} {value_of(config, set_ones[0])}; leave one of them out, or set it to None"
        yield Problem((given, set_ones[0]), text)
    elif curve.total_steps and curve.init_steps + warmup > curve.total_steps:
        yield Problem(
            ("lr_scheduler.init_steps", given, "lr_scheduler.total_steps"),
            f"found {curve.init_steps} + {warmup} warm-up steps, expected at most lr_scheduler.total_steps "
            f"{curve.total_steps}; lower init_steps or {given.partition('.')[2]}",
        )
    yield from _kind(curve)


def _kind(curve: LrSchedulerConfig) -> Iterator[Problem]:
    """Keys that belong to another kind of curve, and curves that do not fit their steps."""
    for kind, names in _OF_KIND.items():
        for name in names:
            value, default = getattr(curve, name), LrSchedulerConfig.model_fields[name].default
            if value != default and curve.kind != kind:
                keys = f"lr_scheduler.{name}", "lr_scheduler.kind"
                yield Problem(
                    keys, f'found {shown(value)} with kind "{curve.kind}", expected "{kind}"; change one of them'
                )
    if curve.kind == "noam" and curve.num_warmup_steps < 1 and not curve.warmup_tokens:
        text = 'found 0 warm-up steps with kind "noam", whose rate falls from their end; expected at least 1'
        yield Problem(("lr_scheduler.warmup_steps", "lr_scheduler.kind"), f"{text}: set it")
    if curve.kind == "steps":
        yield from _factors(curve)
    if curve.kind != "wsd":
        return
    if curve.decay_steps is not None and curve.decay_ratio is not None:
        keys = "lr_scheduler.decay_steps", "lr_scheduler.decay_ratio"
        yield Problem(keys, f"found {curve.decay_steps} beside decay_ratio {curve.decay_ratio}; leave one of them out")
    before = curve.init_steps + curve.num_warmup_steps
    if curve.total_steps and before + curve.num_decay_steps > curve.total_steps:
        keys = "lr_scheduler.decay_steps", "lr_scheduler.total_steps"
        text = f"found {curve.num_decay_steps} after {before} steps of warm-up, expected at most total_steps"
        yield Problem(keys, f"{text} {curve.total_steps} together; lower one of them")
    if curve.decay_shape == "exponential" and not curve.eta_min:
        keys = "lr_scheduler.eta_min", "lr_scheduler.decay_shape"
        yield Problem(keys, 'found 0 with "exponential", which never reaches it; expected more, such as adam.lr / 100')


def _factors(curve: LrSchedulerConfig) -> Iterator[Problem]:
    key, table = "lr_scheduler.step_factors", curve.step_factors
    if not table:
        yield Problem((key, "lr_scheduler.kind"), f"found {table}, expected [[step, factor], ...]; set it")
        return
    before = curve.init_steps + curve.num_warmup_steps - 1.0
    for step, factor in table:
        if step != int(step) or step <= before or factor < 0:
            text = f"found [{step:g}, {factor:g}], expected a whole step above {before:g} and a factor of at least 0"
            yield Problem((key,), f"{text}: steps ascend, after the warm-up")
        before = step


def _rule(config: Config) -> Iterator[Problem]:
    rule = config.optimizer
    if rule.momentum and rule.name not in ("sgd", "muon"):
        keys = "optimizer.momentum", "optimizer.name"
        yield Problem(keys, f'found {rule.momentum} with "{rule.name}", expected "sgd" or "muon"; change one of them')
    for name in _OF_MUON if rule.name != "muon" else ():
        value, keys = getattr(rule, name), (f"optimizer.{name}", "optimizer.name")
        if value != OptimizerConfig.model_fields[name].get_default():
            yield Problem(
                keys, f'found {shown(value)} with "{rule.name}", expected "muon"; remove it, or change the rule'
            )
    if rule.moments == "bf16" and rule.name == "muon":
        keys = "optimizer.moments", "optimizer.name"
        yield Problem(keys, 'found "bf16" with "muon", whose momentum is fp32; leave moments out, or change the rule')
    for index, group in enumerate(rule.groups):
        if group.betas is not None and rule.name == "sgd":
            key = f"optimizer.groups[{index}].betas"
            text = f'found {group.betas} with optimizer.name "sgd", which does not read it'
            yield Problem((key, "optimizer.groups", "optimizer.name"), f"{text}; leave it out, or change the rule")
    for key in _UNREAD.get(rule.name, ()):
        value, default = value_of(config, key), known_keys()[key].get_default()
        if value != default:
            text = f'found {value:g} with optimizer.name "{rule.name}", which does not read it; expected {default:g}'
            yield Problem((key, "optimizer.name"), f"{text}; remove it, or change the rule")


def _evaluation(config: Config) -> Iterator[Problem]:
    data = config.data
    asked = {"data.valid_at_start": data.valid_at_start, "data.valid_train_batches": data.valid_train_batches}
    for key, value in {**asked, "ckpt.keep_best": config.ckpt.keep_best}.items():
        if value and not data.valid_every:
            why = "there are no evaluations; set data.valid_every"
            yield Problem((key, "data.valid_every"), f"found {value} with data.valid_every 0: {why}, or remove it")
    if config.ckpt.keep_best and not config.ckpt.enable_save_ckpt:
        text = "found True with ckpt.enable_save_ckpt=False; change one of them"
        yield Problem(("ckpt.keep_best", "ckpt.enable_save_ckpt"), text)
    yield from task_problems(config)


def _batches(config: Config) -> Iterator[Problem]:
    key, full = "data.rampup_batch_size", config.data.micro_num
    try:
        rampup = parse_rampup(config.data.rampup_batch_size)
    except ConfigError as error:
        yield Problem((key,), str(error))
    else:
        if rampup and (rampup.start > full or (full - rampup.start) % rampup.increment):
            yield Problem(
                (key, "data.micro_num"),
                f"found {shown(config.data.rampup_batch_size)}, which does not reach data.micro_num {full} from "
                f"{rampup.start} in steps of {rampup.increment}; change one of them",
            )
    try:
        parse_skip_batches(config.data.skip_batches)
    except ConfigError as error:
        yield Problem(("data.skip_batches",), str(error))


def _data(config: Config) -> Iterator[Problem]:
    data = config.data
    if data.weights is not None and data.train_folder is None:
        yield Problem(
            ("data.weights", "data.train_folder"), "found without data.train_folder; set it, or remove weights"
        )
    if data.weights == {}:
        yield Problem(("data.weights",), "found {}, expected the share of at least one data folder; remove it for None")
    if config.monitor.sample_prompts and data.tokenizer is None:
        yield Problem(
            ("monitor.sample_prompts", "data.tokenizer"), "found without data.tokenizer; set it, or remove the prompts"
        )
    if config.monitor.sample_every and not config.monitor.sample_prompts:
        yield Problem(
            ("monitor.sample_every", "monitor.sample_prompts"), "found without prompts; give some, or set it to 0"
        )
    yield from epoch_problems(config)
    yield from pair_problems(config)
    if not config.JOB_NAME.strip(". ") or "/" in config.JOB_NAME or not config.JOB_NAME.isprintable():
        expected = "expected the name of a folder: printable, no '/', not empty"
        yield Problem(("JOB_NAME",), f"found {shown(config.JOB_NAME)}, {expected}")


def _guard(config: Config) -> Iterator[Problem]:
    ckpt = config.ckpt
    saves = ckpt.enable_save_ckpt and (ckpt.checkpoint_every or ckpt.oss_snapshot_freq)
    if config.guard.spike == "rollback" and not saves and ckpt.load_ckpt_folder is None:
        yield Problem(
            ("guard.spike", "ckpt.enable_save_ckpt"),
            "found 'rollback' in a run without a checkpoint to go back to; set ckpt.enable_save_ckpt=True with "
            "ckpt.checkpoint_every or ckpt.oss_snapshot_freq, or guard.spike='skip'",
        )


def _ckpt(ckpt: CkptConfig) -> Iterator[Problem]:
    if ckpt.enable_save_ckpt and ckpt.save_ckpt_folder is None:
        yield Problem(
            ("ckpt.enable_save_ckpt", "ckpt.save_ckpt_folder"),
            "found True without ckpt.save_ckpt_folder; set the folder, or enable_save_ckpt=False",
        )
    elif ckpt.enable_save_ckpt and ckpt.oss_snapshot_freq and ckpt.snapshot_ckpt_folder is None:
        yield Problem(
            ("ckpt.oss_snapshot_freq", "ckpt.snapshot_ckpt_folder"),
            f"found {ckpt.oss_snapshot_freq} without ckpt.snapshot_ckpt_folder; set the folder, or oss_snapshot_freq=0",
        )
    both = {normalize_path(folder) for folder in (ckpt.save_ckpt_folder, ckpt.snapshot_ckpt_folder) if folder}
    if ckpt.save_ckpt_folder and ckpt.snapshot_ckpt_folder and len(both) == 1:
        yield Problem(
            ("ckpt.snapshot_ckpt_folder", "ckpt.save_ckpt_folder"),
            "found the same folder for both; expected two, for instance a folder snapshot inside ckpt.save_ckpt_folder",
        )
    if ckpt.load_ckpt_folder is not None and ckpt.load_model_only_folder is not None:
        yield Problem(
            ("ckpt.load_model_only_folder", "ckpt.load_ckpt_folder"),
            "found beside ckpt.load_ckpt_folder; a run starts from one of them: remove the other",
        )
    for name in ("save_ckpt_folder", "load_ckpt_folder", "load_model_only_folder", "snapshot_ckpt_folder"):
        folder = getattr(ckpt, name)
        inside = name == "snapshot_ckpt_folder" and folder and folder.startswith(f"{ckpt.save_ckpt_folder}/")
        if folder is not None and not inside and not is_folder(folder):
            yield Problem(
                (f"ckpt.{name}",),
                f"found {shown(without_password(folder))}, expected local:PATH, a plain path, or {S3_FORM}",
            )


def _alerts(alerts: AlertsConfig) -> Iterator[Problem]:
    if alerts.webhook is None:
        return
    if (problem := webhook_problem(alerts.webhook, insecure=alerts.insecure)) is not None:
        yield Problem(("monitor.alerts.webhook",), problem)
    elif alerts.format is None and webhook_format(alerts.webhook) is None:
        yield Problem(
            ("monitor.alerts.format", "monitor.alerts.webhook"),
            'found None, and the host of the webhook is not known; expected "feishu", or "slack" (others read it too)',
        )
