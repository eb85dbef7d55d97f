"""Differences between the run that wrote a checkpoint and the run that resumes it: data, ranks, learning rate."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from internlm_lite.config.run_stages import peak_rates
from internlm_lite.config.schema import Config
from internlm_lite.optim.lr_schedule import learning_rate

logger = logging.getLogger("internlm_lite")
_MAX_LISTED_FILES = 5


@dataclass(frozen=True)
class LastRun:
    """The run that wrote the newest checkpoint."""

    folder: str
    """Name of the run folder."""
    step: int
    """Number of training steps done."""
    batch_tokens: int
    """Tokens per step over all ranks, when the run began."""
    data: Mapping[str, Any]
    """The `data` section of its config."""


def batch_keys(data: Mapping[str, Any]) -> tuple[object, ...]:
    """Values of the `data` keys that, with the number of ranks, determine the number of tokens per step."""
    return tuple(data.get(key) for key in ("micro_num", "micro_bsz", "seq_len", "rampup_batch_size"))


def keep_global_batch(config: Config, last: LastRun | None, dp_size: int) -> Config:
    """`config` with `data.micro_num` set so that a step on `dp_size` data-parallel ranks takes `last.batch_tokens`.

    This keeps the loss curve and the data order when only the number of ranks changed. Returns `config` unchanged if
    the batch's keys were edited, with a batch ramp-up, or if the tokens are not divisible (then `Checkpoints` warns).
    """
    data = config.data
    tokens_per_micro_num = data.micro_bsz * data.seq_len * dp_size
    if last is None or batch_keys(last.data) != batch_keys(data.model_dump()) or data.rampup_batch_size:
        return config
    if last.batch_tokens == tokens_per_micro_num * data.micro_num or last.batch_tokens % tokens_per_micro_num:
        return config
    micro_num = last.batch_tokens // tokens_per_micro_num
    logger.info(
        f"data.micro_num={micro_num} instead of {data.micro_num}: with {dp_size} data-parallel ranks now, a step takes "
        f"the same {last.batch_tokens} tokens as before"
    )
    return config.model_copy(update={"data": data.model_copy(update={"micro_num": micro_num})})


def schedule_change(then: Config, now: Config, updates: int) -> str | None:
    """The first learning rate that differs after `updates` updates, and the keys that cause it; None: none differs.

    `then`: the config of the checkpoint that is resumed.
    """
    if (then.adam.lr, then.lr_scheduler, _peaks(then)) == (now.adam.lr, now.lr_scheduler, _peaks(now)):
        return None
    total = now.lr_scheduler.total_steps
    peaks = zip(*(islice(peak_rates(one, total), updates, None) for one in (then, now)), strict=True)
    for update, pair in enumerate(peaks, updates):
        rates = zip(pair, (then, now), strict=True)
        before, after = (learning_rate(update, peak, one.lr_scheduler) for peak, one in rates)
        if before != after:
            break
    else:
        return None
    olds, news = (
        {"adam.lr": one.adam.lr, "stages.lr": _peaks(one), **one.lr_scheduler.model_dump()} for one in (then, now)
    )
    keys = [key for key in olds if olds[key] != news[key]]
    named = [f"{key if '.' in key else f'lr_scheduler.{key}'} {olds[key]} then, {news[key]} now" for key in keys]
    first = "the next update" if update == updates else f"update {update}"
    return f"{first} has the learning rate {after:g} instead of {before:g} ({'; '.join(named)})"


def horizon_moved(then: Config, now: Config, updates: int) -> bool:
    """Whether another lr_scheduler.total_steps gives the next update, after `updates`, another learning rate.

    Not in the stable phase of "wsd": its decay starts later or sooner, and the rates before it stay what they were.
    """
    if then.lr_scheduler.total_steps == now.lr_scheduler.total_steps or updates >= now.lr_scheduler.total_steps:
        return False
    moved = then.lr_scheduler.model_copy(update={"total_steps": now.lr_scheduler.total_steps})
    return learning_rate(updates, then.adam.lr, moved) != learning_rate(updates, then.adam.lr, then.lr_scheduler)


def _peaks(config: Config) -> list[tuple[int | None, float | None]]:
    """(until, lr) of each stage."""
    return [(stage.until, stage.lr) for stage in config.stages]


_OF_STAGES = ("micro_bsz", "seq_len", "weights")
_ENDLESS = 2**62


def _timeline(data: Mapping[str, Any]) -> list[tuple[int, dict[str, Any]]]:
    """(first batch, what the stage of a fingerprint has there) of each stage."""
    whole = {key: data.get(key) for key in _OF_STAGES}
    stages, start, found = data.get("stages") or [{}], 0, []
    for stage in stages:
        values = {key: value for key, value in stage.items() if key != "until" and value is not None}
        found.append((start, {**whole, **values}))
        start = stage.get("until") or _ENDLESS
    return found


def _stage_differences(
    stored: Mapping[str, Any], now: Mapping[str, Any], batches: range
) -> Iterator[tuple[int, str, Any, Any]]:
    """(batch from which on, key, value then, value now) of what the stages of two fingerprints say of these batches."""
    then, later = _timeline(stored), _timeline(now)
    starts = sorted({batches.start, *(start for start, _ in (*then, *later) if start in batches)})
    for start in starts:
        old, new = (next(values for first, values in reversed(one) if first <= start) for one in (then, later))
        for key in sorted(old.keys() | new.keys()):
            if old.get(key) != new.get(key):
                yield start, key, old.get(key), new.get(key)


def later_stages(stored: Mapping[str, Any], now: Mapping[str, Any], batch: int) -> str:
    """The first thing that the stages of two fingerprints plan differently from batch `batch` on; empty: none."""
    if "stages" not in stored and "stages" not in now:
        return ""
    for start, key, old, new in _stage_differences(stored, now, range(batch, _ENDLESS)):
        return f"from batch {start} on {key} is {new!r}, and was to be {old!r}"
    return ""


def data_changes(stored: Mapping[str, Any], now: Mapping[str, Any], batch: int = _ENDLESS) -> list[str]:
    """One line per key and per data folder that differs between two fingerprints of the training data.

    Of stages, only those of batches before `batch` count."""
    keys = [key for key in sorted(stored.keys() | now.keys()) if key not in ("folders", "stages", *_OF_STAGES)]
    keys = [key for key in keys if stored.get(key) != now.get(key)]
    lines = [f"{key}: {stored.get(key)!r} then, {now.get(key)!r} now" for key in keys]
    staged = "stages" in stored or "stages" in now
    for start, key, old_value, new_value in _stage_differences(stored, now, range(max(1, batch))):
        since = f" from batch {start} on" if staged else ""
        lines.append(f"{key}: {old_value!r} then, {new_value!r} now{since}")
    old, new = ({folder["name"]: folder for folder in one.get("folders", [])} for one in (stored, now))
    lines += [f"data folder {name}: gone" for name in old if name not in new]
    lines += [f"data folder {name}: new" for name in new if name not in old]
    lines += [_folder_change(name, old[name], new[name]) for name in old if name in new and old[name] != new[name]]
    if not lines and list(old) != list(new):
        lines = [f"data folders: {', '.join(old)} then, {', '.join(new)} now"]
    return lines


def _folder_change(name: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    before, after = ({file["name"]: file for file in one["files"]} for one in (old, new))
    groups = {
        "gone": [file for file in before if file not in after],
        "new": [file for file in after if file not in before],
        "changed": [file for file in before if file in after and before[file] != after[file]],
    }
    found = [f"{what}: {_listed(files)}" for what, files in groups.items() if files]
    amounts = [f"{one['documents']} documents of {one['tokens']} tokens" for one in (old, new)]
    if amounts[0] != amounts[1]:
        found.append(f"{amounts[0]} then, {amounts[1]} now")
    return f"data folder {name}: {'; '.join(found) or 'its files are in another order'}"


def _listed(files: list[str]) -> str:
    more = f" and {len(files) - _MAX_LISTED_FILES} more" if len(files) > _MAX_LISTED_FILES else ""
    return ", ".join(files[:_MAX_LISTED_FILES]) + more
