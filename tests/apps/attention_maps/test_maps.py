"""Attention maps: the weights against those of the model's own kernel, and what the page and the picture hold."""

from __future__ import annotations

import base64
import importlib.util
import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

from internlm_lite.apps.attention_maps.weights import attention_weights, numbers_of
from internlm_lite.apps.attention_maps.write_maps import Maps, page, picture, write_maps
from internlm_lite.errors import ConfigError, DataError, MissingPackageError
from internlm_lite.generate.request import Request
from internlm_lite.layers.flash import packed_sdpa
from internlm_lite.mesh.mesh import single_process_mesh
from internlm_lite.models.stages import WholeModel
from tests.apps.report.browser import chromium
from tests.models.small import documents, small_model

HOSTILE = ["</script><img src=x onerror=alert(1)>", "<b>", "\x1b[2J\u202e", "$\\frac{", "你好", "&amp;", "▁def"]


def whole(**changes: object) -> WholeModel:
    return WholeModel({0: small_model(**changes)}, single_process_mesh())


def of_prompts(model: WholeModel, prompts: list[list[int]], *chosen: list[int]) -> list[torch.Tensor]:
    found = attention_weights(model, [Request(prompt, 0) for prompt in prompts], *chosen)
    assert all(list(sides) == ["decoder"] for sides in found)
    return [sides["decoder"] for sides in found]


WINDOWED = {"sliding_window": 3, "layer_types": ["sliding_attention", "full_attention"], "attention_softcap": 0.8}


@pytest.mark.parametrize(
    "changes",
    [{}, {"num_kv_attention_heads": None}, {"apply_post_layer_norm": True}, {**WINDOWED, "attention_scale": 1}],
)
@torch.no_grad()
def test_the_weights_are_those_of_the_kernel(changes, monkeypatch):
    """Unit vectors as values make attention return its own weights, head by head and document by document."""
    model, docs = whole(**changes), documents([5, 1, 9])
    prompts = [doc.tolist() for doc in docs]
    expected: dict[int, torch.Tensor] = {}

    def looked_at(rule, q, k, v):
        units = torch.eye(len(v), dtype=v.dtype)[:, None].expand(-1, k.shape[1], -1)
        # value vectors of another size than the keys': the reference kernel takes them
        expected[rule.layer] = packed_sdpa((0, 5, 6, 15))(rule, q, k, units).transpose(0, 1)  # [heads, query, key]
        return packed_sdpa((0, 5, 6, 15))(rule, q, k, v)

    positions = torch.cat([torch.arange(len(doc)) for doc in docs])
    model.logits(torch.cat(docs), positions, looked_at)
    layers, heads = [2, 0], [7, 0, 3]
    for weights, (start, stop) in zip(
        of_prompts(model, prompts, layers, heads), [(0, 5), (5, 6), (6, 15)], strict=True
    ):
        part = torch.stack([expected[layer][heads, start:stop, start:stop] for layer in layers])
        torch.testing.assert_close(weights, part, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights.sum(-1)), rtol=1e-12, atol=1e-12)
        assert not weights.triu(1).any() and (weights.diagonal(dim1=-2, dim2=-1) > 0).all()
        if changes.keys() >= WINDOWED.keys():  # of layers 2 and 0, both sliding
            assert not weights.tril(-3).any()


@torch.no_grad()
def test_an_encoder_decoders_weights_are_softmaxes_of_its_queries_and_keys():
    model, sizes = small_model(num_encoder_layers=2, init_std=0.6, attention_scale=0.7), ([5, 1, 9], [3, 4, 2])
    sources, targets = (documents(lengths) for lengths in sizes)
    kept: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {"encoder": [], "decoder": [], "cross": []}

    def keep(side, attention):
        project = attention.project

        def kept_project(*arguments):
            q, k, v = project(*arguments)
            kept[side].append((q, k))
            return q, k, v

        attention.project = kept_project

    for side, blocks in (("encoder", model.encoder_blocks()), ("decoder", model.decoder_blocks())):
        for block in blocks:
            keep(side, block.attention)
    for block in model.decoder_blocks():
        queries, keys = block.cross_attention.queries, block.cross_attention.keys_values
        block.cross_attention.queries = lambda *a, made=queries: (
            kept["cross"].append([made(*a)]) or kept["cross"][-1][0]
        )
        block.cross_attention.keys_values = lambda m, made=keys: kept["cross"][-1].append(made(m)[0]) or made(m)
    requests = [Request(t.tolist(), 0, source=s.tolist()) for t, s in zip(targets, sources, strict=True)]
    found = attention_weights(WholeModel({0: model}, single_process_mesh()), requests, [0, 2, 1], [7, 0, 3])
    for side, layers in kept.items():
        rows, columns = (sizes[0] if side == "encoder" else sizes[1], sizes[1] if side == "decoder" else sizes[0])
        for number, weights in enumerate(found):
            order = [layer for layer in (0, 2, 1) if layer < len(layers)]
            assert len(weights[side]) == len(order) == (2 if side == "encoder" else 3)
            for layer, of_layer in zip(order, weights[side], strict=True):
                q, k = (x.split(lengths)[number] for x, lengths in zip(layers[layer], (rows, columns), strict=True))
                scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(2, dim=1))[[7, 0, 3]] * 0.7
                if side == "decoder":
                    scores += torch.full(scores.shape[1:], -torch.inf).triu(1)
                torch.testing.assert_close(of_layer, scores.exp() / scores.exp().sum(-1, True), rtol=1e-12, atol=1e-12)


def test_a_document_is_the_same_alone():
    model, prompts = whole(), [doc.tolist() for doc in documents([4, 20])]
    together = of_prompts(model, prompts, [0, 2], [1])
    for prompt, weights in zip(prompts, together, strict=True):
        (alone,) = of_prompts(model, [prompt], [0, 2], [1])
        torch.testing.assert_close(weights, alone, rtol=1e-12, atol=1e-12)
    with pytest.raises(DataError, match="prompt 1 is empty"):
        of_prompts(model, [[1], []], [0], [0])


@pytest.mark.parametrize("dtype", ["torch.bfloat16", "torch.float16"])
def test_half_precision_weights_sum_to_one(dtype):
    (weights,) = of_prompts(whole(dtype=dtype), [list(range(30))], [1], list(range(8)))
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 8, 30), rtol=1e-6, atol=1e-6)


class Elements(HTMLParser):
    """The elements of a page, and the text of each script."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.scripts, self._inside = list[str](), list[str](), False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self._inside = tag == "script"

    def handle_endtag(self, tag):
        self._inside = False

    def handle_data(self, data):
        if self._inside:
            self.scripts.append(data)


def maps_of(labels: list[str], heads: int = 2) -> Maps:
    scores = torch.randn(1, heads, len(labels), len(labels), generator=torch.Generator().manual_seed(2)) * 3
    later = torch.ones(scores.shape[2:], dtype=torch.bool).triu(1)
    weights = scores.double().masked_fill(later, -torch.inf).softmax(-1)
    return Maps(labels, [3], list(range(heads)), weights)


@pytest.mark.parametrize("n_tokens", [1, 7, 20, 200])
def test_the_page_holds_the_weights_and_asks_no_network(n_tokens):
    labels = [HOSTILE[n % len(HOSTILE)] for n in range(n_tokens)]
    maps = maps_of(labels)
    text = page([maps])
    elements = Elements(text)
    assert elements.tags.count("script") == 2 and "img" not in elements.tags and "b" not in elements.tags
    (payload,) = json.loads(elements.scripts[0])
    assert payload["names"] == ["layer 3, head 0", "layer 3, head 1"] and len(payload["rows"]) == n_tokens
    assert payload["rows"] == payload["columns"] and payload["backward"]
    assert all(label.isprintable() for label in payload["rows"]) and "\x1b" not in text
    stored = np.frombuffer(base64.b64decode(payload["weights"]), dtype="<u2").reshape(2, -1) / 65535
    rows, columns = np.tril_indices(n_tokens)
    assert np.abs(stored - maps.weights[0].numpy()[:, rows, columns]).max() <= 0.5 / 65535 + 1e-12
    assert "default-src &#x27;none&#x27;" in text and not re.search(
        r"https?://|src=|href=|@import|url\(", re.sub(r'type="application/json">.*', "", text)
    )


def test_a_page_too_large_says_what_to_do():
    many = Maps(["a"] * 3000, [0], list(range(16)), torch.zeros(1).expand(1, 16, 3000, 3000))
    with pytest.raises(ConfigError, match=r"16 maps of 3000 tokens: .*; choose some with --layers and --heads"):
        page([many])
    with pytest.raises(ConfigError, match=r"16 maps of 3000 tokens: .* megapixels, more than 100; choose some"):
        picture([many])


def both_sides(source: list[str], target: list[str]) -> list[Maps]:
    generator = torch.Generator().manual_seed(4)
    shapes = {"encoder": (source, source), "cross": (target, source)}
    groups = {
        title: Maps(rows, [0, 1], [2], torch.rand(2, 1, len(rows), len(columns), generator=generator), columns, title)
        for title, (rows, columns) in shapes.items()
    }
    return [groups["encoder"], replace(maps_of(target, heads=1), title="decoder"), groups["cross"]]


def test_the_page_holds_maps_that_are_no_squares():
    groups = both_sides(["eins", "zwei", "drei", "."], ["one", HOSTILE[0]])
    payload = json.loads(Elements(page(groups)).scripts[0])
    names = ["encoder layer 0, head 2", "decoder layer 3, head 0", "cross layer 0, head 2"]
    assert [one["names"][0] for one in payload] == names
    assert [(len(one["rows"]), len(one["columns"]), one["backward"]) for one in payload] == [
        (4, 4, False),
        (2, 2, True),
        (2, 4, False),
    ]
    stored = np.frombuffer(base64.b64decode(payload[2]["weights"]), dtype="<u2").reshape(2, 1, 2, 4) / 65535
    assert np.abs(stored - groups[2].weights.numpy()).max() <= 0.5 / 65535 + 1e-6


@pytest.mark.parametrize("n_tokens", [7, 24])
def test_the_picture_is_a_png(tmp_path, n_tokens):
    write_maps([maps_of([HOSTILE[n % len(HOSTILE)] for n in range(n_tokens)], heads=3)], tmp_path / "maps.png")
    data = (tmp_path / "maps.png").read_bytes()
    assert data.startswith(b"\x89PNG\r\n") and [path.name for path in tmp_path.iterdir()] == ["maps.png"]
    width, height = int.from_bytes(data[16:20]), int.from_bytes(data[20:24])
    assert width == height and width >= 2 * max(250, 14 * n_tokens)
    assert picture(both_sides(HOSTILE, HOSTILE[:3])).startswith(b"\x89PNG\r\n")


def test_without_matplotlib_a_picture_names_the_command(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name))
    with pytest.raises(MissingPackageError, match=r"needs matplotlib: pip install internlm_lite\[report\]"):
        write_maps([maps_of(["a"])], tmp_path / "maps.png")
    write_maps([maps_of(["a"])], tmp_path / "maps.html")
    with pytest.raises(ConfigError, match=r"maps.jpg: expected a file that ends in .html or .png"):
        write_maps([maps_of(["a"])], tmp_path / "maps.jpg")
    assert [path.name for path in tmp_path.iterdir()] == ["maps.html"]


def test_lists_of_numbers():
    assert numbers_of("--layers", None, 3) == [0, 1, 2]
    assert numbers_of("--layers", "4, 0-2,1", 5) == [4, 0, 1, 2]
    for text in ("", "5", "2-1", "0-5", "-1", "a", "1,,2", "1-2-3", "²"):
        with pytest.raises(ConfigError, match=r"--layers .*expected numbers from 0 to 4, such as 0,2-4"):
            numbers_of("--layers", text, 5)


@pytest.fixture(scope="module")
def browser():
    with chromium() as found:
        yield found


def test_a_browser_draws_the_page(browser, tmp_path):
    """Clicks and arrow keys choose a map and a pair of tokens; hostile labels are text; nothing is fetched."""
    maps, faults = maps_of(HOSTILE * 4, heads=3), []
    write_maps([maps], tmp_path / "maps.html")
    tab = browser.new_page()
    tab.on("pageerror", lambda error: faults.append(str(error)))
    tab.on("console", lambda message: faults.append(message.text))
    tab.on("request", lambda request: request.url.startswith("file:") or faults.append(request.url))
    tab.goto((tmp_path / "maps.html").as_uri())
    assert tab.locator("#grid button").all_inner_texts() == [f"layer 3, head {head}" for head in range(3)]
    tab.locator("#grid button").nth(1).click()
    tab.locator("#large").focus()
    for key in ("ArrowUp", "ArrowRight", "ArrowRight"):
        tab.keyboard.press(key)
    weight = maps.weights[0, 1, 26, 2].item()
    told = f'layer 3, head 1: 26 "{HOSTILE[26 % 7]}" looks at 2 "\\x1b[2J\\u202e": {weight:.4f}'
    assert tab.locator("#readout").inner_text() == told
    side = tab.locator("#large").bounding_box()["width"]
    assert side > 28 * 11, "at least eleven pixels a token"
    assert faults == []


def test_a_browser_draws_maps_of_two_sides(browser, tmp_path):
    """Rows and columns have their own numbers and labels."""
    groups, faults = both_sides(["eins", "zwei", "drei", "."], ["one", "two"]), []
    write_maps(groups, tmp_path / "maps.html")
    tab = browser.new_page()
    tab.on("pageerror", lambda error: faults.append(str(error)))
    tab.goto((tmp_path / "maps.html").as_uri())
    names = [name for maps in groups for name in maps.names]
    assert tab.locator("#grid button").all_inner_texts() == names and names[-1] == "cross layer 1, head 2"
    tab.locator("#grid button").last.click()
    tab.locator("#large").focus()
    for key in ("ArrowUp", *["ArrowRight"] * 5):
        tab.keyboard.press(key)
    told = f'cross layer 1, head 2: 0 "one" looks at 3 ".": {groups[2].weights[1, 0, 0, 3].item():.4f}'
    assert tab.locator("#readout").inner_text() == told
    box = tab.locator("#large").bounding_box()
    assert box["width"] > box["height"] and faults == []
