"""The whole model in one process, float64: against a plain model, documents apart, recomputation, stages, units."""

import math

import pytest
import torch
import torch.nn.functional as F

from internlm_lite.batch import IGNORE
from internlm_lite.config.schema import LossConfig
from internlm_lite.layers.flash import AttentionBackend
from internlm_lite.mesh.mesh import single_process_mesh
from internlm_lite.models.decoder import StageSpec, Transformer, build_model, tensor_parallel_context
from internlm_lite.models.initialise import initialise
from tests.layers.test_flash import plain
from tests.layers.test_mlp import ACTIVATIONS
from tests.layers.test_rope import llama
from tests.models.small import VOCAB, documents, row_of, run, small_config, small_model

LENGTHS = [5, 9, 9, 1, 12]
POSITIONS = {
    "learned": {"position": "learned", "max_position_embeddings": 12},
    "learned, by vocabulary": {"position": "learned", "max_position_embeddings": 99, "embed_split_hidden": False},
    "sinusoidal": {"position": "sinusoidal", "tie_word_embeddings": True},
    "none": {"position": "none"},
    "every second layer without": {"no_rope_every": 2, "partial_rotary_factor": 0.5},
    "dynamic": {
        "rope_scaling": {"rope_type": "dynamic", "factor": 3.0, "original_max_position_embeddings": 6},
        "rope_local_base": 50.0,
        "sliding_window": 12,  # as long as the longest document
        "layer_types": ["full_attention", "sliding_attention"],
    },
}


SCALES = {"logit_scale": 0.6, "logit_softcap": 1.5, "embed_scale": 3.0}
FEED_FORWARDS_AND_HEADS = {
    "geglu, scales": {"mlp_type": "geglu_tanh", "mlp_bias": True, "tie_word_embeddings": True, **SCALES},
    "exact geglu": {"mlp_type": "geglu", "embed_grad_scale": 0.5, "embed_scale": 3.0},
    "GPT-2's": {"mlp_type": "gelu_tanh", "mlp_bias": True, "head_bias": True, "mlp_ratio": 4},
    "gelu": {"mlp_type": "gelu", "head_bias": True, "logit_scale": 2.0},
    "relu": {"mlp_type": "relu", "mlp_bias": True, "head_bias": True, "tie_word_embeddings": True, **SCALES},
}


def gradients(model, docs, **options):
    model.zero_grad()
    losses = run(model, docs, **options)
    losses.scaled_sum.backward()
    return losses, {name: param.grad for name, param in model.named_parameters()}


def plain_norm(x, weight, bias, config):
    """Over as many of the last features as there are weights."""
    features, weight = (
        x.reshape(*x.shape[: -1 if len(weight) == x.shape[-1] else 1], -1),
        weight + config.zero_centered_norm,
    )
    if config.norm_type == "layernorm":
        return F.layer_norm(features, weight.shape, weight, bias, config.layer_norm_epsilon).view(x.shape)
    return F.rms_norm(features, weight.shape, weight, config.layer_norm_epsilon).view(x.shape)


def turned(config, layer, x):
    """x [T, .., head_dim] of one document, rotated as layer number `layer` does."""
    if config.position != "rope" or (config.no_rope_every and (layer + 1) % config.no_rope_every == 0):
        return x
    size, base, scaling = int(config.head_size * config.partial_rotary_factor), config.rope_base, config.rope_scaling
    if config.rope_local_base is not None and config.is_sliding(layer):
        base, scaling = config.rope_local_base, None
    if scaling is not None and len(x) > scaling.original_max_position_embeddings:
        stretch = scaling.factor * len(x) / scaling.original_max_position_embeddings - (scaling.factor - 1)
        base = base * stretch ** (size / (size - 2))
    return torch.cat((llama(x[..., :size], torch.arange(len(x)), base), x[..., size:]), dim=-1)


def sines(length, width):
    angle = [[t / 10000 ** (column // 2 * 2 / width) for column in range(width)] for t in range(length)]
    both = [[(math.cos if column % 2 else math.sin)(a) for column, a in enumerate(row)] for row in angle]
    return torch.tensor(both, dtype=torch.float64)


def plain_losses(model, doc):
    """One document through the architecture written out from its weights alone."""
    config, weights = model.config, dict(model.named_parameters())
    norm = lambda x, name: plain_norm(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"), config)  # noqa: E731
    linear = lambda x, name: F.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))  # noqa: E731
    head_dim, group = config.hidden_size // config.num_attention_heads, config.num_attention_heads // config.kv_heads

    def attention(x, name):
        qkv = linear(x, f"{name}.wqkv").view(len(x), config.kv_heads, group + 2, head_dim)
        q, k = qkv[:, :, :group], qkv[:, :, -2:-1]
        if config.qk_norm:
            q, k = norm(q, f"{name}.q_norm"), norm(k, f"{name}.k_norm")
        q, k = (turned(config, int(name.split(".")[1]), part) for part in (q, k))
        return linear(plain(q.flatten(1, 2), k.flatten(1, 2), qkv[:, :, -1]).flatten(1), f"{name}.wo")

    def feed_forward(x, name):
        inner = ACTIVATIONS[config.mlp_type](linear(x, f"{name}.w1"))
        return linear(inner * linear(x, f"{name}.w3") if f"{name}.w3.weight" in weights else inner, f"{name}.w2")

    x = weights["tok_embeddings.weight"][doc]
    if config.embed_scale is not None:
        a = config.embed_grad_scale
        x = (a * x + (1 - a) * x.detach()) * config.embed_scale
    if config.position == "learned":
        x = x + weights["tok_embeddings.positions.weight"][: len(doc)]
    if config.position == "sinusoidal":
        x = x + sines(len(doc), config.hidden_size)
    for n in range(config.num_layers):
        at = f"layers.{n}"
        for name, f in (("attention", attention), ("feed_forward", feed_forward)):
            before = f"{at}.{name.replace('feed_forward', 'ffn')}"
            if config.norms_at == "post":
                x = norm(x + f(x, f"{at}.{name}"), f"{before}_norm")
            elif config.norms_at == "reordered":
                x = x + norm(f(x, f"{at}.{name}"), f"{before}_norm")
            elif config.norms_at == "sandwich":
                x = x + norm(f(norm(x, f"{before}_norm"), f"{at}.{name}"), f"{before}_post_norm")
            else:
                x = x + f(norm(x, f"{before}_norm"), f"{at}.{name}")
    if config.norms_at != "post":
        x = norm(x, "norm")
    head = "tok_embeddings" if config.tie_word_embeddings else "output"
    logits = F.linear(x, weights[f"{head}.weight"], weights.get("output.bias")) * (config.logit_scale or 1)
    if config.logit_softcap is not None:
        logits = config.logit_softcap * torch.tanh(logits / config.logit_softcap)
    return F.cross_entropy(logits[:-1], doc[1:], reduction="none")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_kv_attention_heads": None, "no_bias": True, "rope_base": 1e6},
        {"apply_post_layer_norm": True},
        {"tie_word_embeddings": True},
        {"norm_position": "reordered", "qk_norm": "full"},
        {"norm_position": "sandwich", "zero_centered_norm": True, "qk_norm": "head"},
        {"norm_position": "sandwich", "num_kv_attention_heads": 1, "zero_centered_norm": True, "qk_norm": "full"},
        {"norm_type": "layernorm", "qk_norm": "head", "zero_centered_norm": True},
        {"norm_type": "layernorm", "norm_bias": False, "norm_position": "post"},
        *POSITIONS.values(),
        *FEED_FORWARDS_AND_HEADS.values(),
    ],
    ids=str,
)
def test_packed_equals_a_plain_model_document_by_document(changes):
    model, docs = small_model(**changes), documents(LENGTHS)
    losses, grads = gradients(model, docs)
    grads = {name: grad.clone() for name, grad in grads.items()}
    expected = [plain_losses(model, doc) for doc in docs]
    ours = [part[:-1] for part in losses.token_loss.split(LENGTHS)]
    for mine, theirs in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine, theirs.detach(), rtol=1e-12, atol=1e-13)
    model.zero_grad()
    (0.5 * torch.cat(expected).sum()).backward()
    for name, param in model.named_parameters():
        torch.testing.assert_close(grads[name], param.grad, rtol=1e-10, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(
    "changes",
    [
        {"sliding_window": 3},
        {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"], "attention_softcap": 0.6},
        {"attention_softcap": 2.0, "attention_scale": 0.9, "num_kv_attention_heads": None},
    ],
    ids=str,
)
def test_packed_equals_alone_with_windows(changes):
    """A window takes away from what a document allows; it does not replace its borders."""
    model, docs = small_model(**changes), documents(LENGTHS)
    losses, grads = gradients(model, docs)
    packed_grads = {name: grad.clone() for name, grad in grads.items()}
    model.zero_grad()
    for doc, mine in zip(docs, losses.token_loss.split(LENGTHS), strict=True):
        alone = run(model, [doc])
        alone.scaled_sum.backward()
        torch.testing.assert_close(mine, alone.token_loss, rtol=1e-12, atol=1e-13)
    for name, param in model.named_parameters():
        torch.testing.assert_close(packed_grads[name], param.grad, rtol=1e-10, atol=1e-12)
    plain = run(small_model(), docs).token_loss
    assert (losses.token_loss - plain).abs().max() > 1e-3


@pytest.mark.parametrize("changes", [{"checkpoint": True}, {"checkpoint": "selective"}], ids=str)
def test_recomputation_with_windows_changes_no_bit(changes):
    windows = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"], "attention_softcap": 0.6}
    docs = documents(LENGTHS)
    _, kept = gradients(small_model(**windows), docs)
    _, again = gradients(small_model(**windows, **changes), docs)
    assert all(torch.equal(kept[name], again[name]) for name in kept)


@pytest.mark.parametrize("dtype", ["torch.float64", "torch.bfloat16"])
@pytest.mark.parametrize(
    "changes", [{}, {"head_bias": True}, *({name: SCALES[name]} for name in SCALES), SCALES], ids=str
)
def test_logits_are_those_of_the_loss(changes, dtype):
    model, docs = small_model(dtype=dtype, **changes), documents(LENGTHS)
    tokens, positions, labels, attend = row_of(docs)
    losses, grads = gradients(model, docs, scale=1.0)
    model.zero_grad()
    logits = model.logits(model.hidden(tokens, positions, attend))
    assert logits.dtype == model.output.matrix.dtype
    expected = F.cross_entropy(logits.double(), labels, reduction="none", ignore_index=IGNORE)
    rtol = 1e-12 if dtype == "torch.float64" else 0.03
    torch.testing.assert_close(losses.token_loss.double(), expected.detach(), rtol=rtol, atol=rtol)
    if dtype == "torch.float64":
        expected.sum().backward()
        for name, param in model.named_parameters():
            torch.testing.assert_close(grads[name], param.grad, rtol=1e-10, atol=1e-12)


def test_another_document_changes_no_bit():
    model, docs = small_model(), documents(LENGTHS)
    before = run(model, docs).token_loss.split(LENGTHS)
    docs[1] = (docs[1] + 1) % VOCAB
    after = run(model, docs).token_loss.split(LENGTHS)
    assert [torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [True, False, True, True, True]


@pytest.mark.parametrize("fraction", [True, 0.5])
def test_recomputation_changes_no_bit(fraction):
    docs = documents(LENGTHS)
    _, kept = gradients(small_model(), docs)
    model = small_model(checkpoint=fraction)
    assert [block.recompute for block in model.layers.values()] == [True, True, fraction is True]
    _, again = gradients(model, docs)
    assert all(torch.equal(kept[name], again[name]) for name in kept)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True, "checkpoint": True},
        {"apply_post_layer_norm": True},
        {"norm_position": "sandwich", "norm_type": "layernorm", "qk_norm": "head"},
    ],
)
def test_units_partition_the_parameters_and_run_in_order(changes):
    model, called = small_model(**changes), []
    units = list(model.units())
    for index, unit in enumerate(units):
        unit.register_forward_pre_hook(lambda _module, _args, index=index: called.append(index))
    gradients(model, documents(LENGTHS))
    assert called == list(range(len(units)))
    owned = [id(param) for unit in units for param in unit.parameters()]
    assert sorted(owned) == sorted(id(param) for param in model.parameters())


def test_parameter_names_are_those_of_their_layout():
    for changes in ({}, {"tie_word_embeddings": True}, {"norm_position": "sandwich", "qk_norm": "full"}):
        for name, param in small_model(**changes).named_parameters():
            assert name == param.shard_spec.name


def test_stages_in_a_row_equal_the_whole():
    config, mesh, docs = small_config(), single_process_mesh(), documents(LENGTHS)
    tokens, positions, labels, attend = row_of(docs)
    specs = [StageSpec(range(n, n + 1), first=n == 0, last=n == 2) for n in range(3)]
    tp_ctx = tensor_parallel_context(config, mesh, by_sequence=False)
    stages = [Transformer(config, LossConfig(), tp_ctx, AttentionBackend.SDPA, spec) for spec in specs]
    whole = build_model(config, LossConfig(), mesh, AttentionBackend.SDPA)
    for model in (*stages, whole):
        initialise(model, 1)
    names = [name for stage in stages for name, _ in stage.named_parameters()]
    assert sorted(names) == sorted(name for name, _ in whole.named_parameters())
    x = tokens
    for stage in stages:
        x = stage.hidden(x, positions, attend)
    losses = stages[2].losses(x, labels, torch.tensor(1.0))
    expected = run(whole, docs, scale=1.0)
    assert torch.equal(losses.token_loss, expected.token_loss)


@pytest.mark.parametrize("dtype", ["torch.float32", "torch.bfloat16", "torch.float16"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"norm_type": "layernorm", "qk_norm": "head"},
        {"norm_position": "reordered", "qk_norm": "full", "zero_centered_norm": True},
    ],
    ids=str,
)
def test_every_dtype_agrees_with_double(dtype, changes):
    changes, docs = {"num_layers": 2, **changes}, documents(LENGTHS)
    exact, exact_grads = gradients(small_model(**changes), docs)
    losses, grads = gradients(small_model(dtype=dtype, use_fp32_norm=True, **changes), docs)
    assert losses.token_loss.dtype == torch.float32
    eps = torch.finfo(getattr(torch, dtype.removeprefix("torch."))).eps
    assert (losses.token_loss.double() - exact.token_loss).abs().max() < 60 * eps
    for name, grad in grads.items():
        sums = 120 if "qk_norm" in changes else 30  # gradients of scores cancel in part
        assert (grad.double() - exact_grads[name]).norm() < sums * eps * exact_grads[name].norm(), name
    assert {grads[n].dtype for n in grads if "norm" in n} == {torch.float32}


def test_the_first_loss_is_that_of_guessing():
    """ln V, plus half the variance of logits (a normed row times weights of std 0.02)."""
    config = small_config(vocab_size=4096, hidden_size=288, init_std=0.02, dtype="torch.float32")
    model = build_model(config, LossConfig(), single_process_mesh(), AttentionBackend.SDPA)
    initialise(model, 0)
    doc = torch.randint(0, 4096, (512,), generator=torch.Generator().manual_seed(0))
    losses = run(model, [doc])
    n_labels = int((row_of([doc])[2] != IGNORE).sum())
    assert losses.train_loss_sum.item() / n_labels == pytest.approx(math.log(4096) + 288 * 0.02**2 / 2, abs=0.05)


def test_a_row_of_padding_alone_has_no_nan_and_no_gradient():
    """Also where a token sees itself alone."""
    model = small_model(sliding_window=1, attention_softcap=0.7, qk_norm="head")
    tokens, positions, labels, attend = row_of([torch.zeros(4, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)])
    hidden = model.hidden(tokens, positions, attend)
    losses = model.losses(hidden, torch.full_like(labels, IGNORE), torch.ones(()))
    losses.scaled_sum.backward()
    assert torch.isfinite(hidden).all() and not losses.token_loss.any()
    assert all(param.grad is None or not param.grad.any() for param in model.parameters())
