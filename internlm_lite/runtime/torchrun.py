"""Writes why a rank fails to the file that torchrun's agent reads, so that its summary at the end shows the cause.

The format is {"message": {"message": text, "extraInfo": {"timestamp": seconds since the epoch, as text}}}; the agent
takes the earliest for the cause (torch.distributed.elastic.multiprocessing.errors).
"""

from __future__ import annotations

import json
import logging
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from internlm_lite.config.masking import masked
from internlm_lite.errors import InternLMError, PeerLostError

logger = logging.getLogger("internlm_lite")


@contextmanager
def report_to_agent(file: Path | None) -> Iterator[None]:
    """Report an exception that leaves this block to the agent: our errors as their message, others with a traceback."""
    try:
        yield
    except InternLMError as error:
        write_agent_error(file, f"{type(error).__name__}: {error}", follows=isinstance(error, PeerLostError))
        raise
    except Exception:
        write_agent_error(file, traceback.format_exc())
        raise


def write_agent_error(file: Path | None, text: str, *, follows: bool = False) -> None:
    """`file`: `DistEnv.error_file`; None: do nothing. `follows`: a consequence of another rank's failure.

    An error while writing is only logged, as the process is ending.
    """
    if file is None:
        return
    now = int(time.time()) + follows  # whole seconds: a consequence in the same second must not look like the cause
    message = {"message": str(masked(text)), "extraInfo": {"timestamp": str(now)}}
    temporary = file.with_name(f"{file.name}.tmp")  # the agent may read at any time, and fails on an incomplete file
    try:
        temporary.write_text(json.dumps({"message": message}), encoding="utf-8")
        temporary.replace(file)
    except OSError as error:
        logger.warning("cannot write %s for torchrun: %s", file, error.strerror)
