"""Cross checks of `stages`, and of what says how long the run is."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from internlm_lite.config.keys import value_of
from internlm_lite.config.plain import shown
from internlm_lite.config.problems import Problem
from internlm_lite.config.run_stages import in_stage, stages_of
from internlm_lite.config.schema import Config

_LENGTHS = ("total_steps", "epochs", "total_tokens")
MOST_TOKENS = 2**31 - 1
"""Of a row; far above every run."""

Check = Callable[[Config], Iterator[Problem]]


def length_problems(config: Config) -> Iterator[Problem]:
    """Exactly one key says how long the run is. 0 steps stand for the number that the two others give."""
    data = config.data
    given = [name for name in ("epochs", "total_tokens") if getattr(data, name) is not None]
    if data.total_steps:
        given.insert(0, "total_steps")
    keys = tuple(f"data.{name}" for name in (*given, *_LENGTHS))
    if not given:
        text = "found 0 and no other length, expected data.total_steps, data.epochs or data.total_tokens; set one"
        yield Problem(("data.total_steps",), text)
    elif len(given) > 1:
        found = " and ".join(f"data.{name} {getattr(data, name)}" for name in given)
        text = f"found {found}, expected one of them: each says how long the run is; remove the others"
        yield Problem(tuple(dict.fromkeys(keys)), text)


def epoch_keys(config: Config) -> list[str]:
    """The keys that say "epoch"."""
    keys = ("monitor.sample_every", "data.valid_every", "ckpt.checkpoint_every")
    return [key for key in keys if value_of(config, key) == "epoch"]


def epoch_problems(config: Config) -> Iterator[Problem]:
    """An epoch is a pass over all folders together, and a number of steps for what is due in steps."""
    data = config.data
    moves = {"data.rampup_batch_size": data.rampup_batch_size, "data.skip_batches": data.skip_batches}
    for key in epoch_keys(config):
        if data.weights is not None:
            text = 'found "epoch" with data.weights, with which each folder has passes of its own'
            yield Problem((key, "data.weights"), f"{text}; give a number of steps")
        for other, value in moves.items() if key != "monitor.sample_every" else ():
            if value:
                text = f'found "epoch" with {other} {shown(value)}: passes of different length; give a number of steps'
                yield Problem((key, other), text)


def stage_problems(config: Config, others: Check) -> Iterator[Problem]:
    """`others`: checks of a config that depend on what a stage changes."""
    if not config.stages:
        return
    borders = list(_borders(config))
    yield from borders
    yield from _values(config)
    known = list(others(config))
    for stage, given in zip(stages_of(config.data, config.stages), config.stages, strict=True):
        changed = [name for name in ("seq_len", "micro_bsz", "rope_base") if getattr(given, name) is not None]
        if changed and not borders and stage.row_tokens <= MOST_TOKENS:
            for problem in others(in_stage(config, stage)):
                if problem not in known:
                    keys = (*_keys(stage.number, *changed), *problem.keys)
                    yield Problem(keys, f"does not go with {problem.keys[0]}: {problem.text}")


def _keys(number: int, *names: str) -> tuple[str, ...]:
    return (*(f"stages[{number}].{name}" for name in names), "stages")


def _borders(config: Config) -> Iterator[Problem]:
    last, total, before = len(config.stages) - 1, config.data.total_steps, 0
    for number, stage in enumerate(config.stages):
        keys = _keys(number, "until")
        if stage.until is None:
            if number < last:
                text = "found None, expected the step at which the next stage begins; only the last stage has no end"
                yield Problem(keys, f"{text}; add it")
            continue
        if stage.until <= before:
            text = (
                f"found {stage.until}, expected more than the {before} of the stage before it: stages neither overlap"
            )
            yield Problem(keys, f"{text} nor go back; change one of them")
        before = stage.until
        if number == last and stage.until < total:
            text = f"found {stage.until}, before the end of the run: data.total_steps is {total}, and there is no stage"
            yield Problem((*keys, "data.total_steps"), f"{text} after it; remove this until, or add a stage")


def _values(config: Config) -> Iterator[Problem]:
    for number, (stage, resolved) in enumerate(zip(config.stages, stages_of(config.data, config.stages), strict=True)):
        if stage.weights is not None and config.data.train_folder is None:
            text = "found without data.train_folder; set it, or remove weights"
            yield Problem((*_keys(number, "weights"), "data.train_folder"), text)
        if stage.weights == {}:
            text = "found {}, expected the share of at least one data folder; remove it for data.weights"
            yield Problem(_keys(number, "weights"), text)
        for key in epoch_keys(config) if stage.weights is not None else ():
            text = f'found with {key} "epoch": with weights each folder has epochs of its own; give steps'
            yield Problem((*_keys(number, "weights"), key), text)
        if stage.rope_base is not None and config.model.position != "rope":
            text = f"found {stage.rope_base:g} with model.position {config.model.position!r}, which rotates nothing"
            yield Problem((*_keys(number, "rope_base"), "model.position"), f"{text}; remove it")
        if max(resolved.row_tokens, resolved.seq_len) > MOST_TOKENS:
            text = f"found rows of {resolved.row_tokens} tokens, expected at most {MOST_TOKENS}; change the value"
            yield Problem(_keys(number, "seq_len"), text)
