"""An average of checkpoints of one model, from any layouts, as a checkpoint of weights alone.

    merged = x_1 + (sum of w_i * (x_i - x_1)) / (sum of w_i)        w_i: weights; x_i: masters of the i-th checkpoint

in float64, rounded once; so what all of them hold stays as it is, to the bit. Tensors are read and written in parts of
a few megabytes, whatever the model's size. Checkpoints of the stable phase, averaged, take the place of a decay of the
learning rate: arXiv:2507.17634 (WSM); equal and linearly rising weights: arXiv:2505.12082.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import reduce
from typing import Any, Literal

import torch

from internlm_lite.checkpoint.format.catalog import Found
from internlm_lite.checkpoint.format.manifest import Name, TensorEntry
from internlm_lite.checkpoint.format.tensor_file import BLOCK_BYTES, DTYPE_NAMES, DTYPES, TensorFile
from internlm_lite.checkpoint.format.weight_roles import MASTER
from internlm_lite.checkpoint.load.compare import other_function
from internlm_lite.checkpoint.load.reader import Reader
from internlm_lite.checkpoint.save.commit import Facts
from internlm_lite.checkpoint.save.write_alone import require_empty, whole_master, write_alone
from internlm_lite.checkpoint.save.write_plan import WriteItem
from internlm_lite.checkpoint.storage.base import Storage
from internlm_lite.checkpoint.storage.run_lock import held
from internlm_lite.errors import CheckpointError, ConfigError
from internlm_lite.mesh.layout import LocalShard
from internlm_lite.mesh.mesh import Sizes

Method = Literal["mean", "linear"]
_PART = BLOCK_BYTES // 4
"""Elements at a time: whole blocks of fp32 and of fp64."""
_LINES = 8


@dataclass(frozen=True)
class MergeSource:
    """A checkpoint to average, and its weight: its share is this over the sum of all."""

    found: Found
    weight: float


def weights_of(count: int, method: Method, given: Sequence[float] | None = None) -> list[float]:
    """Weights of `count` checkpoints: `given` ones; else equal ("mean"), or 1, 2, 3, ... ("linear").

    Raises ConfigError for another number of them, or numbers without a finite sum other than 0."""
    if given is None:
        return [1.0 if method == "mean" else float(n) for n in range(1, count + 1)]
    if len(given) != count:
        raise ConfigError(f"--weights: found {len(given)} numbers for {count} checkpoints, expected one for each")
    fits = math.isfinite(sum(map(abs, given)))
    total = math.fsum(given) if fits else math.nan
    if not total or not math.isfinite(total):
        listed = ",".join(f"{one:g}" for one in given)
        raise ConfigError(f"--weights {listed}: expected finite numbers whose sum is not 0")
    return list(given)


def merge(
    out: Storage,
    sources: Sequence[MergeSource],
    provenance: Mapping[str, Any],
    done: Callable[[str], object] = lambda name: None,
) -> tuple[Name, int, int]:
    """Write the average of the sources' masters into the save folder `out`, which must hold no checkpoint; (name of the
    checkpoint, tensors, bytes).

    `provenance`: facts for its manifest, besides the checkpoints and their weights; `done` is called with the name of
    each written tensor. Raises CheckpointError if the checkpoints are not of one model, DamagedError, StorageError.
    """
    entries = _tensors(sources)
    newest = max((source.found for source in sources), key=lambda found: (found.step, found.order))
    merged = [
        {"name": one.found.name, "folder": one.found.storage.name, "step": one.found.step, "weight": one.weight}
        for one in sources
    ]
    state = {"merged": {**provenance, "checkpoints": merged}}
    facts = Facts("final", {"world": 1, **asdict(Sizes())}, newest.manifest.config, state)
    tensors = [whole_master(name, entry.shape, DTYPE_NAMES[dtype]) for name, (entry, dtype) in entries.items()]
    with held(out):
        require_empty(out)
        name, n_bytes = write_alone(out, newest.step, tensors, lambda items: _MergedFile(items, sources, done), facts)
    return name, len(tensors), n_bytes


def _tensors(sources: Sequence[MergeSource]) -> dict[str, tuple[TensorEntry, torch.dtype]]:
    """name -> (entry of the first source, widest dtype of all). Raises CheckpointError."""
    first, *others = [source.found for source in sources]
    have = first.manifest.tensors.get(MASTER, {})
    for other in others:
        problems = list(_differences(have, other.manifest.tensors.get(MASTER, {})))
        problems += other_function(first, other.manifest.config)
        if problems:
            more = [f"... and {len(problems) - _LINES} more"] if len(problems) > _LINES else []
            raise CheckpointError(
                f"checkpoint {other.name} in {other.storage.name} is of another model than {first.name} in "
                f"{first.storage.name}; expected checkpoints of one model:\n  "
                + "\n  ".join([*problems[:_LINES], *more])
            )
    found = {}
    for name, entry in have.items():
        dtypes = [DTYPES[one.manifest.tensors[MASTER][name].dtype] for one in (first, *others)]
        if not all(dtype.is_floating_point for dtype in dtypes):
            raise CheckpointError(
                f"{MASTER} of {name} in {first.manifest_path}: {entry.dtype}, expected floating point numbers"
            )
        found[name] = entry, reduce(torch.promote_types, dtypes)
    return found


def _differences(one: Mapping[str, TensorEntry], other: Mapping[str, TensorEntry]) -> Iterator[str]:
    for name in sorted(one.keys() | other.keys()):
        shapes = [list(entry.shape) if (entry := of.get(name)) else "nothing" for of in (one, other)]
        if shapes[0] != shapes[1]:
            yield f"{name}: {shapes[1]} here, {shapes[0]} there"


class _MergedFile(TensorFile):
    """The averaged tensors, computed while they are written."""

    def __init__(
        self, items: Sequence[WriteItem], sources: Sequence[MergeSource], done: Callable[[str], object]
    ) -> None:
        dtypes = {item.key: DTYPES[item.shard.dtype] for item in items}
        super().__init__(
            {item.key: torch.empty(item.shard.shape, dtype=dtypes[item.key], device="meta") for item in items}
        )
        self._names = {item.key: item.shard.name for item in items}
        self._readers = [(Reader(source.found), source.weight) for source in sources]
        self._total = math.fsum(source.weight for source in sources)
        self._done = done
        # Reused: freed memory of these sizes would not be returned to the system.
        self._parts = torch.empty(3, _PART, dtype=torch.float64)
        for reader, _ in self._readers:
            for file in reader.found.manifest.files:
                reader.check_file(file)

    def blocks_of(self, key: str, tensor: torch.Tensor) -> Iterator[memoryview]:
        """Raises CheckpointError for numbers that are not finite."""
        name, rounded = self._names[key], torch.empty(min(_PART, tensor.numel()), dtype=tensor.dtype)
        for start in range(0, tensor.numel(), _PART):
            span = (start, min(start + _PART, tensor.numel()))
            part = rounded[: span[1] - start].copy_(self._average(name, tuple(tensor.shape), span))
            if not torch.isfinite(part).all():
                raise CheckpointError(f"{name}: the average has numbers that are not finite; choose other checkpoints")
            data = part.view(torch.uint8).numpy().tobytes()  # which is read while the next part is computed
            yield from (memoryview(data)[at : at + BLOCK_BYTES] for at in range(0, len(data), BLOCK_BYTES))
        self._done(name)

    def _average(self, name: str, shape: tuple[int, ...], span: tuple[int, int]) -> torch.Tensor:
        """Elements of a tensor in row-major order, fp64; overwritten by the next call."""
        first, change, other = self._parts[:, : span[1] - span[0]]
        (reader, _), *others = self._readers
        _read(reader, name, shape, span, first)
        change.zero_()
        for reader, weight in others:
            _read(reader, name, shape, span, other)
            change.add_(other.sub_(first), alpha=weight)
        torch.add(first, change.div_(self._total), out=other)
        return torch.where(change == 0, first, other, out=other)  # -0 stays -0


def _read(reader: Reader, name: str, shape: tuple[int, ...], span: tuple[int, int], part: torch.Tensor) -> None:
    """Into `part`, fp64, and so exact."""
    reader.fill(LocalShard(name, MASTER, shape, tuple((0, n) for n in shape), span, part))
