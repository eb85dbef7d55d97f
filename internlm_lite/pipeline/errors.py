"""What torch's pipelining raises, as the error it stands for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from internlm_lite.errors import InternLMError
from internlm_lite.mesh.comm import peer_lost
from internlm_lite.mesh.mesh import Group

_TRANSPORT = ("gloo", "nccl", "connection", "timed out", "timeout")
"""Words of messages that come from the transport between two stages, in lower case."""


@contextmanager
def peer_or_own_error(pp: Group) -> Iterator[None]:
    """An error of ours that torch has wrapped is raised as it was; a lost neighbour as PeerLostError."""
    try:
        yield
    except RuntimeError as error:
        inner: BaseException | None = error
        while inner is not None:
            if isinstance(inner, InternLMError):
                raise inner from error
            inner = inner.__cause__
        if error.__cause__ is None and any(word in str(error).lower() for word in _TRANSPORT):
            raise peer_lost(pp, error) from error
        raise
