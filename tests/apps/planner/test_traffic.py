"""The planner's traffic against the collectives of real training steps on real ranks."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from internlm_lite.apps.planner.holdings import holdings
from internlm_lite.apps.planner.memory import row_shape
from internlm_lite.apps.planner.plan import make_plan
from internlm_lite.apps.planner.traffic import messages
from internlm_lite.layers.flash import AttentionBackend
from internlm_lite.mesh.mesh import Mesh, sizes_of
from internlm_lite.train.trainer import Trainer
from tests.apps.planner.counting import Calls, Key, expected, sent
from tests.apps.planner.steps import random_batch, run_step, small
from tests.torches import HAS_ZBV
from tests.world import run_world


def _count(mesh: Mesh, sections: dict[str, dict[str, Any]]) -> list[Counter[Key]]:
    """The collectives of this rank in the first step and in the second."""
    config = small(**sections)
    trainer = Trainer(config, mesh)
    found = []
    for step in range(2):
        with Calls(mesh) as calls:
            run_step(trainer, random_batch(config, mesh), step)
        found.append(calls.counted)
    return found


GREETING: Key = ("pp", "send", 4)
"""torch's pipelining lets neighbours greet each other with one number before the first step, to set up connections."""

LAYOUTS: dict[str, tuple[int, dict[str, dict[str, Any]]]] = {
    "zero": (2, {}),
    "zero, bf16, fp32 gradients": (2, {"model": {"dtype": "torch.bfloat16", "use_fp32_norm": True}}),
    "zero and replica": (4, {"parallel": {"zero1": 2}}),
    "tp": (2, {"parallel": {"tensor": 2}}),
    "tp, vocabulary, gathered logits, grouped": (
        2,
        {
            "parallel": {"tensor": 2},
            "model": {"embed_split_hidden": False, "parallel_output": False, "num_kv_attention_heads": 2},
        },
    ),
    "tp, half of the layers recomputed": (2, {"parallel": {"tensor": 2}, "model": {"checkpoint": 0.5}}),
    "tp, post-norm, recomputed": (
        2,
        {"parallel": {"tensor": 2}, "model": {"checkpoint": True, "apply_post_layer_norm": True}},
    ),
    "tp, norms over all heads, reordered, recomputed": (
        2,
        {
            "parallel": {"tensor": 2},
            "model": {"checkpoint": 0.5, "norm_position": "reordered", "qk_norm": "full", "num_kv_attention_heads": 2},
        },
    ),
    "sp, norms over all heads, sandwich, selective": (
        2,
        {
            "parallel": {"tensor": 2, "sequence_parallel": True},
            "model": {"checkpoint": "selective", "norm_position": "sandwich", "qk_norm": "full"},
        },
    ),
    "sp": (2, {"parallel": {"tensor": 2, "sequence_parallel": True}}),
    "sp, selective": (
        2,
        {"parallel": {"tensor": 2, "sequence_parallel": True}, "model": {"checkpoint": "selective"}},
    ),
    "sp, vocabulary, tied, recomputed": (
        2,
        {
            "parallel": {"tensor": 2, "sequence_parallel": True},
            "model": {"embed_split_hidden": False, "tie_word_embeddings": True, "checkpoint": True},
        },
    ),
    "pp, tied": (2, {"parallel": {"pipeline": {"size": 2}}, "model": {"tie_word_embeddings": True}}),
    "interleaved": (2, {"parallel": {"pipeline": {"size": 2}}, "model": {"num_chunks": 2}}),
    "zbv, tied": (
        2,
        {
            "parallel": {"pipeline": {"size": 2, "schedule": "zbv"}},
            "model": {"num_chunks": 2, "tie_word_embeddings": True},
        },
    ),
    "four stages": (4, {"parallel": {"pipeline": {"size": 4}}, "model": {"tie_word_embeddings": True}}),
    "stage 2, zero and replica": (4, {"parallel": {"zero1": 2, "zero_stage": 2}}),
    "stage 2, interleaved, bf16": (
        4,
        {
            "parallel": {"zero_stage": 2, "pipeline": {"size": 2}},
            "model": {"num_chunks": 2, "dtype": "torch.bfloat16"},
        },
    ),
    "stage 3, tied": (
        2,
        {
            "parallel": {"zero_stage": 3},
            "model": {"tie_word_embeddings": True, "embed_split_hidden": False, "dtype": "torch.bfloat16"},
        },
    ),
    "stage 3, weights kept": (2, {"parallel": {"zero_stage": 3, "reshard_after_forward": False}}),
    "stage 3, sp, recomputed": (
        4,
        {"parallel": {"zero_stage": 3, "tensor": 2, "sequence_parallel": True}, "model": {"checkpoint": True}},
    ),
    "stage 3, pp, tied": (
        4,
        {"parallel": {"zero_stage": 3, "pipeline": {"size": 2}}, "model": {"tie_word_embeddings": True}},
    ),
    "cp, grouped": (2, {"parallel": {"context": {"size": 2}}, "model": {"num_kv_attention_heads": 2}}),
    "cp, tp, half of the layers recomputed, zero and replica": (
        8,
        {"parallel": {"context": {"size": 4}, "tensor": 2, "zero1": 2}, "model": {"checkpoint": 0.5}},
    ),
    "ulysses, more ranks than key heads, tp": (
        8,
        {
            "parallel": {"context": {"size": 4, "exchange": "ulysses"}, "tensor": 2},
            "model": {"num_attention_heads": 8, "num_kv_attention_heads": 4},
        },
    ),
    "cp, sp, pp, windows": (
        8,
        {
            "parallel": {
                **{"context": {"size": 2}, "tensor": 2, "sequence_parallel": True, "pipeline": {"size": 2}},
            },
            "model": {"sliding_window": 3, "num_kv_attention_heads": 2},
        },
    ),
    "encoder, sp, one embedding, half of the layers recomputed": (
        2,
        {
            "parallel": {"tensor": 2, "sequence_parallel": True},
            "data": {"source_seq_len": 24},
            "model": {
                **{"num_encoder_layers": 2, "num_layers": 2, "checkpoint": 0.5, "qk_norm": "full"},
                **{"tie_word_embeddings": True, "tie_source_embeddings": True, "embed_split_hidden": False},
            },
        },
    ),
    "encoder, pp, tp, stage 3": (
        4,
        {
            "parallel": {"tensor": 2, "pipeline": {"size": 2}, "zero_stage": 3},
            "data": {"source_seq_len": 8},
            "model": {"num_encoder_layers": 2, "num_layers": 3, "source_vocab_size": 64},
        },
    ),
    "sp, pp, zero, tied": (
        8,
        {
            "parallel": {"tensor": 2, "sequence_parallel": True, "pipeline": {"size": 2}},
            "model": {"tie_word_embeddings": True, "embed_split_hidden": False, "checkpoint": 0.5},
        },
    ),
}


@pytest.mark.parametrize("name", [name for name in LAYOUTS if HAS_ZBV or "zbv" not in name])
def test_every_collective_of_a_step_is_planned(name: str) -> None:
    world, sections = LAYOUTS[name]
    config = small(**sections)
    parallel = config.parallel
    sizes = sizes_of(world, parallel.tensor, parallel.pipeline.size, parallel.zero1, parallel.context.size)
    held, _ = holdings(config, sizes, AttentionBackend.SDPA)
    row = row_shape(config, AttentionBackend.SDPA, "cpu")
    of_axis = {axis: getattr(sizes, axis, 2) for axis in ("world", "dp", "cp", "tp", "pp", "zero", "replica", "ends")}
    layout = {"tensor": parallel.tensor, "pipeline": parallel.pipeline.size, "zero1": parallel.zero1}
    layout["context"] = parallel.context.size
    plan = {rank.rank: rank.traffic_bytes for rank in make_plan(config, world, None, "cpu").ranks}
    for rank, steps in enumerate(run_world(_count, world, (sections,), **layout)):
        own = held[rank // (sizes.alike * sizes.tp)]
        planned = expected(messages(row, sizes, own, config.data.micro_num), of_axis)
        first, second = steps
        assert second == planned, (rank, second - planned, planned - second)
        assert all(key == GREETING for key in first - planned) and not planned - first
        totals = sent(second, of_axis)
        assert {axis: round(totals.get(axis, 0)) for axis in plan[rank]} == plan[rank]
