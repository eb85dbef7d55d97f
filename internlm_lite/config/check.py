"""The last check of a config, once the number of processes is known."""

from __future__ import annotations

from collections.abc import Iterator

from internlm_lite.config.cross import cross_problems
from internlm_lite.config.load import LoadedConfig
from internlm_lite.config.problems import Problem
from internlm_lite.config.schema import Config
from internlm_lite.errors import ConfigError


def check_config(loaded: LoadedConfig, world_size: int | None) -> None:
    """Raises ConfigError with all problems, one a line. world_size None: checks that need it are left out."""
    problems = list(cross_problems(loaded.config, world_size)) or list(_not_built(loaded.config))
    if problems:
        raise ConfigError("\n".join(problem.line(loaded.origins, str(loaded.files[0])) for problem in problems))


def _not_built(config: Config) -> Iterator[Problem]:
    """Layouts that this version cannot run yet."""
    for key, asked in (
        ("parallel.pipeline.size", config.parallel.pipeline.size > 1),
        ("model.num_chunks", config.model.num_chunks > 1),
        ("parallel.sequence_parallel", config.parallel.sequence_parallel),
    ):
        if asked:
            value = "False" if key.endswith("sequence_parallel") else "1"
            yield Problem((key,), f"not available in this version; set it to {value}")
