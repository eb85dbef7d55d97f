"""model.checkpoint="selective": the bits of a step that keeps everything, in every layout, for less memory and no more
products, attention or messages."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from internlm_lite.data.data_loader import open_training_data
from internlm_lite.data.order import Position
from internlm_lite.layers import compiled
from internlm_lite.layers.dropout import token_keys
from internlm_lite.layers.flash import packed_sdpa
from internlm_lite.layers.norm import RMSNorm
from internlm_lite.layers.rope import Rotary, rope_frequencies
from internlm_lite.mesh.mesh import Mesh, single_process_mesh
from internlm_lite.models.decoder import Block, tensor_parallel_context
from internlm_lite.train.trainer import Trainer
from tests.corpus import write_corpus
from tests.models.counted import saved_bytes
from tests.models.small import small_config
from tests.train.runs import tiny
from tests.world import run_world

LAYOUTS: dict[str, dict[str, Any]] = {
    "tensor": {"tensor": 2},
    "sequence": {"tensor": 2, "sequence_parallel": True},
    "1f1b": {"pipeline": {"size": 2}},
    "interleaved": {"pipeline": {"size": 2}, "num_chunks": 2},
    "zbv": {"pipeline": {"size": 2, "schedule": "zbv"}, "num_chunks": 2},
}
BY_VOCABULARY = {"embed_split_hidden": False}
HAS_ZBV = torch.torch_version.TorchVersion(torch.__version__) >= (2, 13)
T = 48


def steps(mesh: Mesh, corpus: Path | None, layout: dict[str, Any], **model: Any) -> list[tuple[Any, ...]]:
    """(loss, gradient norm) of three steps on rows of many documents, and a sum over the weights after them."""
    parallel = {key: value for key, value in layout.items() if key != "num_chunks"}
    model = {"num_layers": 4, "num_chunks": layout.get("num_chunks", 1), **model}
    config = tiny(corpus, model=model, parallel=parallel, data={"micro_num": 4 // mesh.dp.size})
    data = open_training_data(config.data, config.model.vocab_size, mesh.dp.rank, mesh.dp.size, config.seed)
    trainer = Trainer(config, mesh, [folder.name for folder in data.packed])
    batches, found = data.batches(Position()), []
    for step in range(3):
        outcome = trainer.step(next(batches), step)
        found.append((trainer.metrics.collect().loss, outcome.norm_model_dtype.item()))
    batches.close()
    trainer.optimizer.wait_weights()
    weights = [p.double().sum().item() for stage in trainer.stages.values() for p in stage.parameters()]
    return [*found, tuple(weights)]


def differing(mesh: Mesh, corpus: Path | None, layouts: list[dict[str, Any]]) -> list[str]:
    """Cases in which selective recomputation changes a bit."""
    cases = [
        (layout, model)
        for layout in layouts
        for model in (
            {"dtype": "torch.float32"},
            {"dtype": "torch.bfloat16", "no_bias": True, "use_fp32_norm": True},
            {"dtype": "torch.float32", "mlp_type": "gelu_tanh", "mlp_bias": True},
            {"dtype": "torch.bfloat16", "mlp_type": "geglu"},
            {"dtype": "torch.float32", "mlp_type": "relu", "residual_dropout": 0.1, "attention_dropout": 0.1},
            {"dtype": "torch.float32", "apply_post_layer_norm": True, "tie_word_embeddings": True, **BY_VOCABULARY},
            {"dtype": "torch.bfloat16", "norm_position": "reordered", "qk_norm": "full"},
            {"dtype": "torch.bfloat16", "norm_position": "sandwich", "norm_type": "layernorm", "qk_norm": "head"},
        )
    ]
    return [
        str(case)
        for case in cases
        if steps(mesh, corpus, case[0], **case[1]) != steps(mesh, corpus, case[0], **case[1], checkpoint="selective")
    ]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_corpus(tmp_path / "corpus")


def test_the_bits_of_one_process(corpus: Path) -> None:
    assert differing(single_process_mesh(), corpus, [{}]) == []


@pytest.mark.parametrize("layouts", [("tensor", "sequence"), ("1f1b", "interleaved", *["zbv"] * HAS_ZBV)], ids=" ".join)
def test_the_bits_of_every_layout(layouts: tuple[str, ...], corpus: Path) -> None:
    sections = [LAYOUTS[name] for name in layouts]
    tensor, pipeline = sections[0].get("tensor", 1), sections[0].get("pipeline", {}).get("size", 1)
    assert run_world(differing, 2, (corpus, sections), tensor=tensor, pipeline=pipeline) == [[], []]


class Operators(TorchDispatchMode):
    """Counts the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def block_run(**model: Any) -> tuple[Block, Any, tuple[torch.Tensor, ...]]:
    """(a block, what runs it on a row of two documents, the tensors of the rotary table and for dropout)."""
    config = small_config(**{"dtype": "torch.float32", "compile": False, **model})
    block = Block(config, 0, tensor_parallel_context(config, single_process_mesh(), by_sequence=False))
    generator = torch.Generator().manual_seed(0)
    for param in block.parameters():
        torch.nn.init.normal_(param, 0, 0.2, generator=generator)
        param.main_grad = torch.zeros_like(param)
    x = torch.randn(T, config.hidden_size, generator=generator).requires_grad_()
    rotary = Rotary(torch.arange(T), rope_frequencies(config, x.device), x.dtype)
    keys = token_keys(1, 0, torch.tensor([0]), T)[0]
    return block, lambda: block(x, rotary, packed_sdpa((0, 20, T)), keys), (rotary.cos, rotary.signed_sin, keys)


def test_no_product_and_no_attention_runs_again() -> None:
    counts = {}
    for checkpoint in (False, "selective", True):
        _, run, _ = block_run(checkpoint=checkpoint)
        with Operators() as operators:
            run().sum().backward()
        counts[checkpoint] = operators.counts
    costly = [name for name in counts[True] if name.endswith("mm") or name.endswith("mm_") or "attention" in name]
    assert len(costly) >= 3
    for name in costly:
        assert counts["selective"][name] == counts[False][name] <= counts[True][name], name
    assert counts["selective"]["silu"] > counts[False]["silu"]


def test_compiled_blocks_keep_as_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """A policy of operators that wraps a compiled function sees none of them: nothing would be recomputed. So what is
    cheap is marked inside the graph. The compiler also drops the statistics of norms. The norm is that of CUDA: torch
    2.11 does not mark operations inside an autograd function."""
    monkeypatch.setattr(compiled, "COMPILER", "aot_eager")
    torch._dynamo.reset()
    block, run, known = block_run(checkpoint="selective")
    eager = saved_bytes(run, block, known)
    monkeypatch.setattr(RMSNorm, "forward", lambda norm, x: F.rms_norm(x, norm.weight.shape, norm.weight, norm.eps))
    block, run, known = block_run(checkpoint="selective", compile=True)
    assert saved_bytes(run, block, known) == eager - 2 * T * 4
    block, run, known = block_run(checkpoint="selective", compile=True, residual_dropout=0.1)
    assert saved_bytes(run, block, known) <= eager - 2 * T * 4 + 8 * block.hidden_size, "the masks are made again"
