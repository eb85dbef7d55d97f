"""A run that goes on with another number of ranks keeps its global batch: the curve, and which data come when."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from internlm_lite.config.schema import Config
from internlm_lite.train.save_folders import LastRun

logger = logging.getLogger("internlm_lite")


def batch_keys(data: Mapping[str, Any]) -> tuple[object, ...]:
    """What says the size of a step's batch, besides the number of ranks, in a resolved `data` section."""
    return tuple(data.get(key) for key in ("micro_num", "micro_bsz", "seq_len", "rampup_batch_size"))


def keep_global_batch(config: Config, last: LastRun | None, dp_size: int) -> Config:
    """`config`, with as many micro-batches as make a step of `last`'s tokens on `dp_size` data-parallel ranks.

    Only where nothing but the number of ranks has changed: whoever edits the batch's keys, or ramps its size up, means
    it. Where the tokens cannot be divided, the config stays as it is, and the resume warns of it.
    """
    data = config.data
    a_batch = data.micro_bsz * data.seq_len * dp_size
    if last is None or batch_keys(last.data) != batch_keys(data.model_dump()) or data.rampup_batch_size:
        return config
    if last.batch_tokens == a_batch * data.micro_num or last.batch_tokens % a_batch:
        return config
    micro_num = last.batch_tokens // a_batch
    logger.info(
        f"data.micro_num={micro_num} instead of {data.micro_num}: with {dp_size} data-parallel ranks now, a step takes "
        f"the same {last.batch_tokens} tokens as before"
    )
    return config.model_copy(update={"data": data.model_copy(update={"micro_num": micro_num})})
