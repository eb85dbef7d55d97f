"""Models of transformers, whole, in float64: the same logits, gradients and greedy tokens as ours.

transformers computes norms and rotary angles in float32 whatever the model's dtype; in these tests both are replaced by
the same formulas in float64, so that everything else has to agree to 1e-10. The frequencies themselves are compared
with transformers' own to single precision.
"""

from __future__ import annotations

import math
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from internlm_lite.apps.convert.compare_logits import compare
from internlm_lite.apps.convert.from_hf import read_hf
from internlm_lite.apps.convert.hf_config import from_hf
from internlm_lite.apps.convert.recipes import our_recipes, sources_of
from internlm_lite.apps.convert.to_hf import open_checkpoint, write_hf
from internlm_lite.config.schema import LossConfig, ModelConfig
from internlm_lite.generate.decode import generate
from internlm_lite.generate.load_model import load_model
from internlm_lite.generate.request import Request
from internlm_lite.generate.sample import Sampling
from internlm_lite.layers.flash import AttentionBackend, packed
from internlm_lite.layers.rope import rope_frequencies
from internlm_lite.mesh.mesh import single_process_mesh
from internlm_lite.models.decoder import build_model
from internlm_lite.models.stages import WholeModel
from tests.apps.convert.made import TOKENS, our_logits

SHAPE = {
    "vocab_size": 96,
    "hidden_size": 60,
    "intermediate_size": 100,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
PLAIN = {"rope_type": "default"}
MIXED = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
NO_PADDING = {"pad_token_id": None}
LINEAR = {"rope_type": "linear", "factor": 3.0}
GEMMA = {"num_key_value_heads": 3, "head_dim": 8, "query_pre_attn_scalar": 7}
CAPS = {"attn_logit_softcapping": 0.5, "final_logit_softcapping": 2.0}
GPT2 = {"n_embd": 60, "n_layer": 3, "n_head": 6, "n_positions": 64, "bos_token_id": None, "eos_token_id": None}
NEOX = {"use_parallel_residual": False, "bos_token_id": None, "eos_token_id": None}


def by_layer(full: dict[str, Any], local_base: float = 10000.0) -> dict[str, Any]:
    local = {"rope_type": "default", "rope_theta": local_base}
    return {"full_attention": {"rope_theta": 10000.0, **full}, "sliding_attention": local}


MODELS: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "llama 2": ("llama", PLAIN, {}),
    "llama 3.1": ("llama", {**LLAMA3, "original_max_position_embeddings": 16, "rope_theta": 500.0}, {}),
    "llama 3.2, tied": ("llama", PLAIN, {"tie_word_embeddings": True, "head_dim": 14}),
    "llama, linear": ("llama", {"rope_type": "linear", "factor": 3.0}, {"attention_bias": True}),
    "llama, gelu, biases": ("llama", PLAIN, {"hidden_act": "gelu", "attention_bias": True, "mlp_bias": True}),
    "llama, dynamic": ("llama", {"rope_type": "dynamic", "factor": 2.0}, {"max_position_embeddings": 32}),
    "mistral": ("mistral", PLAIN, {"sliding_window": None, "head_dim": 16}),
    "mistral, windows": ("mistral", PLAIN, {"sliding_window": 7}),
    "qwen2": ("qwen2", PLAIN, {"tie_word_embeddings": True}),
    "qwen2, windows": ("qwen2", PLAIN, {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2}),
    "qwen2, yarn": ("qwen2", YARN, {}),
    "qwen3": ("qwen3", PLAIN, {"head_dim": 18}),
    "qwen3, windows": ("qwen3", PLAIN, {"head_dim": 12, "use_sliding_window": True, "sliding_window": 4, **MIXED}),
    "olmo2": ("olmo2", PLAIN, {**NO_PADDING, "attention_bias": True}),
    "olmo2, every head": ("olmo2", YARN, {**NO_PADDING, "num_key_value_heads": 6, "head_dim": 12}),
    "olmo3": ("olmo3", by_layer(YARN), {**NO_PADDING, "sliding_window": 6, **MIXED}),
    "olmo3, one rotation": (
        "olmo3",
        by_layer(PLAIN),
        {**NO_PADDING, "sliding_window": 9, "num_hidden_layers": 4, "head_dim": 14},
    ),
    "gemma2": ("gemma2", PLAIN, {**NO_PADDING, **GEMMA, **CAPS, "sliding_window": 7}),
    "gemma2, biases": ("gemma2", YARN, {**NO_PADDING, **GEMMA, **CAPS, "head_dim": 10, "attention_bias": True}),
    "gemma3": ("gemma3_text", by_layer(LINEAR, 100.0), {**NO_PADDING, **GEMMA, "sliding_window": 5, **MIXED}),
    "gemma3, untied": (
        "gemma3_text",
        by_layer(PLAIN, 100.0),
        {**NO_PADDING, **GEMMA, "head_dim": 16, "final_logit_softcapping": 3.0, "tie_word_embeddings": False},
    ),
    "gpt2": ("gpt2", None, GPT2),
    "gpt2, untied": ("gpt2", None, {**GPT2, "n_inner": 100, "tie_word_embeddings": False}),
    "gpt2, relu": ("gpt2", None, {**GPT2, "activation_function": "relu"}),
    "gpt_neox": ("gpt_neox", {**PLAIN, "partial_rotary_factor": 0.4}, NEOX),
    "gpt_neox, no biases": ("gpt_neox", {**LINEAR, "partial_rotary_factor": 0.6}, {**NEOX, "attention_bias": False}),
    "smollm3": ("smollm3", PLAIN, {**NO_PADDING, "no_rope_layer_interval": 2}),
    "smollm3, windows": (
        "smollm3",
        YARN,
        {**NO_PADDING, "no_rope_layers": [1, 1, 0], "use_sliding_window": True, "sliding_window": 5, "head_dim": 8},
    ),
    "phi3": ("phi3", PLAIN, {**NO_PADDING, "sliding_window": 6}),
    "phi3, partial": ("phi3", {**PLAIN, "partial_rotary_factor": 0.4}, {**NO_PADDING, "num_key_value_heads": 3}),
    "qwen3, yarn": ("qwen3", {**YARN, "factor": 8.0, "beta_fast": 4.0, "truncate": False}, {"head_dim": 8}),
}
"""Name -> model_type, rope_parameters, further keys of config.json."""


def theirs_of(kind: str, folder: Path) -> Any:
    """A random model of transformers, saved; biases and norms have values of their own."""
    family, rope, more = MODELS[kind]
    if family == "gpt2":
        config = transformers.GPT2Config(vocab_size=SHAPE["vocab_size"], **more)
    else:
        rope = rope if "full_attention" in rope else {"rope_theta": 10000.0, **rope}
        config = transformers.AutoConfig.for_model(family, **{**SHAPE, **more}, rope_parameters=rope)
    torch.manual_seed(5)
    model = transformers.AutoModelForCausalLM.from_config(config).double().eval()
    for name, param in model.named_parameters():
        if param.dim() == 1:
            torch.nn.init.uniform_(param, -0.3, 0.3)
            param.data += 1.0 if "norm" in name and not family.startswith("gemma") else 0.0
        else:
            torch.nn.init.normal_(param, std=0.15)
    model.float().save_pretrained(folder, max_shard_size="60KB")
    return model.double()


def in_float64(model: Any, ours: WholeModel) -> None:
    """Norms, angles and the scale of embeddings of transformers' `model` in float64."""
    config = ours.any_stage.config
    for module in model.modules():
        name = type(module).__name__
        if name.endswith("RMSNorm"):
            module.forward = normalised(module, 1.0 if name.startswith("Gemma") else 0.0)
        elif name.endswith("ScaledWordEmbedding"):
            module.embed_scale = torch.tensor(module.scalar_embed_scale, dtype=torch.float64)
        elif name.endswith("RotaryEmbedding"):
            module.forward = angles(module, config)


def normalised(module: Any, offset: float) -> Any:
    eps = getattr(module, "variance_epsilon", None) or module.eps
    return lambda x: (offset + module.weight) * (x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt())


def angles(module: Any, config: ModelConfig) -> Any:
    """Cosines and sines of our frequencies, which are theirs to single precision."""
    kinds = {None: "", "full_attention": "full_attention_", "sliding_attention": "sliding_attention_"}
    ours = {}
    for kind, prefix in kinds.items():
        if hasattr(module, f"{prefix}inv_freq"):
            is_local = kind == "sliding_attention" and config.rope_local_base is not None
            ours[kind] = rope_frequencies(config, torch.device("cpu"), "local" if is_local else "scaled")
            theirs = getattr(module, f"{prefix}inv_freq").double()
            torch.testing.assert_close(theirs, ours[kind].radians, rtol=1e-6, atol=1e-12)
            assert getattr(module, f"{prefix}attention_scaling") == pytest.approx(ours[kind].growth)
    assert ours

    def forward(x: torch.Tensor, position_ids: torch.Tensor, layer_type: str | None = None) -> Any:
        lengths = torch.full_like(position_ids[0], int(position_ids.max()) + 1)
        angle = ours[layer_type].angles(position_ids[0], lengths)
        if ours[layer_type].dynamic is not None:
            theirs, _ = ROPE_INIT_FUNCTIONS["dynamic"](module.config, seq_len=int(lengths[0]))
            torch.testing.assert_close(angle, torch.outer(position_ids[0], theirs).double(), rtol=1e-5, atol=1e-9)
        angle = torch.cat((angle, angle), dim=-1)[None]
        return angle.cos() * ours[layer_type].growth, angle.sin() * ours[layer_type].growth

    return forward


@pytest.fixture(autouse=True)
def softmax_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some of transformers' attention rounds to float32 before the softmax."""
    softmax = torch.nn.functional.softmax
    monkeypatch.setattr(torch.nn.functional, "softmax", lambda x, dim, dtype=None: softmax(x, dim))


@pytest.fixture(params=MODELS)
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, WholeModel, ModelConfig]:
    """A model of transformers, and the same one as ours, in float64."""
    theirs = theirs_of(request.param, tmp_path / "hf")
    read_hf(tmp_path / "hf", str(tmp_path / "ours"))
    ours, config = load_model(str(tmp_path / "ours"), single_process_mesh(), "torch.float64")
    in_float64(theirs, ours)
    return theirs, ours, config.model


def test_logits_gradients_and_greedy_tokens_are_theirs(pair: tuple[Any, WholeModel, ModelConfig]) -> None:
    theirs, ours, model = pair
    stage, labels = ours.any_stage, TOKENS.roll(-1)
    expected = theirs(TOKENS[None]).logits[0]
    torch.nn.functional.cross_entropy(expected, labels, reduction="sum").backward()
    borders = (0, len(TOKENS))
    attend = packed(AttentionBackend.SDPA, torch.tensor(borders, dtype=torch.int32), borders, len(TOKENS))
    positions = torch.arange(len(TOKENS))
    with torch.no_grad():
        torch.testing.assert_close(ours.logits(TOKENS, positions, attend), expected, rtol=0, atol=1e-10)
    for param in stage.parameters():
        param.requires_grad_()
    stage.losses(stage.hidden(TOKENS, positions, attend), labels, torch.ones(())).scaled_sum.backward()
    gradients = {name: param.grad for name, param in theirs.named_parameters()}
    if family_of(theirs) == "gpt_neox":  # another name in files
        gradients["embed_out.weight"] = gradients["lm_head.weight"]
    found = {param.shard_spec.name: param.grad for param in stage.parameters()}
    for recipe in our_recipes(model, family_of(theirs)):
        sources = {name: gradients[name].T if recipe.transposed else gradients[name] for name in sources_of([recipe])}
        wanted = torch.cat([sources[rows.name][rows.start : rows.stop] for rows in recipe.rows])
        torch.testing.assert_close(found[recipe.name], wanted, rtol=0, atol=1e-11, msg=recipe.name)  # 1e-13 of 60
    prompt = TOKENS[:7].tolist()
    (continued,) = generate(ours, [Request(prompt, 50)], Sampling(temperature=0.0))
    given, options = torch.tensor([prompt]), {"pad_token_id": 0, "eos_token_id": None}
    expected = theirs.generate(
        given, attention_mask=torch.ones_like(given), max_new_tokens=50, do_sample=False, **options
    )
    assert list(continued.tokens) == expected[0, 7:].tolist(), "also beyond the positions it was trained on"


def family_of(model: Any) -> Any:
    return model.config.model_type


def test_packed_documents_are_as_alone(pair: tuple[Any, WholeModel, ModelConfig]) -> None:
    _, ours, _ = pair
    borders = (0, 9, 10, 40)
    attend = packed(AttentionBackend.SDPA, torch.tensor(borders, dtype=torch.int32), borders, 30)
    positions = torch.cat([torch.arange(stop - start) for start, stop in pairwise(borders)])
    with torch.no_grad():
        row = ours.logits(TOKENS, positions, attend)
        for start, stop in pairwise(borders):
            alone = (0, stop - start)
            own = packed(AttentionBackend.SDPA, torch.tensor(alone, dtype=torch.int32), alone, stop - start)
            logits = ours.logits(TOKENS[start:stop], torch.arange(stop - start), own)
            torch.testing.assert_close(row[start:stop], logits, rtol=0, atol=1e-12)


def test_exported_it_is_the_same_model(pair: tuple[Any, WholeModel, ModelConfig], tmp_path: Path) -> None:
    theirs, _, _ = pair
    found, config, _ = open_checkpoint(str(tmp_path / "ours"))
    write_hf(found, config, tmp_path / "back", family=family_of(theirs), dtype="float32", tokenizer=None)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "back", local_files_only=True, output_loading_info=True
    )
    assert not any(info[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(model) is type(theirs)
    before = dict(theirs.named_parameters())
    for name, param in model.named_parameters():
        assert torch.equal(param.double(), before[name].double()), name
    one, other = map(rotations, (model, transformers.AutoModelForCausalLM.from_config(theirs.config)))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert bool(one) == (family_of(theirs) != "gpt2")


def rotations(model: Any) -> dict[str, torch.Tensor]:
    """What a model rotates by: frequencies and factors, for each kind of layer."""
    for module in model.modules():
        if type(module).__name__.endswith("RotaryEmbedding"):
            scalars = {name: torch.tensor(value) for name, value in vars(module).items() if name.endswith("scaling")}
            return dict(module.named_buffers()) | scalars
    return {}


def test_frequencies_of_llama_3_1() -> None:
    """The published parameters: wavelengths under 2,048 stay, those over 8,192 are 8 times as long."""
    scaling = {**LLAMA3, "original_max_position_embeddings": 8192}
    shape = {"num_attention_heads": 32, "hidden_size": 4096, "num_layers": 1, "vocab_size": 8, "rope_base": 500000.0}
    plain, scaled = (
        rope_frequencies(ModelConfig.model_validate({**shape, "rope_scaling": one}), torch.device("cpu")).radians
        for one in (None, scaling)
    )
    wavelength = 2 * math.pi / plain
    assert torch.equal(scaled[wavelength < 2048], plain[wavelength < 2048])
    torch.testing.assert_close(scaled[wavelength > 8192], plain[wavelength > 8192] / 8)
    between = (wavelength > 2048) & (wavelength < 8192)
    assert between.any() and ((scaled < plain) & (scaled > plain / 8))[between].all()


def in_float32(folder: Path) -> WholeModel:
    return load_model(str(folder), single_process_mesh(), "torch.float32")[0]


def test_the_text_part_of_a_gemma_3_that_reads_images(tmp_path: Path) -> None:
    """The larger ones are published with a part for images alone, and with what is not the default in config.json."""
    text = {**SHAPE, **NO_PADDING, **GEMMA, "sliding_window": 5, "rope_scaling": {**LINEAR, "factor": 8.0}}
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = transformers.Gemma3Config(text_config=text, vision_config={**vision, "image_size": 28, "patch_size": 14})
    torch.manual_seed(5)
    theirs = transformers.Gemma3ForConditionalGeneration(config).eval()
    theirs.save_pretrained(tmp_path / "hf", max_shard_size="60KB")
    taken = read_hf(tmp_path / "hf", str(tmp_path / "ours"))
    assert taken.notes[0] == "the part of the model that reads images is left out"
    with torch.no_grad():
        torch.testing.assert_close(
            our_logits(in_float32(tmp_path / "ours")), theirs(TOKENS[None]).logits[0], rtol=0, atol=1e-5
        )
    assert compare(partial(in_float32, tmp_path / "ours"), tmp_path / "hf").is_small


def test_a_folder_without_the_head_and_with_masks(tmp_path: Path) -> None:
    """GPT-2's own: names without "transformer.", and the causal masks of its attention among the weights."""
    theirs = theirs_of("gpt2", tmp_path / "whole")
    weights = {name: tensor.float().contiguous() for name, tensor in theirs.transformer.state_dict().items()}
    weights |= {f"h.{layer}.attn.bias": torch.ones(1, 1, 64, 64).tril() for layer in range(3)}
    (tmp_path / "hf").mkdir()
    save_file(weights, tmp_path / "hf" / "model.safetensors", {"format": "pt"})
    (tmp_path / "hf" / "config.json").write_bytes((tmp_path / "whole" / "config.json").read_bytes())
    read_hf(tmp_path / "hf", str(tmp_path / "ours"))
    ours, _ = load_model(str(tmp_path / "ours"), single_process_mesh(), "torch.float64")
    with torch.no_grad():
        torch.testing.assert_close(our_logits(ours), theirs(TOKENS[None]).logits[0], rtol=0, atol=1e-10)
    assert compare(partial(in_float32, tmp_path / "ours"), tmp_path / "hf").is_small


@pytest.mark.parametrize("truncate", [True, False])
def test_frequencies_of_yarn_at_its_published_size(truncate: bool) -> None:
    """Heads of 128 features, 131,072 positions: the ends of the ramp, and the given factor."""
    scaling = {**YARN, "original_max_position_embeddings": 32768, "truncate": truncate}
    shape = {"num_attention_heads": 32, "hidden_size": 4096, "num_layers": 1, "vocab_size": 8, "rope_base": 1e6}
    rope = {**scaling, "rope_theta": 1e6}
    expected, growth = ROPE_INIT_FUNCTIONS["yarn"](transformers.Qwen3Config(rope_parameters=rope))
    ours = rope_frequencies(ModelConfig.model_validate({**shape, "rope_scaling": scaling}), torch.device("cpu"))
    torch.testing.assert_close(expected.double(), ours.radians, rtol=1e-6, atol=0)
    assert growth == ours.growth and len({*(ours.radians / expected).round(decimals=3).tolist()}) == 1


@pytest.mark.parametrize("width", [1152, 3072])
def test_embeddings_of_gemma_in_half_precision(width: int) -> None:
    """Their factor is rounded to bf16 first: sqrt(3072) to 55.5, sqrt(1152) to 34."""
    more = {"hidden_size": width, "num_hidden_layers": 1, "intermediate_size": 8, **GEMMA, **NO_PADDING}
    theirs = transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**{**SHAPE, **more})).bfloat16()
    model = from_hf({**theirs.config.to_dict(), "model_type": "gemma2"}, "here").model
    embedding = build_model(model, LossConfig(), single_process_mesh(), AttentionBackend.SDPA).tok_embeddings
    assert embedding is not None and embedding.weight.dtype == torch.bfloat16
    with torch.no_grad():
        embedding.weight.copy_(theirs.model.embed_tokens.weight)
        found = embedding(TOKENS)
        assert torch.equal(found, theirs.model.embed_tokens(TOKENS))
        assert torch.equal(found[0], embedding.weight[TOKENS[0]] * {1152: 34.0, 3072: 55.5}[width])
