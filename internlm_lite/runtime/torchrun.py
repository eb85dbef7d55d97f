"""Why a rank fails, in the file that torchrun's agent reads: its summary, the last thing on the screen, then says so.

The agent wants {"message": {"message": text, "extraInfo": {"timestamp": seconds since the epoch, as text}}}, and takes
the earliest for the cause (torch.distributed.elastic.multiprocessing.errors).
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
def agent_told(file: Path | None) -> Iterator[None]:
    """Tell the agent of an error that leaves this block: one of ours in its own words, others with their traceback."""
    try:
        yield
    except InternLMError as error:
        tell_agent(file, f"{type(error).__name__}: {error}", follows=isinstance(error, PeerLostError))
        raise
    except Exception:
        tell_agent(file, traceback.format_exc())
        raise


def tell_agent(file: Path | None, text: str, *, follows: bool = False) -> None:
    """`file`: `Place.error_file`; nobody is told without one. `follows`: from the failure of another rank.

    The process is ending: what hinders this is only logged.
    """
    if file is None:
        return
    now = int(time.time()) + follows  # whole seconds: what follows at once must not look like the cause
    message = {"message": str(masked(text)), "extraInfo": {"timestamp": str(now)}}
    temporary = file.with_name(f"{file.name}.tmp")  # the agent may look at any time, and fails over half a file
    try:
        temporary.write_text(json.dumps({"message": message}), encoding="utf-8")
        temporary.replace(file)
    except OSError as error:
        logger.warning("cannot write %s for torchrun: %s", file, error.strerror)
