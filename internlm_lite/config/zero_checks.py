"""Checks of ZeRO's stage against the pipeline."""

from __future__ import annotations

from collections.abc import Iterator

from internlm_lite.config.problems import Problem
from internlm_lite.config.schema import Config


def zero_problems(config: Config) -> Iterator[Problem]:
    """Stage 3 with several chunks a rank: between the passes of one, the weights of the others would have to come and
    go in the order of the schedule, and deferred gradients read inputs of blocks long done."""
    parallel, chunks = config.parallel, config.model.num_chunks
    if parallel.zero_stage == 3 and chunks > 1:
        yield Problem(
            ("parallel.zero_stage", "model.num_chunks"),
            f'found 3 with {chunks} chunks ({config.schedule}), expected one, as with "1f1b"; set zero_stage to 2, or '
            "num_chunks to 1",
        )
