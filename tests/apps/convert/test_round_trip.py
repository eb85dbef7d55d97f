"""Ours -> Hugging Face -> ours, bit for bit, and Hugging Face -> ours, to the same logits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from internlm_lite.apps.convert.compare_logits import compare
from internlm_lite.apps.convert.from_hf import read_hf
from internlm_lite.apps.convert.hf_folder import INDEX, HFFolder
from internlm_lite.apps.convert.to_hf import open_checkpoint, write_hf
from internlm_lite.errors import CheckpointError
from internlm_lite.generate.load_model import load_model
from internlm_lite.mesh.mesh import Mesh, single_process_mesh
from tests.apps.convert.made import (
    masters,
    our_logits,
    save_llama,
    save_ours,
    save_ours_on,
    small_tokenizer,
    their_logits,
)
from tests.apps.convert.test_shapes import OWN
from tests.train.runs import run_training, tiny
from tests.world import run_world

SHAPES = {
    "grouped": {"no_bias": True},
    "grouped, biases": {},
    "tied": {"no_bias": True, "tie_word_embeddings": True},
    "three queries a head": {"num_attention_heads": 6, "hidden_size": 60, "no_bias": True},
    "every head, biases": {"num_kv_attention_heads": None},
    "every head, biases, tied": {"num_kv_attention_heads": None, "tie_word_embeddings": True},
}
SHAPES |= {f"as {family}": own for family, own in OWN.items()}
WHOLE = ("as gpt2", "as gpt_neox")
"""Families without grouped queries."""
CASES = [(family, shape) for family in ("llama", "internlm2") for shape in SHAPES if not shape.startswith("as ")]
CASES += [("internlm", shape) for shape in SHAPES if shape.startswith("every head")]
CASES += [(family, f"as {family}") for family in OWN]


def convert(ours: Path, out: Path, family: str = "llama", dtype: str = "float32", shard_bytes: int = 60_000):
    found, config, _ = open_checkpoint(str(ours))
    return write_hf(found, config, out, family=family, dtype=dtype, tokenizer=None, shard_bytes=shard_bytes)


def fp32(folder: Path):
    return load_model(str(folder), single_process_mesh(), "torch.float32")[0]


@pytest.mark.parametrize(("family", "shape"), CASES)
def test_there_and_back_bit_for_bit_and_the_same_logits(tmp_path, caplog, family, shape):
    save_ours(tmp_path / "ours", **({"num_kv_attention_heads": None} if shape in WHOLE else {}) | SHAPES[shape])
    written = convert(tmp_path / "ours", tmp_path / "hf", family)
    assert len(written.files) > 2
    difference = compare(lambda: fp32(tmp_path / "ours"), tmp_path / "hf")
    assert difference.is_small and difference.largest < 1e-5 and difference.largest_logit > 0.1
    taken = read_hf(tmp_path / "hf", str(tmp_path / "back"))
    before, after = masters(tmp_path / "ours"), masters(tmp_path / "back")
    assert before.keys() == after.keys() and taken.n_tensors == len(before)
    assert all(torch.equal(before[name], after[name]) and after[name].dtype == torch.float32 for name in before)
    assert "another function" not in caplog.text


@pytest.mark.parametrize(
    ("family", "lacks"),
    [
        ("gpt2", {"no_bias": True, "mlp_bias": False, "norm_bias": False}),
        ("gpt2", {"no_bias": False, "qkv_bias": False}),
        ("gpt_neox", {"no_bias": True, "mlp_bias": False}),
        ("qwen2", {"no_bias": True, "qkv_bias": False}),
    ],
)
def test_biases_that_every_model_of_a_family_has_are_0_where_ours_has_none(tmp_path, family, lacks):
    save_ours(tmp_path / "ours", **{**OWN[family], "num_kv_attention_heads": None, **lacks})
    convert(tmp_path / "ours", tmp_path / "hf", family)
    assert compare(lambda: fp32(tmp_path / "ours"), tmp_path / "hf").is_small
    read_hf(tmp_path / "hf", str(tmp_path / "back"))
    before, after = masters(tmp_path / "ours"), masters(tmp_path / "back")
    assert before.keys() < after.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert not any(after[name].any() for name in after.keys() - before.keys())


@pytest.mark.parametrize(("tied", "bias", "kv_heads"), [(False, False, 2), (True, False, 8), (False, True, 1)])
def test_a_llama_of_transformers_gives_the_same_logits_here(tmp_path, tied, bias, kv_heads):
    theirs = save_llama(tmp_path / "hf", tied=tied, bias=bias, kv_heads=kv_heads)
    assert (tmp_path / "hf" / INDEX).exists()
    taken = read_hf(tmp_path / "hf", str(tmp_path / "ours"))
    expected = their_logits(theirs)
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(our_logits(fp32(tmp_path / "ours")), expected, rtol=0, atol=1e-5)
    assert taken.config.model.tie_word_embeddings == tied and taken.config.model.no_bias != bias
    assert compare(lambda: fp32(tmp_path / "ours"), tmp_path / "hf").is_small


@pytest.mark.parametrize("shard_bytes", [60_000, 10**9])
def test_transformers_reads_every_tensor_of_ours(tmp_path, shard_bytes):
    import transformers

    save_ours(tmp_path / "ours")
    written = convert(tmp_path / "ours", tmp_path / "hf", shard_bytes=shard_bytes)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "hf", local_files_only=True, output_loading_info=True
    )
    assert not any(info[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(model).__name__ == "LlamaForCausalLM"
    torch.testing.assert_close(their_logits(model.eval()), our_logits(fp32(tmp_path / "ours")), rtol=0, atol=1e-5)
    sizes = [(tmp_path / "hf" / file).stat().st_size for file in written.files]
    assert (written.files == ("model.safetensors",)) == (shard_bytes > 60_000)
    if shard_bytes == 60_000:
        assert written.files[0] == f"model-00001-of-{len(sizes):05d}.safetensors"
        index = json.loads((tmp_path / "hf" / INDEX).read_text())
        headers = {file: safe_open(tmp_path / "hf" / file, "pt").keys() for file in written.files}
        assert index["weight_map"] == {name: file for file, names in headers.items() for name in names}
        assert max(sizes) < 60_000 + 4096 and sum(sizes) > index["metadata"]["total_size"]


def test_the_vocabulary_is_that_of_the_model_not_of_the_tokenizer(tmp_path):
    """Rows beyond the tokenizer's tokens were trained, too: none is cut, and none is added for tensor parallelism."""
    tokenizer = small_tokenizer(tmp_path)
    save_ours(tmp_path / "ours", vocab_size=311, tokenizer=str(tokenizer.path))
    found, config, _ = open_checkpoint(str(tmp_path / "ours"))
    write_hf(found, config, tmp_path / "hf", family="llama", dtype="float32", tokenizer=tokenizer)
    shapes = HFFolder(tmp_path / "hf").shapes
    assert (
        tokenizer.vocab_size == 300 and json.loads((tmp_path / "hf" / "config.json").read_text())["vocab_size"] == 311
    )
    assert shapes["lm_head.weight"] == shapes["model.embed_tokens.weight"] == (311, 64)
    read_hf(tmp_path / "hf", str(tmp_path / "back"))
    assert all(torch.equal(masters(tmp_path / "back")[name], rows) for name, rows in masters(tmp_path / "ours").items())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_the_rounded_master(tmp_path, dtype):
    save_ours(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "hf", dtype=dtype)
    read_hf(tmp_path / "hf", str(tmp_path / "back"))
    before, after = masters(tmp_path / "ours"), masters(tmp_path / "back")
    assert all(torch.equal(before[name].to(getattr(torch, dtype)).float(), after[name]) for name in before)
    assert any(not torch.equal(before[name], after[name]) for name in before)
    # Verification gives both sides the rounded weights, so its bound stays that of fp32.
    assert compare(lambda: fp32(tmp_path / "ours"), tmp_path / "hf").largest < 1e-5


def test_what_fp16_cannot_hold_is_named(tmp_path):
    save_ours(tmp_path / "ours", init_std=30000.0)
    with pytest.raises(CheckpointError, match=r"embed_tokens.weight: .* too large for torch.float16"):
        convert(tmp_path / "ours", tmp_path / "hf", dtype="float16")
    assert [path.name for path in tmp_path.iterdir()] == ["ours"], "nothing half-made stays"


@pytest.mark.parametrize("family", ["internlm", "internlm2"])
def test_verification_sees_a_head_in_a_wrong_place(tmp_path, family):
    from safetensors.torch import load_file, save_file

    save_ours(tmp_path / "ours", num_kv_attention_heads=None)
    convert(tmp_path / "ours", tmp_path / "hf", family, shard_bytes=10**9)
    path = tmp_path / "hf" / "model.safetensors"
    weights = load_file(path)
    name = next(name for name in weights if name.endswith(("q_proj.weight", "wqkv.weight")))
    weights[name] = weights[name].roll(8, 0)
    save_file(weights, path)
    difference = compare(lambda: fp32(tmp_path / "ours"), tmp_path / "hf")
    assert not difference.is_small and difference.largest > 100 * difference.bound


def logits_on(mesh: Mesh, folder: str) -> torch.Tensor:
    return our_logits(load_model(folder, mesh, "torch.float32")[0])


def test_checkpoints_of_two_ranks_go_out_and_come_in(tmp_path):
    """WriteResult by two tensor-parallel ranks, converted, and read by two again."""
    run_world(save_ours_on, 2, (tmp_path / "two",), tensor=2)
    save_ours(tmp_path / "one")
    convert(tmp_path / "two", tmp_path / "hf")
    convert(tmp_path / "one", tmp_path / "hf1")
    for name, shape in HFFolder(tmp_path / "hf").shapes.items():
        rows = (name, 0, shape[0])
        assert torch.equal(HFFolder(tmp_path / "hf").read(*rows), HFFolder(tmp_path / "hf1").read(*rows)), name
    read_hf(tmp_path / "hf", str(tmp_path / "back"))
    alone = our_logits(fp32(tmp_path / "back"))
    for logits in run_world(logits_on, 2, (str(tmp_path / "back"),), tensor=2):
        torch.testing.assert_close(logits, alone, rtol=0, atol=1e-5)


def test_training_starts_from_converted_weights(tmp_path):
    """The same first losses as from the checkpoint that was never away."""
    changes = {"vocab_size": 256, "hidden_size": 32, "num_attention_heads": 4, "mlp_ratio": 8 / 3, "init_std": 0.2}
    save_ours(tmp_path / "ours", **changes)
    convert(tmp_path / "ours", tmp_path / "hf", "internlm2")
    read_hf(tmp_path / "hf", str(tmp_path / "back"))
    model = {**changes, "num_kv_attention_heads": 2, "dtype": "torch.float32", "rope_base": 50000}
    losses = []
    for folder in ("ours", "back"):
        config = tiny(None, ckpt={"load_model_only_folder": str(tmp_path / folder)}, model=model)
        metrics = run_training(single_process_mesh(), config, tmp_path / f"run-{folder}")
        losses.append([step["loss"] for step in metrics])
    assert losses[0] == losses[1] and len(losses[0]) == 8
    fresh = run_training(single_process_mesh(), tiny(None, model=model), tmp_path / "fresh")
    assert fresh[0]["loss"] != losses[0][0]
