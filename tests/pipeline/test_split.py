"""The layer split: never dearer than any other split. Homes of stages: two functions that say the same."""

from __future__ import annotations

from itertools import accumulate, combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from internlm_lite.config.schema import ModelConfig
from internlm_lite.monitor.flops import block_flops, embedding_flops, head_flops
from internlm_lite.pipeline.split import home_of, split_layers, stages_on

LAYOUTS = [("1f1b", 1), ("interleaved", 2), ("interleaved", 3), ("zbv", 2)]


def busiest(split: list[range], homes: list[int], block: float, embedding: float, head: float) -> float:
    costs = [len(layers) * block for layers in split]
    costs[0] += embedding
    costs[-1] += head
    return max(sum(cost for cost, home in zip(costs, homes, strict=True) if home == rank) for rank in set(homes))


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
    homes = [home_of(stage, size, schedule) for stage in range(size * chunks)]
    num_layers = len(homes) + extra
    split = split_layers(num_layers, homes, block, embedding, head)
    assert [layer for layers in split for layer in layers] == list(range(num_layers))
    assert len(split) == len(homes) and all(len(layers) > 0 for layers in split)
    best = min(busiest(other, homes, block, embedding, head) for other in every_split(num_layers, len(homes)))
    assert busiest(split, homes, block, embedding, head) == pytest.approx(best)


def test_the_head_makes_up_for_layers_of_its_rank() -> None:
    """Six layers in four stages on two ranks, the head as dear as one and a half layers."""
    assert [len(layers) for layers in split_layers(6, [0, 1, 0, 1], 1.0, 0.0, 1.5)] == [2, 1, 2, 1]
    assert [len(layers) for layers in split_layers(6, [0, 1, 1, 0], 1.0, 0.0, 1.5)] == [1, 2, 2, 1]


def test_the_20b_model_over_four_stages() -> None:
    """60 layers. The head (5120 x 103168) costs about 1.5 layers, so the last stage has fewer of them."""
    model = ModelConfig(num_attention_heads=40, vocab_size=103168, hidden_size=5120, num_layers=60)
    costs, homes = (block_flops(model, 2048), embedding_flops(model), head_flops(model)), [0, 1, 2, 3]
    split = split_layers(60, homes, *costs)
    assert sum(map(len, split)) == 60
    assert busiest(split, homes, *costs) == min(busiest(other, homes, *costs) for other in every_split(60, 4))
    assert len(split[-1]) < len(split[1]) <= 16


@pytest.mark.parametrize(("schedule", "chunks"), LAYOUTS)
@pytest.mark.parametrize("size", [2, 3, 4, 8])
def test_every_stage_has_one_home(schedule: str, chunks: int, size: int) -> None:
    held = [stages_on(rank, size, chunks, schedule) for rank in range(size)]
    assert sorted(stage for stages in held for stage in stages) == list(range(size * chunks))
    for rank, stages in enumerate(held):
        assert list(stages) == sorted(stages) and len(stages) == chunks
        assert [home_of(stage, size, schedule) for stage in stages] == [rank] * chunks


@pytest.mark.parametrize("size", [2, 3, 4, 8])
def test_zero_bubble_starts_and_ends_on_the_first_rank(size: int) -> None:
    assert stages_on(0, size, 2, "zbv") == (0, 2 * size - 1)
    homes = [home_of(stage, size, "zbv") for stage in range(2 * size)]
    assert [abs(b - a) for a, b in pairwise(homes)] == [*[1] * (size - 1), 0, *[1] * (size - 1)], "a V"
    assert list(accumulate(homes, max)) == sorted(accumulate(homes, max))
