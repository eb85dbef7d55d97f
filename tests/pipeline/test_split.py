"""The layer split: never more expensive than any other split. Ranks of stages: two functions that say the same."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, combinations, pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from internlm_lite.config.schema import Config
from internlm_lite.layers.flash import AttentionBackend
from internlm_lite.mesh.mesh import plan_mesh, sizes_of
from internlm_lite.models.stages import build_stages, layers_of_stages, meta_model
from internlm_lite.pipeline.split import rank_to_stages, split_layers, stage_to_rank

LAYOUTS = [("1f1b", 1), ("interleaved", 2), ("interleaved", 3), ("zbv", 2)]


def busiest(split: list[range], ranks: Sequence[int], block: float, embedding: float, head: float) -> float:
    costs = [len(layers) * block for layers in split]
    costs[0] += embedding
    costs[-1] += head
    return max(sum(cost for cost, holder in zip(costs, ranks, strict=True) if holder == rank) for rank in set(ranks))


def every_split(num_layers: int, stages: int) -> list[list[range]]:
    """All ways to cut layers into `stages` parts of at least one layer."""
    cuts = combinations(range(1, num_layers), stages - 1)
    return [[range(a, b) for a, b in pairwise((0, *cut, num_layers))] for cut in cuts]


@given(
    layout=st.sampled_from(LAYOUTS),
    size=st.integers(1, 3),
    extra=st.integers(0, 5),
    block=st.sampled_from([1.0, 2.5, 7.0]),
    embedding=st.sampled_from([0.0, 0.5, 3.0, 20.0]),
    head=st.sampled_from([0.0, 1.0, 4.5, 30.0]),
)
def test_no_split_is_better(
    layout: tuple[str, int], size: int, extra: int, block: float, embedding: float, head: float
) -> None:
    schedule, chunks = layout
    ranks = stage_to_rank(size, chunks, schedule)
    num_layers = len(ranks) + extra
    split = split_layers([block] * num_layers, ranks, embedding=embedding, head=head)
    assert [layer for layers in split for layer in layers] == list(range(num_layers))
    assert len(split) == len(ranks) and all(len(layers) > 0 for layers in split)
    best = min(busiest(other, ranks, block, embedding, head) for other in every_split(num_layers, len(ranks)))
    assert busiest(split, ranks, block, embedding, head) == pytest.approx(best)


def load(split: list[range], ranks: Sequence[int], blocks: Sequence[float], embedding: float, head: float) -> float:
    """Of the busiest rank."""
    costs = [sum(blocks[layer] for layer in layers) for layers in split]
    costs[0] += embedding
    costs[-1] += head
    return max(sum(cost for cost, holder in zip(costs, ranks, strict=True) if holder == rank) for rank in set(ranks))


@given(
    layout=st.sampled_from(LAYOUTS),
    size=st.integers(2, 3),
    extra=st.integers(0, 7),
    pattern=st.sampled_from([(1.0, 1.0, 1.0, 1.4), (1.2, 1.0), (1.0, 1.0, 1.6), (1.0, 1.0, 1.0, 1.0, 1.0, 1.3)]),
    embedding=st.sampled_from([0.0, 0.5, 3.0]),
    head=st.sampled_from([0.0, 1.0, 4.5]),
)
def test_unequal_layers_are_split_nearly_as_well_as_can_be(
    layout: tuple[str, int], size: int, extra: int, pattern: tuple[float, ...], embedding: float, head: float
) -> None:
    """Layers with and without a window, in their own order."""
    schedule, chunks = layout
    ranks = stage_to_rank(size, chunks, schedule)
    blocks = [pattern[layer % len(pattern)] for layer in range(len(ranks) + extra)]
    split = split_layers(blocks, ranks, embedding=embedding, head=head)
    assert [layer for layers in split for layer in layers] == list(range(len(blocks)))
    assert len(split) == len(ranks) and all(len(layers) > 0 for layers in split)
    costs = (ranks, blocks, embedding, head)
    assert load(split, *costs) <= 1.09 * min(load(other, *costs) for other in every_split(len(blocks), len(ranks)))


def test_a_rank_of_full_layers_has_fewer_of_them() -> None:
    """Half of the layers slide, in one part of the model: their ranks get more."""
    blocks = [1.0] * 12 + [3.0] * 12
    split = split_layers(blocks, range(4), embedding=0.0, head=0.0)
    assert load(split, range(4), blocks, 0.0, 0.0) == 12 and len(split[0]) == 12 and len(split[-1]) == 4
    alternating = split_layers([1.0, 2.0] * 8, range(4), embedding=0.0, head=0.0)
    assert [len(layers) for layers in alternating] == [4, 4, 4, 4]


def test_the_head_makes_up_for_layers_of_its_rank() -> None:
    """Six layers in four stages on two ranks, the head as expensive as one and a half layers."""
    ends = {"embedding": 0.0, "head": 1.5}
    assert [len(layers) for layers in split_layers([1.0] * 6, [0, 1, 0, 1], **ends)] == [2, 1, 2, 1]
    assert [len(layers) for layers in split_layers([1.0] * 6, [0, 1, 1, 0], **ends)] == [1, 2, 2, 1]


def test_the_20b_model_over_four_stages() -> None:
    """60 layers. The head (5120 x 103168) costs about 1.5 layers, so the last stage has fewer of them."""
    config = Config.model_validate(
        {
            "data": {"seq_len": 2048, "micro_bsz": 1, "micro_num": 4, "total_steps": 1},
            "lr_scheduler": {"total_steps": 1},
            "model": {"num_attention_heads": 40, "vocab_size": 103168, "hidden_size": 5120, "num_layers": 60},
            "parallel": {"pipeline": {"size": 4}},
        }
    )
    model = meta_model(config.model)
    costs = (
        model.blocks()[0].flops_per_token(2048),
        model.tok_embeddings.lookup_ops_per_token(),
        model.output.flops_per_token(2048),
    )
    split = layers_of_stages(config)
    assert sum(map(len, split)) == 60
    assert busiest(split, range(4), *costs) == min(busiest(other, range(4), *costs) for other in every_split(60, 4))
    assert len(split[-1]) < len(split[1]) <= 16


def test_layers_cost_what_their_windows_cost() -> None:
    """Long rows, a narrow model: sliding layers first, full ones at the end."""
    model = {"num_attention_heads": 4, "vocab_size": 8, "hidden_size": 32, "num_layers": 12, "multiple_of": 16}
    kinds = ["sliding_attention"] * 6 + ["full_attention"] * 6
    config = Config.model_validate(
        {
            "data": {"seq_len": 8192, "micro_bsz": 1, "micro_num": 4, "total_steps": 1},
            "lr_scheduler": {"total_steps": 1},
            "model": {**model, "sliding_window": 64, "layer_types": kinds},
            "parallel": {"pipeline": {"size": 2}},
        }
    )
    assert layers_of_stages(config) == [range(9), range(9, 12)]
    full = config.model_copy(update={"model": config.model.model_copy(update={"layer_types": ["full_attention"]})})
    assert layers_of_stages(full) == [range(6), range(6, 12)]


def test_a_stage_goes_on_with_the_pattern_of_layers() -> None:
    """By the number in the whole model: unequal stages of 3:1 would begin again inside of it."""
    model = {"num_attention_heads": 4, "vocab_size": 8, "hidden_size": 32, "num_layers": 7, "multiple_of": 16}
    config = Config.model_validate(
        {
            "data": {"seq_len": 64, "micro_bsz": 1, "micro_num": 4, "total_steps": 1},
            "lr_scheduler": {"total_steps": 1},
            "model": {
                **model,
                "num_chunks": 2,
                "sliding_window": 8,
                "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
            },
            "parallel": {"pipeline": {"size": 2}},
        }
    )
    windows = {}
    for rank in range(2):
        mesh = plan_mesh(sizes_of(2, 1, 2, -1), rank, torch.device("meta"))
        for stage in build_stages(config, mesh, AttentionBackend.SDPA).values():
            windows |= {block.attention.layer: block.attention.rule.window for block in stage.blocks()}
    assert [windows[layer] for layer in range(7)] == [8, 8, 8, None, 8, 8, 8]


@pytest.mark.parametrize(("schedule", "chunks"), LAYOUTS)
@pytest.mark.parametrize("size", [2, 3, 4, 8])
def test_every_stage_has_one_rank(schedule: str, chunks: int, size: int) -> None:
    held = [rank_to_stages(rank, size, chunks, schedule) for rank in range(size)]
    assert sorted(stage for stages in held for stage in stages) == list(range(size * chunks))
    for rank, stages in enumerate(held):
        assert list(stages) == sorted(stages) and len(stages) == chunks
        assert [stage_to_rank(size, chunks, schedule)[stage] for stage in stages] == [rank] * chunks


@pytest.mark.parametrize("size", [2, 3, 4, 8])
def test_zero_bubble_starts_and_ends_on_the_first_rank(size: int) -> None:
    assert rank_to_stages(0, size, 2, "zbv") == (0, 2 * size - 1)
    ranks = stage_to_rank(size, 2, "zbv")
    assert [abs(b - a) for a, b in pairwise(ranks)] == [*[1] * (size - 1), 0, *[1] * (size - 1)], "a V"
    assert list(accumulate(ranks, max)) == sorted(accumulate(ranks, max))


def test_interleaved_stages_go_round_the_ranks() -> None:
    assert stage_to_rank(3, 2, "interleaved") == (0, 1, 2, 0, 1, 2)
