"""When checkpoints are written, what they hold, and how a run comes back from one.

checkpoint_every   -> milestones in save_ckpt_folder            --resume auto: the newest of both folders,
oss_snapshot_freq  -> snapshots in snapshot_ckpt_folder                        else load_ckpt_folder,
the end            -> a final one in save_ckpt_folder                          else load_model_only_folder
"""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from internlm_lite.checkpoint.format.catalog import Found
from internlm_lite.checkpoint.format.manifest import Kind, Manifest
from internlm_lite.checkpoint.load.loader import Loader, Restored
from internlm_lite.checkpoint.save.write_job import Saved
from internlm_lite.config.schema import CkptConfig, Config
from internlm_lite.errors import CheckpointError, InternLMError, StorageError
from internlm_lite.mesh.layout import Piece
from internlm_lite.mesh.mesh import Mesh
from internlm_lite.optim.zero import HybridZeroOptimizer
from internlm_lite.train.data_changes import data_changes
from internlm_lite.train.elastic import batch_keys
from internlm_lite.train.reporter import Reporter
from internlm_lite.train.requests import Order
from internlm_lite.train.save_folders import SaveFolders
from internlm_lite.train.state import TrainState

logger = logging.getLogger("internlm_lite")


class Saving:
    """The checkpoints of one run. Every method is collective."""

    def __init__(
        self,
        config: Config,
        mesh: Mesh,
        folders: SaveFolders,
        optimizer: HybridZeroOptimizer,
        reporter: Reporter,
        fingerprint: dict[str, Any],
        run_folder: str,
    ) -> None:
        """`run_folder`: its name, for the run that goes on from here."""
        self._ckpt = config.ckpt
        self._folders, self._saver, self._run_folder = folders, folders.manager, run_folder
        self.restored: str | None = None
        """Name of the checkpoint whose counters this run goes on from."""
        self._loader = Loader(mesh, config=folders.described, s3=config.ckpt.s3)
        self._began_at: Found | None = None
        """A checkpoint outside of this run, which can be gone back to."""
        self._optimizer, self._mesh, self._reporter, self._fingerprint = optimizer, mesh, reporter, fingerprint
        data = config.data
        self._batch_tokens = data.micro_num * data.micro_bsz * data.seq_len * mesh.dp.size
        self._wanted_tokens = self._batch_tokens
        """Of a step, as the run was begun."""
        if folders.in_background and (config.ckpt.checkpoint_every or config.ckpt.oss_snapshot_freq):
            self._saver.prepare(self._pieces())

    def save(self, state: TrainState, kind: Kind, must: bool) -> None:
        """Write everything that going on from here needs.

        `must`: return when the checkpoint exists, or raise StorageError or CheckpointError. Else it is written in the
        background with `ckpt.async_upload`, and a failure is an alarm: training goes on, and the next save tries again.
        """
        begin = time.monotonic()
        self._optimizer.wait_weights()
        stored = {
            "train": state.to_json(),
            "optimizer": self._optimizer.state_dict(),
            "reporter": self._reporter.state_dict(),
            "data": self._fingerprint,
            "batch_tokens": self._wanted_tokens,
            "run_folder": self._run_folder,
        }
        pieces, random = self._pieces(), random_states(self._mesh.device)
        wait = must or not self._ckpt.async_upload
        try:
            name = self._saver.save(state.step, kind, pieces, stored, random, wait=wait)
        except (StorageError, CheckpointError) as error:
            self.check()
            if must or self._saver.write_in_progress:
                raise
            self._alarm(f"step {state.step}", error)
            return
        self.check()
        stall = round(time.monotonic() - begin, 4)
        self._reporter.event("checkpoint", step=state.step, saved=kind, name=name, waited=wait, stall_seconds=stall)

    def check(self) -> None:
        """Tell how saves in the background have ended that have. Not collective, and quick."""
        while saved := self._saver.finished():
            self._tell(saved)

    def _tell_all(self) -> None:
        """The same, once the save under way has ended."""
        while saved := self._saver.wait():
            self._tell(saved)

    def _tell(self, saved: Saved) -> None:
        if saved.error is None:
            self._reporter.event("checkpoint_done", name=str(saved.name), saved=saved.kind)
        else:
            self._alarm(str(saved.name), saved.error)

    def _alarm(self, which: str, error: InternLMError) -> None:
        self._reporter.event("alarm", what="checkpoint failed", checkpoint=which, why=str(error))
        if self._mesh.is_main:
            logger.error("ALARM: checkpoint %s was not saved, training goes on: %s", which, error)

    def close(self, wait: bool) -> None:
        """End with a save under way, or without waiting for it, and give the folders free. Not collective."""
        if wait:
            self._tell_all()
        self._folders.close(wait)

    def restore(self, resume: str) -> TrainState:
        """The state to go on from. `resume`: auto, none (nothing of this run's own folders), or a path."""
        if resume not in ("auto", "none"):
            return self._begin_at(resume)
        own = self._folders.origin() if resume == "auto" else None
        if own and (restored := own.resume(self._pieces(), check=self._check)):
            self._tell_what_is_passed_over(restored.found)
            self._keep_wanted_tokens(restored.found.manifest)
            return self._adopt(restored, moments=True)
        if self._ckpt.load_ckpt_folder:
            return self._begin_at(self._ckpt.load_ckpt_folder)
        if self._ckpt.load_model_only_folder:
            self._load_weights_only(self._ckpt.load_model_only_folder)
        return TrainState()

    def _keep_wanted_tokens(self, before: Manifest) -> None:
        """Ranks that cannot take as many for a while do not change what is wanted once others can."""
        if batch_keys(before.config["data"]) == batch_keys(self._folders.described["data"]):
            self._wanted_tokens = before.state.get("batch_tokens", self._batch_tokens)

    def _tell_what_is_passed_over(self, found: Found) -> None:
        """A folder to begin from that was not in the config of the run that is gone on with."""
        before = found.manifest.config.get("ckpt", {})
        for key in ("load_ckpt_folder", "load_model_only_folder"):
            path = getattr(self._ckpt, key)
            if self._mesh.is_main and path and path != before.get(key):
                logger.warning(
                    f"ckpt.{key}={path} is not loaded: this run goes on from checkpoint {found.name} of its own in "
                    f"{found.storage.name}; to begin there instead, choose other save folders, or --resume none"
                )

    def go_back(self, state: TrainState, spiked: int) -> TrainState | None:
        """The newest checkpoint of this run from before step `spiked`, or the one it began from, with the data position
        of `state`; None where there is none.
        """
        self._tell_all()
        self._optimizer.wait_weights()
        restored = self._own_from_before(spiked)
        moments = restored is not None or self._ckpt.load_optimizer
        if restored is None and self._began_at is not None:
            restored = self._loader.load(self._began_at, self._pieces(moments))
        return None if restored is None else replace(self._adopt(restored, moments), position=state.position)

    def _own_from_before(self, spiked: int) -> Restored | None:
        own = self._folders.origin()
        try:
            return own.resume(self._pieces(), accept=partial(self._is_before, spiked)) if own else None
        except CheckpointError as error:
            if self._began_at is None:
                raise
            if self._mesh.is_main:
                logger.warning("going back to where this run began: %s", error)
            return None

    def _is_before(self, spiked: int, found: Found) -> bool:
        """A folder may hold what other runs wrote, and what this one wrote before the spike was known."""
        ours = found.name == self.restored or found.manifest.state.get("run_folder") == self._run_folder
        return ours and found.step <= spiked

    def _begin_at(self, path: str) -> TrainState:
        moments = self._ckpt.load_optimizer
        restored = self._loader.load_at(path, self._pieces(moments), self._check)
        self._began_at = restored.found
        return self._adopt(restored, moments)

    def _load_weights_only(self, path: str) -> None:
        self._loader.load_at(path, self._pieces(moments=False))
        self._optimizer.publish_weights()

    def _pieces(self, moments: bool = True) -> list[Piece]:
        return [piece for piece in self._optimizer.pieces() if moments or piece.role == "master"]

    def _adopt(self, restored: Restored, moments: bool) -> TrainState:
        stored = restored.state
        try:
            state = TrainState.from_json(stored["train"])
            self._optimizer.load_state_dict(stored["optimizer"], moments=moments)
            self._reporter.load_state_dict(stored["reporter"])
        except (KeyError, TypeError) as error:
            raise CheckpointError(
                f"checkpoint {restored.found.name} holds no training state this version can read ({error!r}); "
                "take its weights alone with ckpt.load_model_only_folder"
            ) from error
        self._optimizer.publish_weights()
        if restored.rank_state is not None:
            set_random_states(restored.rank_state, self._mesh.device)
        self.restored = restored.found.name
        return state

    def _check(self, found: Found) -> None:
        """What is not as it was, and so bends the curve. Raises CheckpointError when the data changed, or when there
        is no training state.
        """
        name, stored = found.name, found.manifest.state
        if "train" not in stored:
            raise CheckpointError(
                f"checkpoint {name} in {found.storage.name} holds weights alone, no training state: to train on from "
                "them, name this folder in ckpt.load_model_only_folder, and choose another one to save and resume"
            )
        changed = data_changes(stored["data"], self._fingerprint) if "data" in stored else []
        told = "\n  ".join([f"the training data changed since checkpoint {name} was written:", *changed])
        if changed and not self._ckpt.allow_changed_data:
            raise CheckpointError(
                f"{told}\nexpected the same files and keys, or batches would repeat or be left out: restore them, set "
                "ckpt.allow_changed_data=True to go on at the same position of the new data, or start from the weights "
                "alone with ckpt.load_model_only_folder"
            )
        if not self._mesh.is_main:
            return
        if changed:
            logger.warning(f"{told}\nbatches from here on are drawn from the new data at the same position")
        if stored.get("batch_tokens", self._batch_tokens) != self._batch_tokens:
            logger.warning(
                f"a step takes {self._batch_tokens} tokens now, expected {stored['batch_tokens']} as when the run of "
                f"checkpoint {name} began; to keep them, change data.micro_num with the number of data-parallel ranks"
            )


def due(ckpt: CkptConfig, steps_done: int, order: Order, last: bool, owed: Kind | None = None) -> Kind | None:
    """Kind of the checkpoint due after `steps_done` steps: of several the one that is kept longest. `owed`: put off."""
    if not ckpt.enable_save_ckpt or steps_done == 0:
        return None
    if last:
        return "final"
    if _divides(ckpt.checkpoint_every, steps_done) or owed == "milestone" or (order.save and not order.stop):
        return "milestone"
    if order.stop:
        return "rescue"
    return "snapshot" if owed or _divides(ckpt.oss_snapshot_freq, steps_done) else None


def _divides(every: int | None, steps_done: int) -> bool:
    return every is not None and every > 0 and steps_done % every == 0


def random_states(device: torch.device) -> dict[str, torch.Tensor]:
    """States of this rank's random generators, uint8."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_random_states(states: dict[str, torch.Tensor], device: torch.device) -> None:
    """Undo `random_states`; a state of a device that this run does not use is left alone."""
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
