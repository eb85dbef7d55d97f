"""Which ranks form which groups, and sizes that do not fit."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from internlm_lite.errors import MeshError
from internlm_lite.mesh.mesh import Sizes, axis_groups, plan_mesh, rank_of, single_process_mesh, sizes_of

SIZES = [Sizes(), Sizes(dp=4, tp=2, pp=3, zero=2), Sizes(dp=3, tp=1, pp=2, zero=3), Sizes(dp=2, tp=4, pp=1, zero=1)]
SIZES += [Sizes(dp=2, cp=4, tp=2, pp=2, zero=2), Sizes(cp=4, zero=4), Sizes(dp=3, cp=2, tp=2, zero=3)]


@pytest.mark.parametrize("sizes", SIZES)
def test_every_axis_partitions_the_world(sizes: Sizes) -> None:
    for name, groups in axis_groups(sizes).items():
        assert sorted(rank for ranks in groups for rank in ranks) == list(range(sizes.world)), name
        if name != "ends":
            assert {len(ranks) for ranks in groups} == {getattr(sizes, name)}


def test_ranks_that_share_a_row_are_neighbours_behind_tensor_parallel_ones_and_share_optimizer_state() -> None:
    groups = axis_groups(Sizes(dp=2, cp=2, tp=2, pp=2, zero=4))
    assert groups["tp"][0] == (0, 1)
    assert groups["cp"][0] == (0, 2)
    assert groups["dp"][0] == (0, 4)
    assert groups["zero"][0] == (0, 2, 4, 6)
    assert groups["pp"][0] == (0, 8)


def test_tensor_parallel_ranks_are_neighbours_then_zero_then_replicas_then_stages() -> None:
    groups = axis_groups(Sizes(dp=4, tp=2, pp=2, zero=2))
    assert groups["tp"][0] == (0, 1)
    assert groups["zero"][0] == (0, 2)
    assert groups["replica"][0] == (0, 4)
    assert groups["dp"][0] == (0, 2, 4, 6)
    assert groups["pp"][0] == (0, 8)


def test_only_the_first_and_the_last_stage_share_a_tied_weight() -> None:
    assert axis_groups(Sizes(pp=4))["ends"] == [(0, 3), (1,), (2,)]
    assert axis_groups(Sizes(pp=1))["ends"] == [(0,)]


@pytest.mark.parametrize("sizes", SIZES)
def test_a_rank_finds_itself_in_its_groups(sizes: Sizes) -> None:
    for pp, dp, cp, tp in product(*map(range, (sizes.pp, sizes.dp, sizes.cp, sizes.tp))):
        mesh = plan_mesh(sizes, rank_of(sizes, dp=dp, tp=tp, pp=pp, cp=cp), torch.device("cpu"))
        assert (mesh.dp.rank, mesh.cp.rank, mesh.tp.rank, mesh.pp.rank) == (dp, cp, tp, pp)
        assert mesh.replica.rank * sizes.zero + mesh.zero.rank == dp * sizes.cp + cp
        for name in ("dp", "cp", "tp", "pp", "zero", "replica", "ends"):
            group = mesh.axis(name)
            assert group.ranks[group.rank] == mesh.rank


def test_sizes_come_from_the_world_and_the_layout() -> None:
    assert sizes_of(16, tensor=2, pipeline=2, zero1=-1) == Sizes(dp=4, tp=2, pp=2, zero=4)
    assert sizes_of(16, tensor=2, pipeline=2, zero1=2).replica == 2
    assert sizes_of(16, tensor=2, pipeline=2, zero1=-1, context=2) == Sizes(dp=2, tp=2, pp=2, zero=4, cp=2)
    assert sizes_of(16, tensor=2, pipeline=2, zero1=2, context=4).replica == 2
    assert single_process_mesh().world.size == 1


@pytest.mark.parametrize(
    ("layout", "text"),
    [
        ((6, 4, 1, -1), "world size 6 does not fit parallel.tensor=4"),
        ((8, 2, 1, 3), "parallel.zero1=3 does not divide the data parallel size 4"),
        ((8, 2, 1, -1, 3), "world size 8 does not fit .* parallel.context.size=3: expected a multiple of 6"),
        ((8, 2, 1, 3, 2), "parallel.zero1=3 does not divide the data times context parallel size 4"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(layout: tuple[int, ...], text: str) -> None:
    with pytest.raises(MeshError, match=text):
        sizes_of(*layout)
