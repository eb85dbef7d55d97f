"""Whether a thread waits for other ranks, read from its stack by another thread without slowing it down."""

from __future__ import annotations

import os
import sys
import threading

import torch
import torch.distributed as dist

from internlm_lite.mesh import comm

_WAITING = (os.path.join(os.path.dirname(dist.__file__), ""), os.path.join(os.path.dirname(torch.cuda.__file__), ""))


def waits_for_others(thread: threading.Thread) -> bool:
    """Whether `thread` is in a collective, a send or a receive, or waits for its GPU, which may wait in NCCL.

    These are C++ functions, called from few files. Only the innermost Python frame counts, as a layer that hangs in
    its own code has frames of torch's pipeline schedules around it.
    """
    frame = sys._current_frames().get(thread.ident or 0)
    file = frame.f_code.co_filename if frame else ""
    return file == comm.__file__ or file.startswith(_WAITING)
