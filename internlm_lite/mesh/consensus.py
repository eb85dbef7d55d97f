"""Run work that may fail on some ranks so that either every rank continues or every rank raises the same error.

on_main(mesh, work)   rank 0 works, all get its result        on_all(mesh, work)   every rank works
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar, cast

from internlm_lite.errors import (
    CheckpointError,
    ConfigError,
    DamagedError,
    DataError,
    InternLMError,
    MissingPackageError,
    NumericsError,
    StorageError,
)
from internlm_lite.mesh import comm
from internlm_lite.mesh.mesh import Mesh

T = TypeVar("T")
Failure = tuple[type[InternLMError], str]

# When ranks fail with different errors, the first class of this list is raised: DamagedError, on which the loader tries
# an older checkpoint, only when every failure is damage; a storage error does not mean that the checkpoint is bad.
_ORDER = (
    StorageError,
    ConfigError,
    MissingPackageError,
    DataError,
    NumericsError,
    CheckpointError,
    DamagedError,
)


def on_all(mesh: Mesh, work: Callable[[], T]) -> T:
    """Run `work` on every rank and return this rank's result. Collective, but `work` must not contain collectives.

    If it fails on any rank, every rank raises the same InternLMError, which names the failed ranks."""
    result, failure, caught = _attempt(work)
    _raise_same(comm.gather_objects(failure, mesh.world), caught)
    return cast(T, result)


def on_main(mesh: Mesh, work: Callable[[], T]) -> T:
    """Run `work`, which must not contain collectives, on rank 0; all ranks return its result or raise its error."""
    result, failure, caught = _attempt(work) if mesh.is_main else (None, None, None)
    result, failure = comm.broadcast_object((result, failure), mesh.world)
    _raise_same([failure], caught)
    return cast(T, result)


def _attempt(work: Callable[[], T]) -> tuple[T | None, Failure | None, Exception | None]:
    try:
        return work(), None, None
    except Exception as error:  # noqa: BLE001  raised again, on all ranks
        return None, (_kind(error), _text(error)), error  # raised by `_raise_same`


def _kind(error: Exception) -> type[InternLMError]:
    return next((kind for kind in reversed(_ORDER) if isinstance(error, kind)), CheckpointError)


def _text(error: Exception) -> str:
    return str(error) if isinstance(error, InternLMError) else f"{type(error).__name__}: {error}"


def _raise_same(failures: Sequence[Failure | None], caught: Exception | None) -> None:
    """Raise the same error on all ranks if any failed. A rank whose own error is not an InternLMError, hence a bug,
    raises that one, with its traceback."""
    if not any(failures):
        return
    if caught is not None and not isinstance(caught, InternLMError):
        raise caught
    ranks: dict[str, list[int]] = {}
    kinds = set()
    for rank, failure in enumerate(failures):
        if failure is not None:
            kinds.add(failure[0])
            ranks.setdefault(failure[1], []).append(rank)
    if len(failures) == 1 or any(len(which) == len(failures) for which in ranks.values()):
        text = "\n".join(ranks)
    else:
        text = "\n".join(_named(which, message) for message, which in ranks.items())
    agreed = next(kind for kind in _ORDER if kind in kinds)(text)
    agreed.culprit_ranks = tuple(rank for rank, failure in enumerate(failures) if failure is not None)
    raise agreed from caught


def _named(ranks: list[int], message: str) -> str:
    """`message` prefixed by its ranks, unless it already starts with them."""
    prefix = f"rank {', '.join(map(str, ranks))}: "
    return message if message.startswith(prefix) else prefix + message
