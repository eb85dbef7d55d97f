"""Dropout by counters: the bits of a second implementation, independent of each other, and what they do to x."""

from __future__ import annotations

import hashlib
import shutil
from itertools import pairwise

import numpy as np
import pytest
import torch

from internlm_lite.layers import compiled
from internlm_lite.layers.dropout import Dropout, Site, dropped_weights, token_keys
from internlm_lite.layers.flash import packed_sdpa
from internlm_lite.layers.scores import AttentionRule
from internlm_lite.layers.tensor_parallel import TensorParallelContext
from internlm_lite.mesh.mesh import single_process_mesh
from internlm_lite.models.decoder import tensor_parallel_context
from tests.models.small import small_config

CPU = torch.device("cpu")


def u32(x: object) -> np.ndarray:
    return np.asarray(x).astype(np.uint32)


def mixed(x: object) -> np.ndarray:
    """lowbias32, in numbers that wrap."""
    y = u32(x)
    y = (y ^ (y >> 16)) * np.uint32(0x7FEB352D)
    y = (y ^ (y >> 15)) * np.uint32(0x846CA68B)
    return y ^ (y >> 16)


def hashed(start: int, *numbers: int) -> np.ndarray:
    found = u32(start)
    for number in numbers:
        for word in (number & 0xFFFFFFFF, number >> 32 & 0xFFFFFFFF):
            found = mixed(found ^ u32(word))
    return found


@np.errstate(over="ignore")
def reference(
    p: float, seed: int, step: int, layer: int, site: int, tokens: object, features: object, head: object = None
) -> np.ndarray:
    """Which numbers are dropped; tokens of the global batch and features broadcast."""
    of_step = [hashed(start, seed, step) for start in (0x243F6A88, 0x85A308D3)]
    of_site = [hashed(start, layer, site) for start in (0x243F6A88, 0x85A308D3)]
    if head is not None:
        of_site = [mixed(key ^ u32(head)) for key in of_site]
    first = mixed(u32(tokens) ^ of_step[0]) ^ of_site[0]
    second = mixed(u32(tokens) + of_step[1]) ^ of_site[1]
    x = (first ^ u32(features) * np.uint32(0x9E3779B1)) * np.uint32(0x7FEB352D) ^ second
    x = (x ^ (x >> 15)) * np.uint32(0x846CA68B)
    return x < round(p * 2**32)


def context(dtype: torch.dtype = torch.float64) -> TensorParallelContext:
    return tensor_parallel_context(
        small_config(dtype=str(dtype), compile=False), single_process_mesh(), by_sequence=False
    )


def mask(
    p: float = 0.5, seed: int = 1024, step: int = 7, layer: int = 3, site: Site = Site.FEED_FORWARD, row: int = 0
) -> torch.Tensor:
    """bool [1024, 1024] of a row of 1024 tokens: what is dropped."""
    keys = token_keys(seed, step, torch.tensor([row]), 1024)[0]
    ones = torch.ones(1024, 1024)
    return Dropout(p, layer, site, 1024, context(torch.float32))(ones, keys) == 0


@pytest.mark.parametrize(("seed", "step"), [(0, 0), (1024, 7), (2**70 + 5, 2**40 + 3)])
def test_the_bits_are_those_of_a_second_implementation(seed: int, step: int) -> None:
    rows, tokens, p = torch.tensor([2, 70_000, 2**22]), 48, 0.3  # the last: number 201,326,592 of a global batch
    for keys, row in zip(token_keys(seed, step, rows, tokens), rows.tolist(), strict=True):
        for layer, site in ((0, Site.EMBEDDING), (63, Site.ATTENTION_OUTPUT), (2047, Site.FEED_FORWARD)):
            y = Dropout(p, layer, site, 80, context())(torch.ones(tokens, 80, dtype=torch.float64), keys)
            numbers = row * tokens + np.arange(tokens)[:, None]
            expected = reference(p, seed, step, layer, site, numbers, np.arange(80))
            assert np.array_equal((y == 0).numpy(), expected)


@pytest.mark.parametrize("first_head", [0, 4])
def test_the_bits_of_attention_weights(first_head: int) -> None:
    keys = token_keys(5, 9, torch.tensor([3]), 32)[0]
    heads, queries, seen = torch.arange(4)[:, None, None], torch.arange(8, 24)[:, None], torch.arange(8, 24)
    found = dropped_weights(0.4, keys, first_head)(11, torch.ones(4, 16, 16), heads, queries, seen) == 0
    tokens, distances = 3 * 32 + queries.numpy(), (queries - seen).numpy()
    expected = reference(0.4, 5, 9, 11, Site.ATTENTION_WEIGHTS, tokens, distances, heads.numpy() + first_head)
    assert np.array_equal(found.numpy(), expected)


def test_the_bits_stay_for_ever() -> None:
    """A run that goes on with a later release must go on with the same masks."""
    packed = np.packbits(mask(p=0.1).numpy())
    assert packed[:8].tobytes().hex() == "2180100220020800"
    assert hashlib.sha256(packed.tobytes()).hexdigest()[:16] == "5705fbdedbd7e7e4"


def z_of_product(a: torch.Tensor, b: torch.Tensor, p: float) -> float:
    """Correlation of two masks in standard deviations of independent ones."""
    a, b = a.double() - p, b.double() - p
    return ((a * b).mean() / (p * (1 - p)) * a.numel() ** 0.5).item()


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_masks_are_independent(p: float) -> None:
    """Of a million numbers each: shares, and neighbours along tokens, features, rows, layers, sites, steps and seeds.
    Fixed seeds: none of 30 is beyond 4 standard deviations."""
    found = mask(p)
    z = {"share": (found.double().mean().item() - p) / (p * (1 - p) / found.numel()) ** 0.5}
    for lag in (1, 2, 3, 4, 7, 8, 12, 16, 64, 256):
        z[f"features {lag}"] = z_of_product(found[:, lag:], found[:, :-lag], p)
    for lag in (1, 2, 3, 16, 512):
        z[f"tokens {lag}"] = z_of_product(found[lag:], found[:-lag], p)
    z["diagonal"] = z_of_product(found[1:, 1:], found[:-1, :-1], p)
    others = {
        "row": mask(p, row=1),
        "layer": mask(p, layer=4),
        "site": mask(p, site=Site.ATTENTION_OUTPUT),
        "step": mask(p, step=8),
        "seed": mask(p, seed=1025),
        "layer and step": mask(p, layer=4, step=6),
    }
    z |= {name: z_of_product(found, other, p) for name, other in others.items()}
    spread = p * (1 - p) * 1024
    for name, counts in (("per token", found.sum(1)), ("per feature", found.sum(0))):
        chi2 = ((counts - 1024 * p) ** 2 / spread).sum().item()
        z[name] = (chi2 - 1024) / (2 * 1024) ** 0.5
    pair = found.double() - p
    square = pair[1:, 1:] * pair[:-1, 1:] * pair[1:, :-1] * pair[:-1, :-1]
    z["square"] = (square.mean() / (p * (1 - p)) ** 2 * square.numel() ** 0.5).item()
    assert len(z) == 26 and max(map(abs, z.values())) < 4, z
    assert np.sqrt(np.mean(np.square(list(z.values())))) < 1.4, z


def test_words_of_eight_are_uniform() -> None:
    """Each of the 256 patterns of eight neighbouring features is as frequent as the others."""
    words = np.packbits(mask(0.5).numpy(), axis=1).ravel()
    expected = len(words) / 256
    chi2 = ((np.bincount(words, minlength=256) - expected) ** 2 / expected).sum()
    assert abs(chi2 - 255) < 4 * (2 * 255) ** 0.5


@pytest.mark.parametrize("p", [2**-32, 1e-3, 0.25, 0.999])
def test_probabilities_are_compared_in_integers(p: float) -> None:
    keys = token_keys(0, 0, torch.tensor([0]), 1024)[0]
    y = Dropout(p, 0, Site.EMBEDDING, 256, context())(torch.ones(1024, 256, dtype=torch.float64), keys)
    share = (y == 0).double().mean().item()
    assert abs(share - p) < 5 * (p / y.numel()) ** 0.5
    assert set(y.unique().tolist()) <= {0.0, 1 / (1 - p)}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_gradient_has_the_mask_of_the_forward_pass(dtype: torch.dtype) -> None:
    layer, keys = Dropout(0.3, 1, Site.FEED_FORWARD, 32, context(dtype)), token_keys(3, 4, torch.tensor([5]), 40)[0]
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(40, 32, generator=generator).to(dtype) for _ in range(2))
    x[0, 0] = torch.inf  # dropped: no NaN
    y = layer(x.requires_grad_(), keys)
    y.backward(dy)
    dropped = torch.from_numpy(reference(0.3, 3, 4, 1, Site.FEED_FORWARD, 200 + np.arange(40)[:, None], np.arange(32)))
    assert dropped[0, 0] and 0.2 < dropped.double().mean() < 0.4
    assert x.grad is not None and y.dtype == x.grad.dtype == dtype
    assert torch.equal(y, (x.detach() * (1 / 0.7)).masked_fill(dropped, 0))
    assert torch.equal(x.grad, (dy * (1 / 0.7)).masked_fill(dropped, 0))


def test_without_keys_or_share_nothing_happens() -> None:
    x, keys = torch.randn(4, 8), token_keys(0, 0, torch.tensor([0]), 4)[0]
    for layer, given in (
        (Dropout(0.5, 0, Site.EMBEDDING, 8, context()), None),
        (Dropout(0, 0, Site.EMBEDDING, 8, context()), keys),
    ):
        assert layer(x, given) is x


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_bits_are_the_same_for_all_layers_by_one_graph(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if backend == "inductor" and shutil.which("g++") is None:
        pytest.skip("needs g++: on Debian and Ubuntu: apt-get install g++")
    monkeypatch.setattr(compiled, "COMPILER", backend)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    fast = tensor_parallel_context(small_config(compile=True), single_process_mesh(), by_sequence=False)
    for layer, step in ((0, 0), (1, 0), (5, 2)):
        keys = token_keys(1, step, torch.tensor([step]), 64)[0]
        sides = []
        for ctx in (fast, context()):
            x = torch.ones(64, 48, dtype=torch.float64, requires_grad=True)
            y = Dropout(0.2, layer, Site.FEED_FORWARD, 48, ctx)(x, keys)
            y.sum().backward()
            sides.append((y == 0, x.grad == 0))
        assert all(map(torch.equal, *sides)) and torch.equal(*sides[0])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_attention_with_dropped_weights(kv_heads: int, window: int | None) -> None:
    """Against plain operations over whole matrices, forward and backward; documents alone equal documents in a row."""
    boundaries, p, rule = (0, 5, 10, 31), 0.3, AttentionRule(layer=2, window=window)
    generator = torch.Generator().manual_seed(0)
    q, k, v, weight = (
        torch.randn(31, n, 8, generator=generator, dtype=torch.float64).requires_grad_()
        for n in (4, kv_heads, kv_heads, 4)
    )
    keys = token_keys(1, 2, torch.tensor([6]), 31)[0]
    ours = packed_sdpa(boundaries, dropped_weights(p, keys, 4))(rule, q, k, v)
    parts = []
    for start, stop in pairwise(boundaries):
        queries, keys_, values = (x[start:stop].movedim(1, 0) for x in (q, k, v))
        keys_, values = (x.repeat_interleave(4 // kv_heads, 0) for x in (keys_, values))
        n = stop - start
        apart = torch.arange(n)[:, None] - torch.arange(n)
        seen = (apart >= 0) & (apart < (window or n))
        scores = (queries @ keys_.mT / 8**0.5).masked_fill(~seen, -torch.inf).softmax(-1)
        tokens = 6 * 31 + np.arange(start, stop)[:, None]
        dropped = reference(p, 1, 2, 2, Site.ATTENTION_WEIGHTS, tokens, apart.numpy(), 4 + np.arange(4)[:, None, None])
        parts.append(((scores / (1 - p)).masked_fill(torch.from_numpy(dropped), 0) @ values).movedim(0, 1))
        drop = dropped_weights(p, keys[:, start:stop], 4)
        alone = packed_sdpa((0, n), drop)(rule, q[start:stop], k[start:stop], v[start:stop])
        torch.testing.assert_close(alone, ours[start:stop], rtol=1e-13, atol=1e-14)
    expected = torch.cat(parts)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-13)
    grads = torch.autograd.grad((ours * weight).sum(), (q, k, v))
    for mine, theirs in zip(grads, torch.autograd.grad((expected * weight).sum(), (q, k, v)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-12)
