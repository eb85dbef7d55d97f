"""The last check of a config, once the number of processes is known."""

from __future__ import annotations

from internlm_lite.config.cross import cross_problems
from internlm_lite.config.load import LoadedConfig
from internlm_lite.errors import ConfigError


def check_config(loaded: LoadedConfig, world_size: int | None) -> None:
    """Raises ConfigError with all problems, one a line. world_size None: checks that need it are left out."""
    problems = list(cross_problems(loaded.config, world_size))
    if problems:
        raise ConfigError("\n".join(problem.line(loaded.origins, str(loaded.files[0])) for problem in problems))
