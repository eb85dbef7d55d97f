"""The checkpoints of a run: its save folders, their contents, and resuming from them.

checkpoint_every   -> milestones in save_ckpt_folder            --resume auto: the newest of both folders,
oss_snapshot_freq  -> snapshots in snapshot_ckpt_folder                        else load_ckpt_folder,
the end            -> a final one in save_ckpt_folder                          else load_model_only_folder

control.py decides when a checkpoint is due and of which kind; checkpoint/ writes and reads it.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from internlm_lite.checkpoint.format import catalog
from internlm_lite.checkpoint.format.catalog import Found
from internlm_lite.checkpoint.format.manifest import Kind, Manifest
from internlm_lite.checkpoint.format.weight_roles import Weights
from internlm_lite.checkpoint.load.checkpoint_loader import Left, Restored
from internlm_lite.checkpoint.load.compare import Wanted
from internlm_lite.checkpoint.load.locate import find_step
from internlm_lite.checkpoint.manager import CheckpointManager
from internlm_lite.checkpoint.save.saver import SaveOptions
from internlm_lite.checkpoint.save.write_job import Saved
from internlm_lite.checkpoint.storage.base import Storage
from internlm_lite.config.masking import masked
from internlm_lite.config.paths import normalize_path
from internlm_lite.config.render_config import resolved
from internlm_lite.config.schema import CkptConfig, Config
from internlm_lite.errors import CheckpointError, ConfigError, InternLMError, StorageError
from internlm_lite.mesh.consensus import on_main
from internlm_lite.mesh.layout import LocalShard
from internlm_lite.mesh.mesh import Mesh
from internlm_lite.optim.average import ROLE
from internlm_lite.optim.rule_change import counters_left, rule_change, without
from internlm_lite.train.changes import (
    LastRun,
    batch_keys,
    data_changes,
    horizon_moved,
    later_stages,
    schedule_change,
)
from internlm_lite.train.reporter import Reporter
from internlm_lite.train.train_state import TrainState, random_states, set_random_states
from internlm_lite.train.trainer import Trainer

logger = logging.getLogger("internlm_lite")

TIMEOUT_SECONDS = 600.0
_FOLDER_KEYS = ("save_ckpt_folder", "snapshot_ckpt_folder")


@dataclass(frozen=True)
class Moment:
    """What the next forward pass changes, as it was after a step."""

    state: TrainState
    sums: torch.Tensor
    """`FolderMetrics.total`."""
    random_states: dict[str, torch.Tensor]
    valid_loss: float | None = None
    """Of the evaluation that a checkpoint of the kind "best" is saved for; None also where there was none."""
    best: tuple[str, float] | None = None
    """Name and value of the figure that such a checkpoint is the best by."""


@dataclass
class Contents:
    """Source and destination of a checkpoint's data: tensors and random states of every rank, counters, data facts."""

    trainer: Trainer
    reporter: Reporter
    fingerprint: dict[str, Any]
    """Of the training data; a resume compares it."""
    run_folder: str
    """Name of the run folder, stored for the run that resumes."""
    batch_tokens: int
    """Tokens per step over all ranks, now."""
    intended_batch_tokens: int
    """Tokens per step when the run began, perhaps with another number of ranks."""

    def pieces(self, *, moments: bool = True) -> list[LocalShard]:
        return [piece for piece in self.trainer.optimizer.pieces() if moments or piece.role == "master"]

    def moment(self, state: TrainState) -> Moment:
        """Collective; no host read."""
        return Moment(state, self.trainer.metrics.total(), random_states(self.trainer.mesh.device))

    def to_json(self, moment: Moment) -> dict[str, Any]:
        """The state that a checkpoint stores as JSON. Reads the device."""
        return {
            "train": moment.state.to_json(),
            "optimizer": self.trainer.optimizer.state_dict(),
            "reporter": self.reporter.state_dict(moment.sums),
            "data": self.fingerprint,
            "batch_tokens": self.intended_batch_tokens,
            "run_folder": self.run_folder,
            **({} if moment.valid_loss is None else {"valid_loss": moment.valid_loss}),
            **({} if moment.best is None else {"best": {"figure": moment.best[0], "value": moment.best[1]}}),
        }

    def adopt(self, restored: Restored, *, moments: bool) -> TrainState:
        """Restore counters and random states of a checkpoint whose tensors are loaded, and publish the weights.

        Collective. Raises CheckpointError if the counters are missing or unreadable."""
        stored, optimizer = restored.state, self.trainer.optimizer
        averages = moments and ROLE not in restored.absent
        try:
            state = TrainState.from_json(stored["train"])
            counters = without(stored["optimizer"], counters_left(restored.left))
            optimizer.load_state_dict(counters, moments=moments, averages=averages)
            self.reporter.load_state_dict(stored["reporter"])
        except (KeyError, TypeError) as error:
            raise CheckpointError(
                f"checkpoint {restored.found.name} holds no training state this version can read ({error!r}); "
                "take its weights alone with ckpt.load_model_only_folder"
            ) from error
        if optimizer.average is not None and not averages and self.trainer.mesh.is_main:
            why = "has none" if moments else "gives weights and counters alone"
            logger.info("ema: begins at the weights of step %d: checkpoint %s %s", state.step, restored.found.name, why)
        optimizer.publish_weights()
        if restored.rank_state is not None:
            set_random_states(restored.rank_state, self.trainer.mesh.device)
        return state


class Checkpoints:
    """Saves to, and restores from, the folders of one run. Methods are collective unless stated otherwise.

    Construction locks the save folders before the run writes anything; it fails if another run holds them. Call
    `attach` before saving or restoring.
    """

    contents: Contents

    def __init__(self, config: Config, mesh: Mesh, timeout_seconds: float = TIMEOUT_SECONDS) -> None:
        """Raises StorageError when a folder is not writable or another run holds it, ConfigError as `_check_owner`.

        `timeout_seconds`: how long rank 0 waits for the other ranks' parts of a checkpoint after writing its own;
        three times as long if training waits for it, which is less than the timeout of a collective.
        """
        self._given, self._ckpt, self._mesh = config, config.ckpt, mesh
        self._config = masked(resolved(config))
        """The config as it is stored and compared: resolved, secrets masked."""
        self._in_background = self._ckpt.async_upload and self._ckpt.enable_save_ckpt
        staging = self._ckpt.async_upload_tmp_folder if self._in_background else None
        options = SaveOptions(
            keep_milestones=self._ckpt.keep,
            vote_timeout_seconds=timeout_seconds,
            staging_folder=Path(normalize_path(staging)) if staging else None,
        )
        self.restored: str | None = None
        """Name of the checkpoint that this run resumed."""
        self.weights_from: Found | None = None
        """The checkpoint that this run took weights alone from."""
        self._began_at: Found | None = None
        """The checkpoint outside the save folders that this run began from; a rollback may return to it."""
        self._from_run_folder: str | None = None
        """The run folder that `restored` comes from."""
        self.manager = self._open(options, with_folders=self._ckpt.enable_save_ckpt)
        """Without folders if ckpt.enable_save_ckpt is False."""
        try:
            self.manager.lock()
            self._check_owner(self.manager)
        except BaseException:
            self.close(wait=False)
            raise

    def adopt_lengths(self, config: Config) -> None:
        """Store and compare the steps that `config` has by now, where the config given counts in epochs or tokens."""
        self._given = config
        for section in ("data", "lr_scheduler"):  # in place: managers have the same dict
            self._config[section]["total_steps"] = getattr(config, section).total_steps
        for name in ("warmup_steps", "warmup_tokens"):
            self._config["lr_scheduler"][name] = getattr(config.lr_scheduler, name)

    def attach(self, contents: Contents) -> None:
        """Set the `contents` to save and restore. Reserves host memory if saves run in the background."""
        self.contents = contents
        contents.trainer.optimizer.before_exchange = self.manager.allow_changes
        if self._in_background and (self._ckpt.checkpoint_every or self._ckpt.oss_snapshot_freq):
            self.manager.prepare(contents.pieces())

    def save(self, moment: Moment, kind: Kind, *, blocking: bool) -> None:
        """Save a checkpoint of `moment`. Reads the device.

        `blocking`: return when the checkpoint exists, or raise StorageError or CheckpointError. Otherwise it is written
        in the background if `ckpt.async_upload`, and a failure is only logged and reported as an alarm.
        """
        begin, step = time.monotonic(), moment.state.step
        stored, pieces = self.contents.to_json(moment), self.contents.pieces()
        wait = blocking or not self._ckpt.async_upload
        try:
            name = self.manager.save(step, kind, pieces, stored, moment.random_states, wait=wait)
        except (StorageError, CheckpointError) as error:
            self.report_finished()
            if blocking or self.manager.write_in_progress:
                raise
            self._alarm(f"step {step}", error)
            return
        self.report_finished()
        facts = {"saved": kind, "name": name, "waited": wait, "stall_seconds": round(time.monotonic() - begin, 4)}
        self.contents.reporter.event("checkpoint", step=step, **facts)

    def best_value(self, figure: str) -> float | None:
        """Value of this figure in this run's newest checkpoint of the kind "best"; None without one, or if it is the
        best by another figure; nan if it cannot be read. Waits for the save in progress, so that it counts, and that
        one of the same step does not take the place of a better one."""
        self._wait()
        try:
            best = on_main(self._mesh, lambda: self.manager.folders[0].newest("best"))
        except (StorageError, CheckpointError) as error:
            self._alarm("best", error)
            return math.nan
        if best is None or best.state["run_folder"] not in (self.contents.run_folder, self._from_run_folder):
            return None
        stored = best.state.get("best") or {"figure": "loss", "value": best.state["valid_loss"]}
        return float(stored["value"]) if stored["figure"] == figure else None

    def report_finished(self) -> None:
        """Report the outcome of background saves that have ended. Not collective; does not block."""
        while saved := self.manager.finished():
            self._report(saved)

    def _wait(self) -> None:
        """Wait for the background save in progress, then report. Not collective."""
        while saved := self.manager.wait():
            self._report(saved)

    def _report(self, saved: Saved) -> None:
        if saved.error is None:
            self.contents.reporter.event("checkpoint_done", name=str(saved.name), saved=saved.kind)
        else:
            self._alarm(str(saved.name), saved.error)

    def _alarm(self, which: str, error: InternLMError) -> None:
        self.contents.reporter.event("alarm", what="checkpoint failed", checkpoint=which, why=str(error))
        if self._mesh.is_main:
            logger.error("ALARM: checkpoint %s was not saved, training goes on: %s", which, error)

    def close(self, *, wait: bool) -> None:
        """End the writer thread and release the locks. `wait`: finish the save in progress first.

        Without `wait`, the lock of a storage that did not answer is left; the next run detects that this one is dead.
        Not collective; a second call does nothing.
        """
        if wait:
            self._wait()
        self.manager.close(wait=wait)

    def restore(self, resume: str, weights: Weights = "model") -> TrainState:
        """Load the checkpoint to start from and return its state, else the initial state, with `weights` loaded from
        ckpt.load_model_only_folder or drawn. Raises CheckpointError.

        `resume`: "auto", "none" (ignore this run's save folders), a step in these folders, or a path."""
        if resume.isdecimal():
            return self._begin_at(on_main(self._mesh, lambda: self._path_of_step(int(resume))))
        if resume not in ("auto", "none"):
            return self._begin_at(resume)
        own = self.own() if resume == "auto" else None
        if own and (restored := own.resume(self.contents.pieces(), check=self._check)):
            self._warn_of_ignored_folders(restored.found)
            before = restored.found.manifest
            if batch_keys(before.config["data"]) == batch_keys(self._config["data"]):
                # Kept through a resume on fewer ranks, so that a later one on more ranks can return to it.
                self.contents.intended_batch_tokens = before.state.get("batch_tokens", self.contents.batch_tokens)
            return self._adopt(restored, moments=True)
        if self._ckpt.load_ckpt_folder:
            return self._begin_at(self._ckpt.load_ckpt_folder)
        if self._ckpt.load_model_only_folder:
            self.load_weights(self._ckpt.load_model_only_folder, weights)
            self.contents.trainer.optimizer.restart_average()
        else:
            self.contents.trainer.draw_weights()
        return TrainState()

    def load_weights(self, path: str, weights: Weights) -> None:
        """Load these weights of the checkpoint at `path`, and nothing else. Raises CheckpointError."""
        pieces = self.contents.pieces(moments=False)
        self.weights_from = self.manager.load_at(path, pieces, weights=weights).found
        self.contents.trainer.optimizer.publish_weights()

    def roll_back(self, state: TrainState, spiked_step: int) -> TrainState | None:
        """Restore this run's newest checkpoint from before step `spiked_step`, else the one it began from. Returns its
        state with the data position of `state`; None if there is no such checkpoint. Raises CheckpointError."""
        self._wait()
        self.manager.allow_changes()
        self.contents.trainer.optimizer.wait_weights()
        restored = self._own_from_before(spiked_step)
        moments = restored is not None or self._ckpt.load_optimizer
        if restored is None and self._began_at is not None:
            restored = self.manager.load(self._began_at, self.contents.pieces(moments=moments), self._left)
        return None if restored is None else replace(self._adopt(restored, moments=moments), position=state.position)

    def _own_from_before(self, spiked_step: int) -> Restored | None:
        own = self.own()
        try:
            before = partial(self._is_before, spiked_step)
            return own.resume(self.contents.pieces(), self._left, before) if own else None
        except CheckpointError as error:
            if self._began_at is None:
                raise
            if self._mesh.is_main:
                logger.warning("going back to where this run began: %s", error)
            return None

    def _is_before(self, spiked_step: int, found: Found) -> bool:
        """Whether this run wrote or resumed `found` and it is from before the spike: folders may hold others."""
        run_folder = found.manifest.state.get("run_folder")
        return (found.name == self.restored or run_folder == self.contents.run_folder) and found.step <= spiked_step

    def _path_of_step(self, step: int) -> str:
        """Not collective. Raises CheckpointError naming the steps that there are."""
        folders = dict.fromkeys(folder for key in _FOLDER_KEYS if (folder := getattr(self._ckpt, key)))
        where, name = find_step(list(folders), step, self._ckpt.s3)
        return f"{where}/{name.commit}"

    def _begin_at(self, path: str) -> TrainState:
        moments = self._ckpt.load_optimizer
        check = partial(self._check, moments=moments)
        restored = self.manager.load_at(path, self.contents.pieces(moments=moments), check)
        self._began_at = restored.found
        return self._adopt(restored, moments=moments)

    def _adopt(self, restored: Restored, *, moments: bool) -> TrainState:
        state = self.contents.adopt(restored, moments=moments)
        self.restored = restored.found.name
        self._from_run_folder = restored.found.manifest.state.get("run_folder")
        for folder in self.manager.folders:
            folder.resumed_from = self.restored
        return state

    def _check(self, found: Found, wanted: Wanted, *, moments: bool = True) -> Left:
        """Compare this run with a checkpoint before loading. Raises CheckpointError when data or update rule changed or
        the training state is missing; warns of changes that affect the loss curve. Returns the state that starts at
        zero."""
        name, stored = found.name, found.manifest.state
        if "train" not in stored:
            raise CheckpointError(
                f"checkpoint {name} in {found.storage.name} holds weights alone, no training state: to train on from "
                "them, name this folder in ckpt.load_model_only_folder, and choose another one to save and resume"
            )
        batch, now = stored["train"].get("position", {}).get("batch", 0), self.contents.fingerprint
        changed = data_changes(stored["data"], now, batch) if "data" in stored else []
        listing = "\n  ".join([f"the training data changed since checkpoint {name} was written:", *changed])
        if changed and not self._ckpt.allow_changed_data:
            raise CheckpointError(
                f"{listing}\nexpected the same files and keys, or batches would repeat or be left out: restore them, "
                "set ckpt.allow_changed_data=True to go on at the same position of the new data, or start from the "
                "weights alone with ckpt.load_model_only_folder"
            )
        self._check_schedule(found)
        left: Left = self._left(found, wanted, told=True) if moments else frozenset()
        if not self._mesh.is_main:
            return left
        if not moments:
            logger.info("the state of %s starts at zero: ckpt.load_optimizer=False", self._given.optimizer.name)
        if "data" in stored and (planned := later_stages(stored["data"], now, batch)):
            logger.warning(f"the stages after batch {batch} are not those of checkpoint {name}: {planned}")
        if changed:
            logger.warning(f"{listing}\nbatches from here on are drawn from the new data at the same position")
        tokens = self.contents.batch_tokens
        if stored.get("batch_tokens", tokens) != tokens:
            logger.warning(
                f"a step takes {tokens} tokens now, expected {stored['batch_tokens']} as when the run of "
                f"checkpoint {name} began; to keep them, change data.micro_num with the number of data-parallel ranks"
            )
        return left

    def _left(self, found: Found, wanted: Wanted, *, told: bool = False) -> Left:
        """State of the update rule that the checkpoint of another rule does not give; `told`: say it, or refuse."""
        then, now = found.manifest.config.get("optimizer", {}).get("name"), self._given.optimizer.name
        change = rule_change(then, now, wanted, found.manifest.tensors)
        if change is None:
            return frozenset()
        if told and not self._ckpt.allow_changed_optimizer:
            back = "the keys of optimizer as they were" if then in (None, now) else f"optimizer.name={then!r} again"
            raise CheckpointError(
                f"checkpoint {found.name} in {found.storage.name} has the state of another update rule: {change.text}; "
                f"set ckpt.allow_changed_optimizer=True to go on like that, or {back}; with ckpt.load_ckpt_folder, "
                "ckpt.load_optimizer=False starts all of it at zero"
            )
        if told and self._mesh.is_main:
            logger.warning("another update rule than that of checkpoint %s: %s", found.name, change.text)
        return change.left

    def _check_schedule(self, found: Found) -> None:
        """Tell of another schedule. Raises CheckpointError if total_steps alone moves the next learning rate, which
        often was not meant."""
        then, change, updates = None, None, 0
        with suppress(CheckpointError, LookupError):  # a config of another version
            then, updates = found.config(), found.manifest.state["optimizer"]["good_steps"]
            change = schedule_change(then, self._given, updates)
        if then is None or change is None:
            return
        text = f"the learning-rate schedule is not that of checkpoint {found.name}: {change}"
        if self._ckpt.allow_changed_schedule:
            log = logger.info
        elif horizon_moved(then, self._given, updates):
            total = then.lr_scheduler.total_steps
            raise CheckpointError(
                f"{text}\nexpected lr_scheduler.total_steps {total} as then: set it, whatever data.total_steps is, or "
                "set ckpt.allow_changed_schedule=True to go on with the new curve"
            )
        else:
            log = logger.warning
        if self._mesh.is_main:
            log(text)

    def _warn_of_ignored_folders(self, found: Found) -> None:
        """Warn of load folders that are new in the config, because a resume ignores them."""
        before = found.manifest.config.get("ckpt", {})
        for key in ("load_ckpt_folder", "load_model_only_folder"):
            path = getattr(self._ckpt, key)
            if self._mesh.is_main and path and path != before.get(key):
                logger.warning(
                    f"ckpt.{key}={path} is not loaded: this run goes on from checkpoint {found.name} of its own in "
                    f"{found.storage.name}; to begin there instead, choose other save folders, or --resume none"
                )

    def last_run(self) -> LastRun | None:
        """The run that wrote the newest complete checkpoint. Not collective.

        None if there is none, if it does not name its run, or if it was saved to other folders: then this is a copy,
        and the run that wrote it may still be running.
        """
        newest = _newest_manifest([folder.storage for folder in self.manager.folders])
        if newest is None:
            return None
        theirs = newest.config.get("ckpt", {})
        folder, tokens = newest.state.get("run_folder"), newest.state.get("batch_tokens")
        same = all(_is_same_folder(theirs, self._ckpt, key) for key in _FOLDER_KEYS)
        if not (same and isinstance(folder, str) and isinstance(tokens, int)):
            return None
        return LastRun(folder, newest.step, tokens, newest.config["data"])

    def own(self) -> CheckpointManager | None:
        """The manager of this run's save folders; None without folders. A run that saves nothing opens them read-only,
        without locking them."""
        manager = self.manager
        if not self._ckpt.enable_save_ckpt:
            manager = self._open(None)
            self._check_owner(manager)
        return manager if manager.folders else None

    def _open(self, saving: SaveOptions | None, *, with_folders: bool = True) -> CheckpointManager:
        return CheckpointManager(
            self._ckpt.save_ckpt_folder if with_folders else None,
            self._mesh,
            snapshot_folder=self._ckpt.snapshot_ckpt_folder if with_folders else None,
            config=self._config,
            saving=saving,
            s3=self._ckpt.s3,
        )

    def _check_owner(self, manager: CheckpointManager) -> None:
        """Raises ConfigError if the snapshots are those of a run with another milestone folder, because this run would
        resume from them and delete them."""
        if len(manager.folders) == 2:
            on_main(self._mesh, lambda: self._check_snapshots(manager.folders[1].storage))

    def _check_snapshots(self, snapshots: Storage) -> None:
        """See `_check_owner`. Not collective. No error if the snapshot folder differs, too: both were moved here."""
        newest = _newest_manifest([snapshots])
        theirs = newest.config.get("ckpt", {}) if newest else {}
        same_milestones, same_snapshots = (_is_same_folder(theirs, self._ckpt, key) for key in _FOLDER_KEYS)
        if same_snapshots and not same_milestones:
            raise ConfigError(
                f"ckpt.snapshot_ckpt_folder={self._ckpt.snapshot_ckpt_folder} holds snapshots of the run that "
                f"saves to {theirs.get('save_ckpt_folder')}, this one saves to "
                f"ckpt.save_ckpt_folder={self._ckpt.save_ckpt_folder}: set both folders, or the variable of "
                "the config that both are made of"
            )


def _newest_manifest(storages: Sequence[Storage]) -> Manifest | None:
    """The manifest of the newest complete checkpoint in these storages; None if there is none."""
    named = [(name, storage) for storage in storages for name in catalog.committed(storage)]
    for name, storage in sorted(named, key=lambda one: one[0], reverse=True):
        with suppress(CheckpointError):  # reported when it is loaded
            return catalog.inspect(storage, name).manifest
    return None


def _is_same_folder(theirs: Mapping[str, Any], ours: CkptConfig, key: str) -> bool:
    """Whether both configs have the same folder (by normalised path) under `key`."""
    here, there = getattr(ours, key), theirs.get(key)
    return here == there or (here is not None and there is not None and normalize_path(here) == normalize_path(there))
