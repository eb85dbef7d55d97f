"""MLflow: the config as params, figures by step as metrics, on a server or in files.

    <run folder>/mlflow-id    id of MLflow's run, which a resumed run goes on with
    params                    the config, without secrets; they never change: what a resume changed is a tag changed.KEY
    metrics                   those of TensorBoard and wandb; steps that a resume repeats are logged again

A server that does not answer is tried again, less and less often; figures wait meanwhile. Whatever a repetition cannot
cure switches the sink off (`monitor.sinks`).
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import posixpath
import re
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, Run, RunTag
from mlflow.environment_variables import MLFLOW_TRACKING_URI
from mlflow.exceptions import MlflowException

from internlm_lite.config.masking import masked
from internlm_lite.config.render_config import resolved
from internlm_lite.config.schema import Config, MlflowConfig
from internlm_lite.monitor.record import Sink, StepRecord, ValidationRecord
from internlm_lite.monitor.scalars import step_scalars, task_scalars, validation_scalars

logger = logging.getLogger("internlm_lite")

MOST_WAITING = 100_000
"""Figures kept for a server that does not answer; older ones are dropped."""
FIRST_PAUSE, LONGEST_PAUSE = 15.0, 300.0
"""Seconds to the next try."""
SEND_SECONDS = 1.0
"""Figures that come faster are sent together."""
PARAM_LIMITS = (6000, 500, 250)
"""Characters of a param that servers of different ages take, newest first."""
_TAG_LIMIT = 5000
_KEY_LIMIT = 250
_METRICS_PER_CALL = 1000
_PARAMS_PER_CALL = 50
_CHANGED = "changed."
_STATUS = {"done": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
_PASSING = ("INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED", "DEADLINE_EXCEEDED")
Item = TypeVar("Item")


class Mlflow(Sink):
    """A run of MLflow for the run in `folder`."""

    def __init__(self, folder: Path, config: Config, settings: MlflowConfig) -> None:
        """Raises MLflow's own errors, but not if the server does not answer."""
        self._client = MlflowClient(settings.tracking_uri or MLFLOW_TRACKING_URI.get() or str(folder / "mlruns"))
        self._settings = settings
        self._name = settings.run_name or f"{config.JOB_NAME}/{folder.name}"
        self._id_file = folder / "mlflow-id"
        self._params = params_of(config)
        self._waiting: deque[Metric] = deque(maxlen=MOST_WAITING)
        self._run_id: str | None = None
        self._status = "KILLED"
        self._pause = 0.0
        self._next_send = 0.0
        self._send()

    def step(self, record: StepRecord) -> None:
        self._put(step_scalars(record), record.step, record.time.timestamp())

    def validation(self, record: ValidationRecord) -> None:
        self._put(validation_scalars(record), record.step, time.time())

    def event(self, kind: str, facts: Mapping[str, Any]) -> None:
        """Tasks that were evaluated apart, and how the run ends."""
        if kind == "tasks":
            self._put(task_scalars(facts["tasks"]), facts["step"], time.time())
        self._status = _STATUS.get(kind, self._status)

    def close(self) -> None:
        """Send what waits, and end MLflow's run; one try."""
        self._send()
        if self._run_id is not None and not self._pause:
            self._client.set_terminated(self._run_id, self._status)

    def _put(self, scalars: Mapping[str, float], step: int, seconds: float) -> None:
        milliseconds = round(1000 * seconds)
        found = ((key_of(name), float(value)) for name, value in scalars.items())
        self._waiting.extend(Metric(key, value, milliseconds, step) for key, value in found if math.isfinite(value))
        if time.monotonic() >= self._next_send or (not self._pause and len(self._waiting) >= _METRICS_PER_CALL):
            self._send()

    def _send(self) -> None:
        """Send all that waits; if the server does not answer, later."""
        try:
            run_id = self._open_run()
            while self._waiting:
                batch = list(islice(self._waiting, _METRICS_PER_CALL))
                self._client.log_batch(run_id, metrics=batch)
                for _ in batch:
                    self._waiting.popleft()
        except (MlflowException, OSError) as error:
            if isinstance(error, MlflowException) and error.error_code not in _PASSING:
                raise
            self._wait(error)
        else:
            if self._pause:
                logger.info("MLflow answers again")
            self._pause, self._next_send = 0.0, time.monotonic() + SEND_SECONDS

    def _wait(self, error: Exception) -> None:
        if not self._pause:
            why = masked(str(error).strip().partition("\n")[0])
            logger.warning("MLflow does not answer, training goes on and its figures wait: %s", why)
        self._pause = min(LONGEST_PAUSE, 2 * self._pause or FIRST_PAUSE)
        self._next_send = time.monotonic() + self._pause

    def _open_run(self) -> str:
        """Go on with the run whose id the folder holds, or begin one. Returns its id."""
        if self._run_id is not None:
            return self._run_id
        run = self._kept_run() or self._new_run()
        self._log_params(run)
        self._client.update_run(run.info.run_id, status="RUNNING")
        self._run_id = str(run.info.run_id)
        return self._run_id

    def _kept_run(self) -> Run | None:
        if not self._id_file.exists():
            return None
        kept = self._id_file.read_text(encoding="utf-8").strip()
        try:
            run = self._client.get_run(kept)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            run = None
        if run is None or run.info.lifecycle_stage != "active":
            logger.warning("MLflow's run %s, named in %s, is not there: a new one begins", kept, self._id_file)
            return None
        return run

    def _new_run(self) -> Run:
        tags = {key_of(name): value[:_TAG_LIMIT] for name, value in masked(self._settings.tags).items()}
        run = self._client.create_run(self._experiment(), tags=tags, run_name=self._name)
        self._id_file.write_text(run.info.run_id + "\n", encoding="utf-8")
        return run

    def _experiment(self) -> str:
        name = self._settings.experiment
        found = self._client.get_experiment_by_name(name)
        if found is None:
            try:
                return str(self._client.create_experiment(name))
            except MlflowException as error:  # another run may have made it meanwhile
                found = self._client.get_experiment_by_name(name)
                if found is None:
                    raise error from None
        return str(found.experiment_id)

    def _log_params(self, run: Run) -> None:
        """Log params that the run lacks. Those that differ become tags; a tag goes when its param is as it was."""
        params, tags = run.data.params, run.data.tags
        new = [(key, text) for key, text in self._params.items() if key not in params]
        for batch in _batches(new, _PARAMS_PER_CALL):
            self._log_new(run.info.run_id, batch)
        known = [(key, text, is_cut_of(params[key], text)) for key, text in self._params.items() if key in params]
        changed = [RunTag(key_of(_CHANGED + key), text[:_TAG_LIMIT]) for key, text, same in known if not same]
        for batch_of_tags in _batches(changed, _PARAMS_PER_CALL):
            self._client.log_batch(run.info.run_id, tags=batch_of_tags)
        for key, _, same in known:
            if same and key_of(_CHANGED + key) in tags:
                self._client.delete_tag(run.info.run_id, key_of(_CHANGED + key))

    def _log_new(self, run_id: str, pairs: Sequence[tuple[str, str]]) -> None:
        for limit in PARAM_LIMITS:
            try:
                self._client.log_batch(run_id, params=[Param(key, text[:limit]) for key, text in pairs])
                return
            except MlflowException as error:
                if error.error_code != "INVALID_PARAMETER_VALUE" or limit == PARAM_LIMITS[-1]:
                    raise


def params_of(config: Config) -> dict[str, str]:
    """The config as MLflow's params: "adam.lr" -> "0.0003". Equal configs give equal texts; secrets are masked."""
    return {key_of(key): text for key, text in _flat(masked(resolved(config)), "")}


def _flat(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, str]]:
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        elif isinstance(value, str) and value and value.isprintable():
            yield f"{prefix}{name}", value
        else:
            yield f"{prefix}{name}", json.dumps(value, ensure_ascii=True, sort_keys=True)


def is_cut_of(stored: str, text: str) -> bool:
    """Whether `stored` is `text`, whole or as some server took it."""
    return any(stored == text[:limit] for limit in PARAM_LIMITS)


def key_of(name: str) -> str:
    """`name` if MLflow takes it as a key, else a similar one with a hash of it, so that no two names meet.

    Keys have at most 250 characters, of letters, digits, "_", "-", ".", " " and "/", and must be paths of files.
    """
    plain = re.sub(r"[^\w\-. /]", "_", name)
    is_path = posixpath.normpath(plain) == plain and not plain.startswith((".", "/"))
    if plain == name and is_path and len(name.encode()) <= _KEY_LIMIT:
        return name
    parts = [part if part.strip(". ") else "_" for part in plain.split("/")]
    digest = hashlib.sha256(name.encode("utf-8", "backslashreplace")).hexdigest()[:8]
    return "/".join(parts).encode()[: _KEY_LIMIT - 10].decode(errors="ignore") + f"-{digest}"


def _batches(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
