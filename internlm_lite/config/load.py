"""From a config file and the command line to a checked `Config`.

    base files -> the file -> the command line      each a layer, aliases translated, laid over the one before
    defaults taken from other keys                  lr_scheduler.total_steps from data.total_steps, ...
    schema, cross checks                            all problems at once
    check_config                                    again, once the number of processes is known

Nothing here imports torch: a wrong config is refused before a process group or a device is touched.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from internlm_lite.config.aliases import translate
from internlm_lite.config.cross import cross_problems
from internlm_lite.config.keys import known_keys, nearest_name, section_of, value_of
from internlm_lite.config.masking import masked
from internlm_lite.config.overrides import COMMAND_LINE, Overrides, parse_overrides
from internlm_lite.config.plain import one_line
from internlm_lite.config.problems import MOST_PROBLEMS, Problem, schema_problems
from internlm_lite.config.schema import Config
from internlm_lite.config.source import ConfigFile, Layer, run_file
from internlm_lite.errors import ConfigError

_DEFAULT_FROM = {
    "lr_scheduler.total_steps": "data.total_steps",
    "lr_scheduler.noam_width": "model.hidden_size",
    "beta2_scheduler.init_beta2": "adam.adam_beta2",
    "beta2_scheduler.c": "adam.adam_beta2_c",
}


@dataclass(frozen=True)
class LoadedConfig:
    """A checked config, the files it was read from, and the origin of each value."""

    config: Config
    files: tuple[Path, ...]
    """Every file that was run: the config file first, then its bases."""
    origins: Mapping[str, str]
    """Key -> "configs/demo.py:31", "command line", "default" or "default (data.total_steps)"."""
    notes: tuple[str, ...]
    """Lines to print: how aliases were translated, and valid values that contradict each other."""


def load_config(path: Path, overrides: Sequence[str] = ()) -> LoadedConfig:
    """Run the file, apply the overrides, check keys, types and ranges.

    Raises ConfigError that lists all problems, one a line. With wrong keys, it also lists the cross checks that fail
    on the other keys and need no world size.
    """
    path = Path(path)
    wanted = parse_overrides(overrides)
    sources = list(_run_with_bases(path, wanted.variables, ()))
    problems = _unknown_variables(wanted, sources)
    layer, notes = Layer(), []
    for above in [*(source.layer for source in reversed(sources)), wanted.layer]:
        problems = [problem for problem in problems if not _replaces(above, problem.keys[0])]
        translation = translate(above, layer)
        layer.cover(above)
        notes += translation.notes
        problems += translation.problems
        layer.origins.update({key: above.origins[key] for problem in translation.problems for key in problem.keys})
    layer.origins.update(dict.fromkeys(wanted.variables, COMMAND_LINE))
    origins = _origins(layer)
    _fill_defaults(layer, origins)
    config, faults = _validate(layer)
    problems += [fault for fault in faults if not _only_follows(fault.keys[0], faults, origins)]
    if problems or config is None:
        more = [f"{path}: more problems follow; mend these first"] if len(problems) > MOST_PROBLEMS else []
        lines = [problem.line({**origins, **layer.origins}, str(path)) for problem in problems[:MOST_PROBLEMS]]
        raise ConfigError("\n".join(dict.fromkeys(lines + more)))
    notes += [*_replaced_variables(sources, wanted), *_disagreements(config, origins)]
    files = tuple(source.path for source in sources)
    return LoadedConfig(config, files, origins, tuple(str(masked(one_line(note))) for note in notes))


def config_from(config: Config, source: Path, overrides: Sequence[str] = ()) -> LoadedConfig:
    """A config that was read from `source`, such as a checkpoint, with overrides `section.key=value`.

    Raises ConfigError as `load_config`.
    """
    wanted = parse_overrides(overrides)
    if wanted.variables:
        name = next(iter(wanted.variables))
        raise ConfigError(f"{name}=...: {source} has no variables, expected section.key=value; or give --config FILE")
    layer, origin = Layer(config.model_dump()), str(source)
    layer.origins = dict.fromkeys(layer.values, origin)
    translation = translate(wanted.layer, layer)
    layer.cover(wanted.layer)
    found, faults = _validate(layer)
    problems = [*translation.problems, *faults]
    if problems or found is None:
        raise ConfigError("\n".join(problem.line(layer.origins, origin) for problem in problems[:MOST_PROBLEMS]))
    return LoadedConfig(found, (source,), _origins(layer), tuple(translation.notes))


def check_config(loaded: LoadedConfig, world_size: int | None, about: tuple[str, ...] = ("",)) -> None:
    """Raises ConfigError with all problems of keys that begin with one of `about`, one a line. `world_size` None:
    checks that need it are skipped."""
    problems = [found for found in cross_problems(loaded.config, world_size) if found.keys[0].startswith(about)]
    if problems:
        raise ConfigError("\n".join(problem.line(loaded.origins, str(loaded.files[0])) for problem in problems))


def _replaces(above: Layer, key: str) -> bool:
    """Whether `above` sets `key`, invalid below it, to another value; a dict may replace only a part of the value."""
    return above.has(key) and not isinstance(above.get(key), dict)


def _run_with_bases(path: Path, given: Mapping[str, Any], above: tuple[Path, ...]) -> Iterator[ConfigFile]:
    """The file, then its bases, highest precedence first. `given`: variables of command line and files above."""
    if path.resolve() in above:
        chain = " -> ".join(file.name for file in (*above, path))
        raise ConfigError(f"{path}: _base_ runs in a circle: {chain}; remove one of them")
    source = run_file(path, given)
    yield source
    for base in reversed(source.bases):
        yield from _run_with_bases(base, {**source.given, **given}, (*above, path.resolve()))


def _unknown_variables(wanted: Overrides, sources: Sequence[ConfigFile]) -> list[Problem]:
    known = set().union(*(source.variables for source in sources))
    problems = []
    for name in sorted(wanted.variables.keys() - known - {"JOB_NAME"}):
        near = nearest_name(name, sorted(known))
        hint = f"nearest: {near}" if near else f"it has {', '.join(sorted(known)) or 'none'}"
        problems.append(Problem((name,), f"the config file has no variable of this name; {hint}"))
    return problems


def _replaced_variables(sources: Sequence[ConfigFile], wanted: Overrides) -> Iterator[str]:
    above: set[str] = set()
    for source in sources:
        names = sorted(above & source.variables - wanted.variables.keys() - {"JOB_NAME"})
        if names:
            yield f"{source.path}: {', '.join(names)} replaced by the value of the file above it"
        above |= source.given.keys()


def _origins(layer: Layer) -> dict[str, str]:
    leaves = [key for key, field in known_keys().items() if section_of(field) is None]
    return {key: layer.origin(key) if layer.has(key) else "default" for key in leaves}


def _fill_defaults(layer: Layer, origins: dict[str, str]) -> None:
    """Set defaults that are taken from another key. They get no origin in the layer: no file contains them."""
    taken = {
        key: layer.get(source) for key, source in _DEFAULT_FROM.items() if layer.has(source) and not layer.has(key)
    }
    if not layer.has("lr_scheduler.kind") or layer.get("lr_scheduler.kind") != "noam":
        taken.pop("lr_scheduler.noam_width", None)
    if isinstance(layer.get("ckpt.save_ckpt_folder"), str) and not layer.has("ckpt.snapshot_ckpt_folder"):
        taken["ckpt.snapshot_ckpt_folder"] = layer.get("ckpt.save_ckpt_folder").rstrip("/") + "/snapshot"
    layer.values.setdefault("lr_scheduler", {})
    for key, value in taken.items():
        section, _, name = key.partition(".")
        if isinstance(layer.values.setdefault(section, {}), dict):
            layer.values[section][name] = value
            origins[key] = f"default ({_DEFAULT_FROM.get(key, 'ckpt.save_ckpt_folder')})"


def _only_follows(key: str, faults: Sequence[Problem], origins: Mapping[str, str]) -> bool:
    """Whether `key` is set in no file and is invalid only because the key that its default comes from is invalid."""
    source = _DEFAULT_FROM.get(key, "")
    causes = {source, source.rpartition(".")[0]} - {""}
    return origins.get(key, "").startswith("default") and any(fault.keys[0] in causes for fault in faults)


def _validate(layer: Layer) -> tuple[Config | None, list[Problem]]:
    """The config, or None and all problems: those of the schema, and of cross checks on keys that are not faulty."""
    try:
        return Config.model_validate(layer.values), []
    except ValidationError as error:
        problems = schema_problems(error, layer)
    faulty = {problem.keys[0].partition("[")[0] for problem in problems}
    rest = Layer(deepcopy(layer.values))
    for key in faulty:
        if rest.has(key):
            rest.drop(key)
    try:
        config = Config.model_validate(rest.values)
    except ValidationError:  # a required key is missing or invalid
        return None, problems
    return None, problems + [other for other in cross_problems(config, None) if not faulty & set(other.keys)]


def _disagreements(config: Config, origins: Mapping[str, str]) -> Iterator[str]:
    """Pairs of valid keys that contradict each other."""
    for winner, other in _DEFAULT_FROM.items():
        effect = "the schedule decides"
        if winner == "lr_scheduler.total_steps":
            if config.lr_scheduler.kind not in ("cosine", "linear", "wsd"):
                continue
            effect = "the learning rate reaches eta_min at another step than the last"
        first, second = value_of(config, winner), value_of(config, other)
        if first not in (None, second) and origins[other] != "default":
            yield f"{origins[winner]}: {winner}={first} differs from {other}={second} ({origins[other]}): {effect}"
    ckpt, saving = config.ckpt, "ckpt.enable_save_ckpt"
    if ckpt.save_ckpt_folder and ckpt.checkpoint_every and origins[saving] == "default":
        yield f"{origins['ckpt.checkpoint_every']}: nothing is saved: {saving} is False unless it is written"
    least, peak = config.lr_scheduler.eta_min, config.adam.lr
    if least > peak:
        key = "lr_scheduler.eta_min"
        yield f"{origins[key]}: {key}={least:g} is above adam.lr={peak:g}: the learning rate rises after the warm-up"
    parallel, stage = config.parallel, "parallel.zero_stage"
    if parallel.zero_stage > 1 and parallel.zero1 == 1:
        effect = "nothing is shared, for each rank is alone; -1: all ranks that hold the same weights"
        yield f"{origins['parallel.zero1']}: parallel.zero1=1 with {stage}={parallel.zero_stage}: {effect}"
    if parallel.zero_stage < 3 and not parallel.reshard_after_forward:
        key = "parallel.reshard_after_forward"
        yield f"{origins[key]}: {key}=False with {stage}={parallel.zero_stage}: without effect; stage 3 gathers weights"
    share = "model.offload_share"
    if config.model.checkpoint != "offload" and config.model.offload_share != known_keys()[share].default:
        yield f'{origins[share]}: {share}={config.model.offload_share:g} without model.checkpoint="offload": no effect'
    yield from _unreached(config, origins["stages"])


def _unreached(config: Config, origin: str) -> Iterator[str]:
    """A stage that ends after the run. Skipped batches move the end of the run, so nothing is said with them."""
    total, stages = config.data.total_steps, config.stages
    for number, stage in enumerate(stages if total and not config.data.skip_batches else ()):
        later = number + 1 < len(stages)
        if stage.until is not None and (stage.until > total or (later and stage.until == total)):
            effect = "no later stage is reached" if later else "the stage ends there"
            where = f"stages[{number}].until={stage.until}"
            yield f"{origin}: {where}, but the run ends at data.total_steps={total}: {effect}"
            return
