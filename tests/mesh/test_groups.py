"""How process groups are made: few calls, the same on every rank, and objects on the CPU."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from internlm_lite.apps.bench.gpu.two_ranks import as_own_host
from internlm_lite.errors import PeerLostError
from internlm_lite.mesh import comm
from internlm_lite.mesh.consensus import on_all, on_main
from internlm_lite.mesh.mesh import Group, Mesh, Sizes, axis_groups, build_mesh
from tests.world import run_world

TIMEOUT = timedelta(seconds=61)
GPU = torch.device("cuda", 0)
AXES = ("dp", "cp", "tp", "pp", "zero", "replica", "ends")
LAYOUTS = [Sizes(dp=2, tp=2, pp=3, zero=2), Sizes(dp=12, zero=3), Sizes(dp=3, tp=4, zero=1), Sizes(dp=1, pp=12)]
LAYOUTS += [Sizes(dp=2, cp=3, pp=2, zero=3), Sizes(cp=4, tp=2, zero=2)]


@contextmanager
def fake_world(rank: int, size: int, backend: str = "fake", bound: torch.device | None = None) -> Iterator[None]:
    dist.init_process_group(backend, rank=rank, world_size=size, store=FakeStore())
    try:
        assert dist.group.WORLD is not None
        dist.group.WORLD.bound_device_id = bound  # as init_process_group(device_id=...) does where there is a GPU
        yield
    finally:
        dist.destroy_process_group()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """(function, arguments) of the calls that make groups. Those of NCCL and gloo are not carried out."""
    made: list[tuple[str, dict[str, Any]]] = []
    new_group = dist.new_group

    def recorded_new(ranks: Any = None, **options: Any) -> Any:
        made.append(("new_group", {"ranks": ranks, **options}))
        return None if options.get("backend") == "gloo" else new_group(ranks, **options)

    monkeypatch.setattr(dist, "new_group", recorded_new)
    monkeypatch.setattr(dist, "split_group", lambda **options: made.append(("split_group", options)))
    return made


# One call per group, on every rank, is 3,361 calls in the first of these layouts.
@pytest.mark.parametrize(("bound", "function"), [(None, "new_group"), (GPU, "split_group")])
@pytest.mark.parametrize(
    ("sizes", "axes"),
    [
        (Sizes(dp=128, tp=8, pp=4, zero=8), {"tp", "pp", "dp", "zero", "replica", "ends"}),
        (Sizes(dp=4096, zero=4096), {"dp", "zero"}),
        (Sizes(dp=32, tp=8, pp=16, zero=32), {"tp", "pp", "dp", "zero", "ends"}),
    ],
)
def test_4096_ranks_make_one_call_for_each_axis(
    sizes: Sizes, axes: set[str], bound: torch.device | None, function: str, calls: Any
) -> None:
    with fake_world(37, sizes.world, bound=bound):
        build_mesh(sizes, 37, torch.device("cpu"), TIMEOUT)
    assert {options["group_desc"] for _, options in calls} == axes | {"world"} and len(calls) == len(axes) + 1
    assert {name for name, _ in calls} == {function}
    assert all(options["timeout"] == TIMEOUT for _, options in calls)


# new_group hangs when the default group is bound to a device: torch then splits its communicator, which all ranks of
# the parent must do. So every rank makes the same calls, with the same arguments.
@pytest.mark.parametrize("sizes", LAYOUTS)
def test_all_ranks_split_the_communicator_of_the_world_in_the_same_order(sizes: Sizes, calls: Any) -> None:
    logs = []
    for rank in range(sizes.world):
        with fake_world(rank, sizes.world, "cuda:fake", GPU):
            build_mesh(sizes, rank, GPU, TIMEOUT)
        logs.append(calls.copy())
        calls.clear()
    assert all(log == logs[0] for log in logs)
    *splits, objects = logs[0]
    assert objects[0] == "new_group" and objects[1] == {
        **{"ranks": None, "backend": "gloo", "timeout": TIMEOUT},
        "group_desc": "objects",
    }
    for name, options in splits:
        assert name == "split_group"
        partition = [list(ranks) for ranks in axis_groups(sizes)[options["group_desc"]]]
        assert options["split_ranks"] == partition
        assert all(ranks == sorted(ranks) for ranks in partition), "split_group sorts them, so ours must be sorted"


# TORCH_DISTRIBUTED_DEBUG=DETAIL puts a wrapper around NCCL that split_group refuses.
@pytest.mark.parametrize("sizes", LAYOUTS)
def test_with_torchs_checks_of_collectives_all_ranks_make_every_group(
    sizes: Sizes, calls: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("internlm_lite.mesh.mesh.get_debug_level", lambda: dist.DebugLevel.DETAIL)
    logs = []
    for rank in range(sizes.world):
        with fake_world(rank, sizes.world, bound=GPU):
            mesh = build_mesh(sizes, rank, GPU, TIMEOUT)
            for group in (mesh.axis(axis) for axis in AXES if mesh.axis(axis).size > 1):
                assert group.process_group is not None
                assert dist.get_process_group_ranks(group.process_group) == list(group.ranks)
        logs.append(calls.copy())
        calls.clear()
    assert all(log == logs[0] for log in logs)
    made = [(options["group_desc"], options["ranks"]) for _, options in logs[0]]
    partitions = axis_groups(sizes).items()
    assert made == [(axis, ranks) for axis, part in partitions if len(part) < sizes.world for ranks in part]


# Where only members make a group, torch names it by its ranks and by how many groups a rank has made: ranks that count
# differently would wait for each other under different names.
@pytest.mark.parametrize("sizes", LAYOUTS)
def test_members_give_a_group_the_same_name_and_axes_share_none(sizes: Sizes) -> None:
    names: dict[tuple[str, tuple[int, ...]], set[str]] = defaultdict(set)
    for rank in range(sizes.world):
        with fake_world(rank, sizes.world):
            for again in range(2):
                mesh = build_mesh(sizes, rank, torch.device("cpu"), TIMEOUT)
                for group in map(mesh.axis, AXES):
                    assert (group.process_group is None) == (group.size == 1)
                    if group.process_group is not None:
                        assert dist.get_process_group_ranks(group.process_group) == list(group.ranks)
                        names[f"{group.name} {again}", group.ranks].add(group.process_group.group_name)
    assert all(len(found) == 1 for found in names.values())
    assert len(set.union(*names.values())) == len(names), "equal ranks on two axes are two groups, which may overlap"


def test_the_world_is_a_group_of_its_own() -> None:
    """Other libraries use the default group, perhaps in a thread: torch's distributed checkpoints do."""
    with fake_world(1, 4):
        mesh = build_mesh(Sizes(dp=4, zero=4), 1, torch.device("cpu"), TIMEOUT)
        assert mesh.world.process_group not in (None, dist.group.WORLD) and mesh.world.object_group is None


def test_a_rank_lost_meanwhile_is_named_with_the_axis(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(*_: Any, **__: Any) -> None:
        raise RuntimeError("Connection closed by peer\nmore")

    monkeypatch.setattr(dist, "new_group", lost)
    with (
        fake_world(0, 2),
        pytest.raises(PeerLostError, match="groups of the world axis were made: Connection closed by peer;"),
    ):
        build_mesh(Sizes(dp=2, zero=2), 0, torch.device("cpu"), TIMEOUT)
    with (
        fake_world(0, 2, "cuda:fake", GPU),
        pytest.raises(PeerLostError, match="groups for objects were made: Connection closed by peer;"),
    ):
        monkeypatch.setattr(dist, "split_group", lambda **_: None)
        build_mesh(Sizes(dp=2, zero=2), 0, GPU, TIMEOUT)


# Objects sent over NCCL pass through the device and wait for all work enqueued there.
@pytest.mark.parametrize("bound", [None, GPU])
def test_objects_beside_a_gpu_backend_are_cpu_tensors(bound: torch.device | None, tmp_path: Path) -> None:
    for rank, (gathered, sent, worked, devices, timeout) in enumerate(
        run_world(objects_on_a_gpu_mesh, 3, (str(tmp_path / "store"), bound))
    ):
        assert gathered == [f"of {each}" for each in range(3)] and sent == "of 0"
        assert worked == [rank, 0] and devices == {"cpu"} and timeout == TIMEOUT


def objects_on_a_gpu_mesh(default: Mesh, store: str, bound: torch.device | None) -> Any:
    """A world whose default group takes CUDA tensors alone."""
    dist.destroy_process_group()
    rank = default.rank
    dist.init_process_group("cuda:fake", store=dist.FileStore(store, 3), rank=rank, world_size=3)
    assert dist.group.WORLD is not None
    dist.group.WORLD.bound_device_id = bound
    dist.split_group = lambda **_: None  # type: ignore[assignment]  # this process ends with the test
    mesh = build_mesh(Sizes(dp=3, zero=3), rank, GPU, TIMEOUT)
    devices: set[str] = set()
    for name in ("all_gather", "broadcast"):
        monitored(name, devices)
    gathered, sent = comm.gather_objects(f"of {rank}", mesh.world), comm.broadcast_object(f"of {rank}", mesh.world)
    worked = [on_all(mesh, lambda: rank), on_main(mesh, lambda: rank)]
    assert mesh.world.object_group is not None
    timeout = mesh.world.object_group._get_backend(torch.device("cpu")).options._timeout
    return gathered, sent, worked, devices, timeout


def monitored(name: str, devices: set[str]) -> None:
    """Note the devices of the tensors that object collectives pass to torch's `name`."""
    c10d = dist.distributed_c10d
    original: Callable[..., Any] = getattr(c10d, name)

    def noting(*args: Any, **options: Any) -> Any:
        tensors = [x for arg in args for x in (arg if isinstance(arg, list) else [arg]) if isinstance(x, torch.Tensor)]
        devices.update(tensor.device.type for tensor in tensors)
        return original(*args, **options)

    setattr(c10d, name, noting)


# A message alone would make a communicator of its two ranks, in an order that may differ between ranks.
def test_messages_are_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    batches: list[list[tuple[Any, int]]] = []
    monkeypatch.setattr(dist, "P2POp", lambda what, _tensor, peer, _group: (what, peer))
    monkeypatch.setattr(dist, "batch_isend_irecv", lambda batch: batches.append(batch) or [])
    group = Group("pp", (4, 6, 8), 1, None)
    comm.send(torch.ones(1), group, 2).wait()
    comm.receive(torch.ones(1), group, 0).wait()
    comm.all_gather(torch.ones(6), group).wait()
    send, receive = dist.isend, dist.irecv
    assert batches == [[(send, 8)], [(receive, 4)], [(send, 8), (receive, 4), (send, 4), (receive, 8)]]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_two_ranks_on_one_gpu_split_the_world_and_exchange_objects_beside_it(tmp_path: Path) -> None:
    for found in run_world(ranks_on_one_gpu, 2, (str(tmp_path / "store"),)):
        assert found == {
            **{"zero": 3.0, "replica": 3.0, "tp": 3.0, "pp": 3.0, "communicators": {"zero", "replica", "tp", "pp"}},
            **{"received": [1.0, 2.0], "objects": ["of 0", "of 1"], "the GPU was still busy": True},
        }


def ranks_on_one_gpu(default: Mesh, store: str) -> dict[str, Any]:
    dist.destroy_process_group()
    rank = default.rank
    as_own_host(os.environ, rank)
    torch.cuda.set_device(GPU)
    files = dist.FileStore(store, 2)
    dist.init_process_group("nccl", store=files, rank=rank, world_size=2, timeout=TIMEOUT, device_id=GPU)
    found: dict[str, Any] = {"communicators": set()}
    layouts = {"zero": Sizes(dp=2, zero=2), "replica": Sizes(dp=2), "tp": Sizes(tp=2), "pp": Sizes(pp=2)}
    for axis, sizes in layouts.items():
        mesh = build_mesh(sizes, rank, GPU, TIMEOUT)
        numbers = torch.full((256,), rank + 1.0, device=GPU)
        comm.all_reduce(numbers, mesh.axis(axis)).wait()
        found[axis] = numbers[-1].item()
        if mesh.axis(axis).process_group is not mesh.world.process_group:
            found["communicators"].add(axis)
    mine, theirs = torch.full((1,), rank + 1.0, device=GPU), torch.zeros(1, device=GPU)
    messages = [(comm.send, mine), (comm.receive, theirs)]
    for message, tensor in messages if rank == 0 else reversed(messages):
        message(tensor, mesh.pp, 1 - rank).wait()
    found["received"] = sorted([mine.item(), theirs.item()])
    torch.cuda._sleep(10**10)  # several seconds
    found["objects"] = comm.gather_objects(f"of {rank}", mesh.world)
    found["the GPU was still busy"] = not torch.cuda.current_stream().query()
    return found
