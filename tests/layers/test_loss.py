"""The fused head and loss against F.linear + F.cross_entropy."""

import math

import pytest
import torch
import torch.nn.functional as F

from internlm_lite.batch import IGNORE
from internlm_lite.config.schema import LossConfig
from internlm_lite.layers import loss as loss_module
from internlm_lite.layers.loss import LossOptions, linear_cross_entropy
from internlm_lite.mesh.mesh import single_process_mesh

TP = single_process_mesh().tp
SCALE = torch.tensor(0.25)


def inputs(n_tokens=37, vocab=51, width=8, dtype=torch.float64, size=1.0):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(n_tokens, width, generator=generator, dtype=torch.float64) * size
    weight = torch.randn(vocab, width, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, vocab, (n_tokens,), generator=generator)
    labels[::5] = IGNORE
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), labels


def fused(hidden, weight, labels, smoothing=0.0, scale=SCALE):
    return linear_cross_entropy(hidden, weight, labels, scale, LossOptions(TP, smoothing))


def reference(hidden, weight, labels, smoothing=0.0):
    logits = F.linear(hidden, weight)
    return logits, F.cross_entropy(logits, labels, label_smoothing=smoothing, reduction="none", ignore_index=IGNORE)


@pytest.fixture(params=[1, 10, 37], ids=lambda n: f"chunks of {n}")
def chunk_tokens(request, monkeypatch):
    monkeypatch.setitem(loss_module._CHUNK_BYTES, "cpu", request.param * 51 * 8)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_losses_and_gradients_equal_torchs(chunk_tokens, smoothing):
    hidden, weight, labels = inputs()
    ours = fused(hidden, weight, labels, smoothing)
    ours_grads = torch.autograd.grad(3 * ours.scaled_sum, (hidden, weight))
    logits, expected = reference(hidden, weight, labels, smoothing)
    grads = torch.autograd.grad(3 * SCALE.double() * expected.sum(), (hidden, weight))
    torch.testing.assert_close(ours.train_loss_sum, expected.sum().detach(), rtol=1e-13, atol=0)
    torch.testing.assert_close(ours.scaled_sum, (expected.sum() * 0.25), rtol=1e-13, atol=0)
    torch.testing.assert_close(ours.token_loss, reference(hidden, weight, labels)[1].detach(), rtol=1e-12, atol=1e-14)
    assert torch.equal(ours.correct, logits.argmax(dim=-1) == labels)
    for mine, theirs in zip(ours_grads, grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-14)


OPTIONS = {
    "bias": {},
    "scale": {"logit_scale": 0.3},
    "cap": {"logit_softcap": 0.8},
    "all": {"logit_scale": 1.7, "logit_softcap": 2.0, "z_loss": 0.3, "label_smoothing": 0.2},
    "z_loss": {"z_loss": 0.05},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_bias_scale_cap_and_z_loss_equal_torchs(chunk_tokens, options):
    hidden, weight, labels = inputs(size=3.0)
    bias = torch.linspace(-1, 1, len(weight), dtype=torch.float64).requires_grad_()
    ours = linear_cross_entropy(hidden, weight, labels, SCALE, LossOptions(TP, **options), bias)
    ours_grads = torch.autograd.grad(ours.scaled_sum, (hidden, weight, bias))
    logits = F.linear(hidden, weight, bias) * options.get("logit_scale", 1)
    if cap := options.get("logit_softcap"):
        logits = cap * torch.tanh(logits / cap)
    kept = labels != IGNORE
    pure = F.cross_entropy(logits, labels, reduction="none", ignore_index=IGNORE)
    smoothed = F.cross_entropy(
        logits, labels, reduction="sum", ignore_index=IGNORE, label_smoothing=options.get("label_smoothing", 0.0)
    )
    expected = SCALE.double() * (smoothed + options.get("z_loss", 0) * logits[kept].logsumexp(1).square().sum())
    grads = torch.autograd.grad(expected, (hidden, weight, bias))
    torch.testing.assert_close(ours.scaled_sum, expected, rtol=1e-13, atol=0)
    torch.testing.assert_close(ours.train_loss_sum, smoothed.detach(), rtol=1e-13, atol=0)
    torch.testing.assert_close(ours.token_loss, pure.detach(), rtol=1e-12, atol=1e-14)
    for mine, theirs in zip(ours_grads, grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_bias_scale_and_cap_are_computed_in_float32(dtype):
    """In bf16 the cap alone would round the logits to 8 bits."""
    hidden, weight, labels = inputs(dtype=dtype)
    bias = torch.linspace(-1, 1, len(weight)).to(dtype)
    options = LossOptions(TP, logit_scale=0.7, logit_softcap=2.0)
    ours = linear_cross_entropy(hidden, weight, labels, SCALE, options, bias)
    logits = 2 * torch.tanh((F.linear(hidden, weight).double() + bias) * 0.7 / 2)
    expected = F.cross_entropy(logits, labels, reduction="none", ignore_index=IGNORE).float()
    torch.testing.assert_close(ours.token_loss, expected.detach(), rtol=1e-5, atol=1e-6)


def seeds_loss(logits, labels, smoothing, pad):
    """The annotated transformer's LabelSmoothing, without rows of padding."""
    kept, vocab = labels != IGNORE, logits.shape[1]
    target = torch.full_like(logits, smoothing / (vocab - 2)).scatter(1, labels.clamp(min=0)[:, None], 1 - smoothing)
    target[:, pad] = 0
    return F.kl_div(logits.log_softmax(-1)[kept], target[kept].detach(), reduction="sum"), target[kept]


@pytest.mark.parametrize("parallel_output", [True, False])
@pytest.mark.parametrize("pad", [2, 50])
def test_smoothing_without_the_pad_column_is_the_seeds(chunk_tokens, pad, parallel_output):
    hidden, weight, labels = inputs()
    labels[labels == pad] = 0
    bias = torch.linspace(-1, 1, len(weight), dtype=torch.float64).requires_grad_()
    options = LossOptions(TP, 0.1, parallel_output=parallel_output, pad_id=pad)
    ours = linear_cross_entropy(hidden, weight, labels, SCALE, options, bias)
    ours_grads = torch.autograd.grad(ours.scaled_sum, (hidden, weight, bias))
    logits = F.linear(hidden, weight, bias)
    expected, _ = seeds_loss(logits, labels, 0.1, pad)
    grads = torch.autograd.grad(SCALE.double() * expected, (hidden, weight, bias))
    torch.testing.assert_close(ours.train_loss_sum, expected.detach(), rtol=1e-13, atol=0)
    pure = F.cross_entropy(logits, labels, reduction="none", ignore_index=IGNORE)
    torch.testing.assert_close(ours.token_loss, pure.detach(), rtol=1e-12, atol=1e-14)
    for mine, theirs in zip(ours_grads, grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-14)


def test_the_entropy_of_a_smoothed_target_is_the_seeds():
    """It is what the cross-entropy with the smoothed target has more than their divergence."""
    assert LossOptions(TP, 0.1, pad_id=2).smoothed(6384)[2] == pytest.approx(1.201207, abs=5e-7)
    _, target = seeds_loss(torch.zeros(1, 6384, dtype=torch.float64), torch.tensor([7]), 0.1, 2)
    assert target.sum() == pytest.approx(1, rel=1e-12)
    assert -torch.xlogy(target, target).sum() == pytest.approx(1.201207, abs=5e-7)
    assert LossOptions(TP, 0.0, pad_id=2).smoothed(6384)[1:] == (0.0, 0.0)


def test_without_z_loss_no_bit_changes():
    assert LossConfig().z_loss == 0
    found = [fused(*inputs(), smoothing=0.1), linear_cross_entropy(*inputs(), SCALE, LossOptions(TP, 0.1, z_loss=0.1))]
    for name in ("train_loss_sum", "token_loss", "correct"):
        assert torch.equal(*(getattr(one, name) for one in found)), "the loss that is shown has no z-loss in it"
    assert torch.equal(found[0].scaled_sum, found[0].train_loss_sum * SCALE)
    assert found[1].scaled_sum > found[0].scaled_sum


def test_a_cap_bounds_large_logits_instead_of_leaving_them_as_they_are():
    hidden, weight, labels = inputs(size=1e4)
    found = linear_cross_entropy(hidden, weight, labels, SCALE, LossOptions(TP, logit_softcap=5.0))
    assert found.token_loss.max() <= 2 * 5.0 + math.log(len(weight))


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_gradients_equal_finite_differences(smoothing):
    hidden, weight, labels = inputs(n_tokens=6, vocab=7, width=3)
    fused(hidden, weight, labels, smoothing).scaled_sum.backward()
    step = 1e-6
    with torch.no_grad():
        for tensor in (hidden, weight):
            for index in range(tensor.numel()):
                moved = []
                for sign in (1, -1):
                    tensor.view(-1)[index] += sign * step
                    moved.append(fused(hidden, weight, labels, smoothing).scaled_sum)
                    tensor.view(-1)[index] -= sign * step
                slope = (moved[0] - moved[1]) / (2 * step)
                torch.testing.assert_close(tensor.grad.view(-1)[index], slope, rtol=1e-6, atol=1e-8)


def test_large_logits_stay_finite():
    hidden, weight, labels = inputs(size=1000, dtype=torch.float32)
    ours = fused(hidden, weight, labels)
    expected = reference(hidden, weight, labels)[1]
    torch.testing.assert_close(ours.token_loss, expected.detach(), rtol=1e-5, atol=1e-3)
    ours.scaled_sum.backward()
    assert hidden.grad.isfinite().all() and weight.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chunk", [10, 100])
def test_reduced_precision_is_close_to_double(dtype, chunk, monkeypatch):
    monkeypatch.setitem(loss_module._CHUNK_BYTES, "cpu", chunk * 51 * 4)
    hidden, weight, labels = inputs(dtype=dtype)
    ours = fused(hidden, weight, labels)
    ours.scaled_sum.backward()
    assert ours.token_loss.dtype == ours.scaled_sum.dtype == torch.float32
    exact_hidden, exact_weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
    exact = fused(exact_hidden, exact_weight, labels)
    exact.scaled_sum.backward()
    tolerance = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(ours.token_loss.double(), exact.token_loss, rtol=tolerance, atol=tolerance)
    for mine, theirs in ((hidden.grad, exact_hidden.grad), (weight.grad, exact_weight.grad)):
        assert mine.dtype == dtype
        assert (mine.double() - theirs).norm() < tolerance * theirs.norm()


def test_the_scale_saves_small_gradients_from_underflow():
    hidden, weight, labels = inputs(dtype=torch.float16)
    fused(hidden, weight, labels, scale=torch.tensor(1e-9)).scaled_sum.backward()
    assert hidden.grad.abs().max() == 0
    again = inputs(dtype=torch.float16)
    fused(*again, scale=torch.tensor(1e-9 * 2**20)).scaled_sum.backward()
    assert again[0].grad.abs().max() > 0


def test_a_row_without_labels_is_zero_everywhere():
    hidden, weight, _ = inputs()
    ours = fused(hidden, weight, torch.full((37,), IGNORE), smoothing=0.1)
    ours.scaled_sum.backward()
    assert ours.scaled_sum == 0 and not ours.correct.any() and not ours.token_loss.any()
    assert not hidden.grad.any() and not weight.grad.any()


def test_without_gradients_the_losses_are_the_same():
    hidden, weight, labels = inputs()
    with torch.no_grad():
        without = fused(hidden, weight, labels)
    assert torch.equal(without.token_loss, fused(hidden, weight, labels).token_loss)
    assert not without.scaled_sum.requires_grad


def test_taking_the_gradient_twice_is_refused():
    hidden, weight, labels = inputs()
    scaled_sum = fused(hidden, weight, labels).scaled_sum
    scaled_sum.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="taken already"):
        scaled_sum.backward()


def test_chunks_are_even_and_within_the_limit(monkeypatch):
    monkeypatch.setitem(loss_module._CHUNK_BYTES, "cpu", 100 * 51 * 8)
    _, weight, _ = inputs()
    assert loss_module.tokens_per_chunk(100, weight.shape[0], 8, "cpu") == 100
    assert loss_module.tokens_per_chunk(101, weight.shape[0], 8, "cpu") == 51
    assert loss_module.tokens_per_chunk(1, weight.shape[0], 8, "cpu") == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_weights_gradient_is_added_to_its_buffer_chunk_by_chunk(chunk_tokens, dtype):
    """Micro-batches add up, autograd sees no gradient, and the optimizer is told once a backward pass."""
    hidden, weight, labels = inputs(dtype=dtype)
    (expected,) = torch.autograd.grad(fused(hidden, weight, labels).scaled_sum, weight)
    told = []
    weight.main_grad = torch.zeros_like(weight, dtype=torch.promote_types(dtype, torch.float32))
    weight.on_grad = told.append
    for _ in range(2):
        fused(hidden, weight, labels).scaled_sum.backward()
    assert weight.grad is None and len(told) == 2
    tolerance = {"rtol": 1e-12, "atol": 1e-14} if dtype == torch.float64 else {"rtol": 2e-2, "atol": 2e-3}
    torch.testing.assert_close(weight.main_grad, 2 * expected.to(weight.main_grad.dtype), **tolerance)
    with pytest.raises(RuntimeError, match="multiply `scale`, not the loss"):
        (3 * fused(hidden, weight, labels).scaled_sum).backward()
