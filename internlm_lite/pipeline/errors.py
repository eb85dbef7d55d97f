"""What torch's pipelining raises, as the error it stands for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from internlm_lite.mesh.comm import GPU_ERRORS, peer_lost
from internlm_lite.mesh.mesh import Group

_TRANSPORT = ("gloo", "nccl", "connection", "timed out", "timeout")
"""Words of messages that come from the transport between two stages, in lower case."""


@contextmanager
def peer_or_own_error(pp: Group) -> Iterator[None]:
    """An error of a stage, which torch wraps once or more, is raised as it was; a lost neighbour as PeerLostError."""
    try:
        yield
    except RuntimeError as error:
        inner: BaseException = error
        while isinstance(inner, RuntimeError) and inner.__cause__ is not None:
            inner = inner.__cause__
        if inner is not error:
            raise inner from inner.__cause__
        if not isinstance(error, GPU_ERRORS) and any(word in str(error).lower() for word in _TRANSPORT):
            raise peer_lost(pp, error) from error
        raise
