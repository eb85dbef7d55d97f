"""model.compile: one graph for each function, no graph break, no recompilation, and the numbers of eager steps."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch._dynamo.utils import counters

from internlm_lite.data.data_loader import open_training_data
from internlm_lite.data.order import Position
from internlm_lite.errors import ConfigError
from internlm_lite.layers import compiled
from internlm_lite.layers.flash import packed_sdpa
from internlm_lite.layers.norm import NORMS, RMSNorm
from internlm_lite.layers.rope import Rotary, rope_frequencies
from internlm_lite.mesh.layout import Parameter
from internlm_lite.mesh.mesh import Mesh, single_process_mesh
from internlm_lite.models.decoder import Block, tensor_parallel_context
from internlm_lite.train.trainer import Trainer
from tests.corpus import write_corpus
from tests.models.small import small_config
from tests.train.runs import tiny
from tests.world import run_world

GRAPHS = 3
"""Before attention, after it, and the loss of a chunk."""
ISLANDS = 3
"""The rotation of queries, that of keys, and the product in the feed-forward part."""
STEPS = 20
DROPOUT: dict[str, Any] = {"embedding_dropout": 0.1, "residual_dropout": 0.2, "attention_dropout": 0.1}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 8}


def curve(mesh: Mesh, corpus: Path | None, **model: Any) -> list[tuple[float, float]]:
    """(loss, gradient norm) of the first steps; rows of the corpus are of many compositions."""
    sections = {"data": {"micro_num": 4 // mesh.dp.size, "total_steps": STEPS}, "lr_scheduler": {"total_steps": STEPS}}
    sections["loss"] = {"z_loss": model.pop("z_loss", 0)}
    layout = {"tensor": mesh.tp.size, "sequence_parallel": mesh.tp.size > 1, "pipeline": {"size": mesh.pp.size}}
    model = {"dtype": "torch.float32", "num_layers": 3, **model}
    config = tiny(corpus, model=model, parallel=layout, **sections)
    data = open_training_data(config.data, config.model.vocab_sizes, mesh.dp.rank, mesh.dp.size, config.seed)
    trainer = Trainer(config, mesh, [folder.name for folder in data.packed])
    batches, found = data.batches(Position()), []
    for step in range(STEPS):
        outcome = trainer.step(next(batches), step)
        found.append((trainer.metrics.collect().loss, outcome.norm_model_dtype.item()))
    batches.close()
    return found


def compare(mesh: Mesh, corpus: Path | None, backend: str = "aot_eager", kinds: int = 1, **model: Any) -> float:
    """Largest relative difference between compiled and eager steps. `kinds`: of layers, by their graphs."""
    compiled.COMPILER = backend  # in a process of a world, or put back by the fixture
    torch._dynamo.reset()
    counters.clear()
    eager, ours = (curve(mesh, corpus, compile=flag, **model) for flag in (False, True))
    assert not counters["graph_break"]
    expected = GRAPHS - 1 + kinds - (mesh.pp.rank < mesh.pp.size - 1) if mesh.tp.size == 1 else ISLANDS
    expected += "embedding_dropout" in model and mesh.pp.rank == 0  # a graph of its own, outside of blocks
    expected += "residual_dropout" in model and mesh.tp.size > 1
    assert counters["stats"]["unique_graphs"] == expected, "for all layers of a kind and rows"
    return max(abs(a / b - 1) for pair in zip(ours, eager, strict=True) for a, b in zip(*pair, strict=True))


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_corpus(tmp_path / "corpus")


@pytest.fixture(autouse=True)
def backend_of_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "COMPILER", compiled.COMPILER)


@pytest.mark.parametrize(
    "model",
    [
        {},
        {"no_bias": True, "checkpoint": 0.5},
        {"no_bias": True, "checkpoint": "selective"},
        {"apply_post_layer_norm": True, "tie_word_embeddings": True},
        {
            "mlp_type": "geglu_tanh",
            "mlp_bias": True,
            "head_bias": True,
            "logit_softcap": 3.0,
            "embed_scale": 2.0,
            "z_loss": 0.1,
        },
        {"mlp_type": "gelu", "mlp_bias": True, "logit_scale": 0.5, "checkpoint": "selective", "dtype": "torch.float64"},
        {"norm_position": "reordered", "qk_norm": "full", "checkpoint": "selective", "dtype": "torch.float64"},
        {"norm_position": "sandwich", "norm_type": "layernorm", "qk_norm": "head", "zero_centered_norm": True},
        DROPOUT,
        {**DROPOUT, "checkpoint": "selective", "norm_position": "reordered"},
    ],
)
def test_compiled_steps_are_those_of_eager_ones(model: dict[str, Any], corpus: Path) -> None:
    assert compare(single_process_mesh(), corpus, **model) < 1e-6


def test_both_sides_of_an_encoder_decoder_are_compiled() -> None:
    """Before, between and after attention in the decoder; before and after it in the encoder; and the loss. In fp32
    the curves are 5e-5 apart."""
    model = {"num_encoder_layers": 2, "num_layers": 2, "norm_type": "sample_layernorm", "feed_forward_dropout": 0.1}
    assert compare(single_process_mesh(), None, kinds=4, mlp_type="relu", dtype="torch.float64", **model) < 1e-8


@pytest.mark.parametrize(
    ("kinds", "model"),
    [
        (1, {"position": "learned", "max_position_embeddings": 64, "tie_word_embeddings": True}),
        (1, {"position": "sinusoidal"}),
        (2, {"no_rope_every": 2, "num_layers": 5}),
        (2, {"no_rope_every": 2, "num_layers": 5, "checkpoint": "selective", "qk_norm": "head"}),
        (1, {"partial_rotary_factor": 0.5, "head_dim": 8, "rope_scaling": DYNAMIC}),
        (1, {"sliding_window": 9, "layer_types": ["sliding_attention", "full_attention"], "rope_local_base": 50.0}),
    ],
)
def test_layers_of_a_kind_share_their_graphs(kinds: int, model: dict[str, Any], corpus: Path) -> None:
    """A graph for those that are rotated, whatever the base, and one for those that are not: none for each layer."""
    assert compare(single_process_mesh(), corpus, kinds=kinds, dtype="torch.float64", **model) < 1e-10


@pytest.mark.parametrize("fp8", [False, True])
def test_half_precision_accumulates_in_float32(fp8: bool, corpus: Path) -> None:
    """Weights in bf16, their gradients in fp32: dynamo refuses such a `.grad`, so layers add to `main_grad`."""
    assert compare(single_process_mesh(), corpus, dtype="torch.bfloat16", fp8=fp8) < 1e-5


def test_no_weight_is_kept_in_float8() -> None:
    """The compiler chooses what is kept for the backward pass: casts of weights would be a copy of the model for each
    micro-batch that a pipeline has under way (pytorch/ao 1629). Activations it keeps in float8: fewer bytes."""
    compiled.COMPILER = "aot_eager"
    torch._dynamo.reset()
    config, mesh, tokens = small_config(dtype="torch.bfloat16", fp8=True, compile=True), single_process_mesh(), 80
    tp_ctx = tensor_parallel_context(config, mesh, by_sequence=False)
    block, kept = Block(config, 0, tp_ctx), list[torch.Tensor]()
    for param in cast(Iterator[Parameter], block.parameters()):
        param.data.fill_(0.01)
        param.main_grad = torch.zeros(param.shape)
    rotary = Rotary(torch.arange(tokens), rope_frequencies(config, mesh.device), tp_ctx.dtype)
    x = torch.randn(tokens, config.hidden_size).bfloat16().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        block(x, rotary, packed_sdpa((0, tokens)))
    shapes = [tensor.shape for tensor in kept if tensor.dtype.itemsize == 1]
    assert shapes and all(tokens in shape for shape in shapes)


@pytest.mark.parametrize(
    ("layout", "model"),
    [
        ({}, {}),
        ({"pipeline": 2}, DROPOUT),
        ({"tensor": 2}, {}),
        ({"tensor": 2}, {"checkpoint": "selective", **DROPOUT}),
    ],
)
def test_layouts(layout: dict[str, int], model: dict[str, Any], corpus: Path) -> None:
    ours = partial(compare, **model)
    assert all(worst < 1e-6 for worst in run_world(ours, 2, (corpus,), **layout))


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++: on Debian and Ubuntu: apt-get install g++")
def test_code_of_the_compiler(corpus: Path) -> None:
    assert compare(single_process_mesh(), corpus, "inductor") < 1e-6


def test_a_layer_that_leaves_its_gradients_to_autograd_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    class Plain(RMSNorm):
        def __init__(self, *parts: Any) -> None:
            super().__init__(*parts)
            self.weight.manual_grad = False

    monkeypatch.setitem(NORMS, "rmsnorm", Plain)
    for dtype in ("float32", "bfloat16"):
        config = tiny(None, model={"compile": True, "dtype": f"torch.{dtype}"})
        refused = pytest.raises(ConfigError, match=r"layers.0.attention_norm.weight .*accumulating")
        with refused if dtype == "bfloat16" else nullcontext():
            Trainer(config, single_process_mesh())


@pytest.mark.parametrize("key", [None, True, False])
@pytest.mark.parametrize("missing", ["", "triton", "compiler"])
def test_on_gpus_it_is_on_where_its_tools_are(key: bool | None, missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "has_triton", lambda: missing != "triton")
    monkeypatch.setattr(shutil, "which", lambda name: "" if missing == "compiler" else name)
    refused = pytest.raises(ConfigError, match=r"Triton.*set model.compile=False") if key and missing else nullcontext()
    with refused:
        assert compiled.is_wanted(key, torch.device("cuda")) is (key is not False and not missing)
    assert compiled.is_wanted(key, torch.device("cpu")) is bool(key)
