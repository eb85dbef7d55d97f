"""How many micro-batches a pipeline rank keeps at a time: the planner's figure against a real step."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from internlm_lite.apps.planner.holdings import holdings
from internlm_lite.apps.planner.memory import row_shape, stage_bytes
from internlm_lite.apps.planner.schedule import actions_of, moments
from internlm_lite.layers.flash import AttentionBackend
from internlm_lite.mesh.mesh import Mesh, sizes_of
from internlm_lite.train.trainer import Trainer
from tests.apps.planner.steps import random_batch, run_step, small
from tests.torches import HAS_ZBV
from tests.world import run_world


class Ledger:
    """Bytes of saved tensors alive at a time, each storage once; `known` storages are not counted."""

    def __init__(self, known: set[int]) -> None:
        self._known = known
        self._uses: dict[int, int] = {}
        self._bytes = 0
        self.most = 0

    def keep(self, tensor: torch.Tensor) -> Entry:
        return Entry(self, tensor)

    def enter(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        uses = self._uses[storage.data_ptr()] = self._uses.get(storage.data_ptr(), 0) + 1
        if uses == 1 and storage.data_ptr() not in self._known:
            self._bytes += storage.nbytes()
            self.most = max(self.most, self._bytes)

    def leave(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        uses = self._uses[storage.data_ptr()] = self._uses[storage.data_ptr()] - 1
        if uses == 0 and storage.data_ptr() not in self._known:
            self._bytes -= storage.nbytes()


class Entry:
    """One saved tensor, for as long as autograd keeps it."""

    def __init__(self, ledger: Ledger, tensor: torch.Tensor) -> None:
        self.ledger, self.tensor = ledger, tensor
        ledger.enter(tensor)

    def __del__(self) -> None:
        self.ledger.leave(self.tensor)


def _most_kept(mesh: Mesh, sections: dict[str, dict[str, Any]]) -> int:
    config = small(**sections)
    trainer = Trainer(config, mesh)
    run_step(trainer, random_batch(config, mesh))
    # Kept from step to step: parameters, and the buffers in which stages receive.
    stages = trainer.engine._built[1]
    stages = stages._stages if hasattr(stages, "_stages") else [stages._stage]
    buffers = [info.buffer for stage in stages for infos in stage.args_recv_info.values() for info in infos]
    params = [param for stage in trainer.stages.values() for param in stage.parameters()]
    ledger = Ledger({tensor.untyped_storage().data_ptr() for tensor in (*params, *buffers) if tensor is not None})
    batch = random_batch(config, mesh)
    for tensor in (batch.tokens, batch.labels, batch.positions):
        ledger._known.add(tensor.untyped_storage().data_ptr())
    with torch.autograd.graph.saved_tensors_hooks(ledger.keep, lambda entry: entry.tensor):
        run_step(trainer, batch, step=1)
    return ledger.most


@pytest.mark.parametrize(
    ("world", "sections"),
    [
        (2, {"parallel": {"pipeline": {"size": 2}}}),
        (4, {"parallel": {"pipeline": {"size": 4}}, "data": {"micro_num": 6}}),
        (2, {"parallel": {"pipeline": {"size": 2}}, "model": {"num_chunks": 2}}),
        *[(2, {"parallel": {"pipeline": {"size": 2, "schedule": "zbv"}}, "model": {"num_chunks": 2}})] * HAS_ZBV,
    ],
    ids=["1f1b 2", "1f1b 4", "interleaved", *["zbv"] * HAS_ZBV],
)
def test_a_rank_keeps_as_much_as_planned(world: int, sections: dict[str, dict[str, Any]]) -> None:
    config = small(**sections)
    held, _ = holdings(config, sizes_of(world, 1, world, -1), AttentionBackend.SDPA)
    row = row_shape(config, AttentionBackend.SDPA, "cpu")
    orders = actions_of(config.schedule, world, config.model.num_chunks, config.data.micro_num)
    for own, order, found in zip(held, orders, run_world(_most_kept, world, (sections,), pipeline=world), strict=True):
        each = {}
        for number, stage in own.stages.items():
            terms = stage_bytes(stage, row, 0)
            # Kept by torch's pipelining and by the loss, past the hooks of saved tensors.
            each[number] = sum(terms.values()) - terms["stage outputs"] - terms.get("head", 0)
            if number - 1 in each:  # its input is no receive buffer but the output of the stage before
                each[number] += terms["stage outputs"]
        assert found == max(sum(each[stage] * n for stage, n in kept.items()) for kept, _ in moments(order))
