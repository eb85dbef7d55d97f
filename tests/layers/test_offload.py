"""model.checkpoint="offload": the bits of a step that keeps everything, two blocks on the device, copies in order."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from internlm_lite.mesh.mesh import Mesh, single_process_mesh
from tests.corpus import write_corpus
from tests.models.test_recompute import HAS_ZBV, LAYOUTS, steps
from tests.world import run_world

MODELS: list[dict[str, Any]] = [
    {"dtype": "torch.float32"},
    {"dtype": "torch.bfloat16", "no_bias": True, "use_fp32_norm": True, "num_kv_attention_heads": 2},
    {"dtype": "torch.float32", "residual_dropout": 0.1, "attention_dropout": 0.1, "mlp_type": "gelu", "mlp_bias": True},
    {"dtype": "torch.bfloat16", "norm_position": "sandwich", "norm_type": "layernorm", "qk_norm": "head"},
    {"dtype": "torch.float64", "norm_position": "reordered", "qk_norm": "full", "tie_word_embeddings": True,
     "embed_split_hidden": False},
]  # fmt: skip


def differing(mesh: Mesh, corpus: Path, layouts: list[dict[str, Any]], models: list[dict[str, Any]]) -> list[str]:
    """Cases in which a bit of losses, norms or weights depends on the offload."""
    found = []
    for layout in layouts:
        for number, model in enumerate(models):
            offload = {"checkpoint": "offload", "offload_share": (1.0, 0.5)[number % 2]}
            if steps(mesh, corpus, layout, **model) != steps(mesh, corpus, layout, **model, **offload):
                found.append(str((layout, model)))
    return found


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("offload") / "corpus")


def test_the_bits_of_one_process(corpus: Path) -> None:
    assert differing(single_process_mesh(), corpus, [{}], MODELS) == []
    assert differing(single_process_mesh(), corpus, [{}], [{"dtype": "torch.float32", "compile": True}]) == []


@pytest.mark.parametrize("layouts", [("tensor", "sequence"), ("1f1b", "interleaved", *["zbv"] * HAS_ZBV)], ids=" ".join)
def test_the_bits_of_every_layout(layouts: tuple[str, ...], corpus: Path) -> None:
    sections = [LAYOUTS[name] for name in layouts]
    tensor, pipeline = sections[0].get("tensor", 1), sections[0].get("pipeline", {}).get("size", 1)
    world = run_world(differing, 2, (corpus, sections, MODELS[:2]), tensor=tensor, pipeline=pipeline)
    assert world == [[], []]
