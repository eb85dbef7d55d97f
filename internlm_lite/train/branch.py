"""Cooldown branches: runs that let the learning rate of another run decay from one of its checkpoints.

    trunk    warm-up | stable ......... S ......... stable ...     checkpoints in FOLDER
    branch                               \\ decay of N steps        in FOLDER-branch-S-N-SHAPE

A branch is an ordinary run with the keys of `branch_overrides`: the trunk run with these keys from its first step would
go through the same states, bit by bit.
"""

from __future__ import annotations

from typing import Any

from internlm_lite.checkpoint.format.catalog import Found
from internlm_lite.checkpoint.load.locate import is_save_folder, locate, open_at
from internlm_lite.checkpoint.storage.open import open_storage
from internlm_lite.config.schema import Config, LrSchedulerConfig
from internlm_lite.errors import ConfigError

_STABLE_KINDS = ("wsd", "constant")


def branch_overrides(config: Config, path: str, decay_steps: int) -> list[str]:
    """Overrides of `config`, as on the command line, that let the run decay in `decay_steps` steps from the checkpoint
    at `path`. The warm-up is the checkpoint's, eta_min and decay_shape are those of `config`.

    Raises ConfigError if the checkpoint is not of the stable phase of a run with the same adam.lr, CheckpointError
    if there is none.
    """
    s3 = config.ckpt.s3
    if is_save_folder(path, s3):
        raise ConfigError(
            f"--branch-from {path}: expected one checkpoint, not a folder of them; add its step: {path}/100"
        )
    root, name = locate(path, s3)
    found = open_at(open_storage(root, s3), name)
    theirs, state = found.config(), found.manifest.state
    if "train" not in state:
        raise ConfigError(f"--branch-from {path}: it holds weights alone; expected a checkpoint that training wrote")
    done = int(state["optimizer"]["good_steps"]) + theirs.lr_scheduler.last_epoch + 1
    _require_stable(path, found, theirs.lr_scheduler, done)
    if theirs.adam.lr != config.adam.lr:
        raise ConfigError(
            f"--branch-from {path}: adam.lr is {config.adam.lr:g} now and was {theirs.adam.lr:g} then, so the rate "
            f"would jump; expected the same: set adam.lr={theirs.adam.lr:g}"
        )
    shape = config.lr_scheduler.decay_shape
    keys = _curve_keys(theirs.lr_scheduler, done, decay_steps)
    keys |= {"data.total_steps": found.step + decay_steps, "data.epochs": None, "data.total_tokens": None}
    keys |= {"ckpt.load_optimizer": True}
    keys |= {"ckpt.load_ckpt_folder": path if name is None else f"{root}/{name.commit}"}
    keys |= {"ckpt.load_model_only_folder": None, "ckpt.allow_changed_schedule": True}
    if config.ckpt.save_ckpt_folder is not None:
        folder = f"{config.ckpt.save_ckpt_folder.rstrip('/')}-branch-{found.step}-{decay_steps}-{shape}"
        keys |= {"ckpt.save_ckpt_folder": folder, "ckpt.snapshot_ckpt_folder": f"{folder}/snapshot"}
    return [f"{key}={value!r}" for key, value in keys.items()]


def _require_stable(path: str, found: Found, curve: LrSchedulerConfig, done: int) -> None:
    """Raises ConfigError unless all of `done` updates after the warm-up were at the peak."""
    start, stop = curve.init_steps + curve.num_warmup_steps, curve.total_steps - curve.num_decay_steps
    expected = f"expected one of the stable phase of a run with lr_scheduler.kind {' or '.join(_STABLE_KINDS)}"
    if curve.kind not in _STABLE_KINDS:
        problem = f'was trained with lr_scheduler.kind "{curve.kind}", which has no stable phase; {expected}'
    elif done < start:
        problem = f"is in its warm-up, {done} of {start} steps; {expected}, here of step {start} or later"
    elif curve.kind == "wsd" and done > stop + 1:
        problem = f"is in its decay phase, which began with step {stop}; {expected}, here of step {start} to {stop}"
    else:
        return
    raise ConfigError(f"--branch-from {path}: checkpoint {found.name} {problem}")


def _curve_keys(theirs: LrSchedulerConfig, done: int, decay_steps: int) -> dict[str, Any]:
    """The keys of `lr_scheduler`: the trunk's curve for `done` updates, then the decay."""
    curve: dict[str, Any] = {
        "kind": "wsd",
        "total_steps": done + decay_steps,
        "decay_steps": decay_steps,
        "decay_ratio": None,
        "step_factors": None,
        "warmup_steps": theirs.num_warmup_steps,
        "warmup_ratio": None,
        "warmup_tokens": None,
        "warmup_from_zero": theirs.warmup_from_zero,
        "init_steps": theirs.init_steps,
        "last_epoch": theirs.last_epoch,
    }
    return {f"lr_scheduler.{key}": value for key, value in curve.items()}
