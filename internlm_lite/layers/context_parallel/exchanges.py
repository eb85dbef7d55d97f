"""How the queries of a context-parallel rank meet the keys of the others: parallel.context.exchange."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from internlm_lite.layers.context_parallel.key_gather import gathered
from internlm_lite.layers.context_parallel.ring import ring
from internlm_lite.layers.context_parallel.row import ContextRow
from internlm_lite.layers.context_parallel.ulysses import ulysses
from internlm_lite.layers.flash import Attend, AttentionBackend
from internlm_lite.layers.scores import Drop
from internlm_lite.mesh.mesh import Group

Exchange = Callable[[ContextRow, Group, AttentionBackend, Drop | None], Attend]
"""(row, context-parallel group, kernel, what drops weights) -> attention of this rank's tokens, collective in each
call. What drops weights is given numbers of tokens of the whole row, and of heads of this tensor-parallel rank."""

EXCHANGES: Mapping[str, Exchange] = {"gather": gathered, "ring": ring, "ulysses": ulysses}
