"""Every collective on two and three ranks, and which of its errors mean a lost peer."""

from __future__ import annotations

import pytest
import torch

from internlm_lite.errors import PeerLostError
from internlm_lite.mesh import comm
from internlm_lite.mesh.comm import peer_errors
from internlm_lite.mesh.mesh import Group, Mesh, single_process_mesh
from tests.world import run_world


def _collectives(mesh: Mesh) -> dict[str, list]:
    """Rank r begins with the shards [10 r, 10 r + 1, ...], one element each."""
    group, rank, size = mesh.dp, mesh.dp.rank, mesh.dp.size
    mine = torch.arange(size, dtype=torch.float64) + 10 * rank
    reduced, copied, scattered, gathered, swapped = (mine.clone() for _ in range(5))
    received = torch.empty_like(mine)
    comm.all_reduce(reduced, group).wait()
    comm.broadcast(copied, group, source=size - 1).wait()
    comm.reduce_scatter(scattered[rank : rank + 1], scattered, group).wait()
    work = comm.all_gather(gathered, group)
    work.wait()
    work.wait()  # a second time does nothing
    comm.all_to_all(received, swapped, group).wait()
    neighbour = torch.empty(1, dtype=torch.float64)
    works = [comm.send(mine[:1], group, (rank + 1) % size), comm.receive(neighbour, group, (rank - 1) % size)]
    for each in works:
        each.wait()
    comm.meet(group, mesh.device)
    passed = torch.full((1,), -1.0, dtype=torch.float64)  # from rank 0 to rank 1, and nothing else
    sends, receives = (mine[-1:], 1) if rank == 0 else None, (passed, 0) if rank == 1 else None
    comm.send_and_receive(sends, receives, group).wait()
    turned = torch.empty(1, dtype=torch.float64)
    comm.send_and_receive((mine[:1], (rank + 1) % size), (turned, (rank - 1) % size), group).wait()
    return {
        "all_reduce": reduced.tolist(),
        "broadcast": copied.tolist(),
        "reduce_scatter": scattered[rank : rank + 1].tolist(),
        "all_gather": gathered.tolist(),
        "all_to_all": received.tolist(),
        "receive": neighbour.tolist(),
        "send_and_receive": [passed.item(), turned.item()],
        "gather_objects": comm.gather_objects({"rank": rank}, group),
        "broadcast_object": [comm.broadcast_object(("from", rank), group)],
    }


@pytest.mark.parametrize("size", [2, 3])
def test_every_collective(size: int) -> None:
    ranks = range(size)
    for rank, found in enumerate(run_world(_collectives, size)):
        assert found == {
            "all_reduce": [sum(10 * r + i for r in ranks) for i in ranks],
            "broadcast": [10 * (size - 1) + i for i in ranks],
            "reduce_scatter": [sum(10 * r + rank for r in ranks)],
            "all_gather": [10 * r + r for r in ranks],
            "all_to_all": [10 * r + rank for r in ranks],
            "receive": [10 * ((rank - 1) % size)],
            "send_and_receive": [size - 1 if rank == 1 else -1, 10 * ((rank - 1) % size)],
            "gather_objects": [{"rank": r} for r in ranks],
            "broadcast_object": [("from", 0)],
        }


def test_a_group_of_one_is_the_identity() -> None:
    group: Group = single_process_mesh().dp
    tensor = torch.arange(4.0)
    for work in (comm.all_reduce(tensor, group), comm.broadcast(tensor, group), comm.all_gather(tensor, group)):
        work.wait()
    comm.reduce_scatter(tensor, tensor, group).wait()
    assert tensor.tolist() == [0, 1, 2, 3]
    assert comm.gather_objects("mine", group) == ["mine"] and comm.broadcast_object("mine", group) == "mine"


@pytest.mark.parametrize(
    ("raised", "told"),
    [
        (torch.OutOfMemoryError, torch.OutOfMemoryError),
        (torch.AcceleratorError, torch.AcceleratorError),
        (torch.distributed.DistBackendError, PeerLostError),
        (RuntimeError, PeerLostError),
    ],
)
def test_this_ranks_own_faults_are_not_blamed_on_a_peer(raised, told):
    with pytest.raises(told), peer_errors(single_process_mesh().dp):
        raise raised("CUDA error: an illegal memory access was encountered")
