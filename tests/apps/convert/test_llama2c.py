"""The files of llama2.c, run by a reader written after its run.c: the same logits as ours."""

from __future__ import annotations

import struct
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from internlm_lite.apps.convert.llama2c import write_llama2c
from internlm_lite.apps.convert.to_hf import open_checkpoint
from internlm_lite.cli import convert
from internlm_lite.config.load import load_config
from internlm_lite.data.tokenizer import Tokenizer
from internlm_lite.errors import CheckpointError
from internlm_lite.generate.load_model import load_model
from internlm_lite.mesh.mesh import single_process_mesh
from tests.apps.convert.made import TOKENS, our_logits, save_ours, small_tokenizer
from tests.cli import ROOT

ENGINE = {"no_bias": True, "rope_base": 10000, "layer_norm_epsilon": 1e-5}
SHAPES: dict[str, dict[str, Any]] = {
    "grouped, tied": {**ENGINE, "tie_word_embeddings": True},
    "grouped": ENGINE,
    "the shipped config": load_config(str(ROOT / "configs" / "llama_8m_tiny.py")).config.model.model_dump(),
    "every head": {**ENGINE, "num_kv_attention_heads": None, "num_layers": 3},
}


class Engine:
    """run.c's memory_map_weights and forward, in float64."""

    def __init__(self, path: Path) -> None:
        data = path.read_bytes()
        *sizes, vocabulary, self.n_positions = struct.unpack_from("<7i", data)
        self.dim, self.hidden, self.n_layers, self.n_heads, self.n_kv_heads = sizes
        self.n_vocabulary, shared = abs(vocabulary), vocabulary > 0
        self.floats, self.at = np.frombuffer(data, "<f4", offset=28).astype(np.float64), 0
        self.head = self.dim // self.n_heads
        narrow = self.n_kv_heads * self.head
        self.embedding = self.take(self.n_vocabulary, self.dim)
        shapes = {"norm": (self.dim,), "q": (self.dim, self.dim), "k": (narrow, self.dim), "v": (narrow, self.dim)}
        shapes |= {"o": (self.dim, self.dim), "ffn_norm": (self.dim,), "w1": (self.hidden, self.dim)}
        shapes |= {"w2": (self.dim, self.hidden), "w3": (self.hidden, self.dim)}
        self.layers = {name: self.take(self.n_layers, *shape) for name, shape in shapes.items()}
        self.final = self.take(self.dim)
        self.tables = self.take(2, self.n_positions, self.head // 2)
        self.classifier = self.embedding if shared else self.take(self.n_vocabulary, self.dim)
        assert self.at == len(self.floats), "nothing is left over"

    def take(self, *shape: int) -> np.ndarray:
        count = int(np.prod(shape))
        found = self.floats[self.at : self.at + count].reshape(shape)
        self.at += count
        return found

    def normed(self, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        return weight * x / np.sqrt((x * x).mean() + 1e-5)

    def turned(self, x: np.ndarray, position: int) -> np.ndarray:
        turns = x.reshape(-1, self.head // 2, 2)
        angle = position * 10000.0 ** (-np.arange(0, self.head, 2) / self.head)
        real, imaginary = turns[..., 0], turns[..., 1]
        cos, sin = np.cos(angle), np.sin(angle)
        turned = np.stack((real * cos - imaginary * sin, real * sin + imaginary * cos), -1)
        return turned.reshape(-1, self.head)

    def logits(self, tokens: list[int]) -> np.ndarray:
        cache: list[list[tuple[np.ndarray, np.ndarray]]] = [[] for _ in range(self.n_layers)]
        found = []
        for position, token in enumerate(tokens):
            x = self.embedding[token]
            for layer in range(self.n_layers):
                w = {name: weights[layer] for name, weights in self.layers.items()}
                normed = self.normed(x, w["norm"])
                q = self.turned(w["q"] @ normed, position)
                cache[layer].append((self.turned(w["k"] @ normed, position), (w["v"] @ normed).reshape(-1, self.head)))
                mixed = []
                for head in range(self.n_heads):
                    group = head // (self.n_heads // self.n_kv_heads)
                    scores = np.array([q[head] @ k[group] for k, _ in cache[layer]]) / np.sqrt(self.head)
                    weights = np.exp(scores - scores.max())
                    values = np.stack([v[group] for _, v in cache[layer]])
                    mixed.append(weights / weights.sum() @ values)
                x = x + w["o"] @ np.concatenate(mixed)
                normed = self.normed(x, w["ffn_norm"])
                gate = w["w1"] @ normed
                x = x + w["w2"] @ (gate / (1 + np.exp(-gate)) * (w["w3"] @ normed))
            found.append(self.classifier @ self.normed(x, self.final))
        return np.stack(found)


@pytest.mark.parametrize("shape", SHAPES)
def test_its_engine_gives_our_logits(tmp_path: Path, shape: str) -> None:
    save_ours(tmp_path / "ours", **{**SHAPES[shape], "dtype": "torch.float32"})
    found, config, _ = open_checkpoint(str(tmp_path / "ours"))
    written, _ = write_llama2c(found, config, tmp_path / "out", None)
    engine = Engine(tmp_path / "out" / "model.bin")
    assert written.n_bytes == (tmp_path / "out" / "model.bin").stat().st_size and engine.n_positions == 64
    expected = our_logits(load_model(str(tmp_path / "ours"), single_process_mesh(), "torch.float64")[0]).numpy()
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(engine.logits(TOKENS.tolist()), expected, rtol=0, atol=1e-10)
    # Its older engines read the angles from the file.
    angle = np.outer(np.arange(64), 10000.0 ** (-np.arange(0, engine.head, 2) / engine.head))
    np.testing.assert_allclose(engine.tables, [np.cos(angle), np.sin(angle)], rtol=0, atol=1e-7)


def test_the_tool_and_the_vocabulary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = small_tokenizer(tmp_path)
    save_ours(tmp_path / "ours", tokenizer=str(tokenizer.path), vocab_size=310, **ENGINE)
    assert convert.main(["to-llama2c", str(tmp_path / "ours"), str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "model.bin, tokenizer.bin" in printed and "puts a space before a prompt" in printed
    data = (tmp_path / "out" / "tokenizer.bin").read_bytes()
    (longest,), at, pieces = struct.unpack_from("<I", data), 4, []
    while at < len(data):
        score, length = struct.unpack_from("<fI", data, at)
        pieces.append((data[at + 8 : at + 8 + length].decode(), score))
        at += 8 + length
    assert len(pieces) == 310 and longest == max(len(text.encode()) for text, _ in pieces)
    assert pieces[1][0] == "\n<s>\n" and pieces[2][0] == "\n</s>\n" and all(text for text, _ in pieces)
    ids = Tokenizer(tmp_path / "small.model").encode("def f7(x):")
    assert "".join(pieces[token][0] for token in ids) == "def f7(x):"
    assert merged("def f7(x):", pieces) == ids, "by its rule: the pair with the highest score first"


def merged(text: str, pieces: list[tuple[str, float]]) -> list[int]:
    """run.c's encode, without the space before."""
    by_text = {piece: token for token, (piece, _) in reversed(list(enumerate(pieces)))}
    ids = [by_text[character] for character in text]
    while True:
        pairs = [(by_text.get(pieces[a][0] + pieces[b][0]), at) for at, (a, b) in enumerate(pairwise(ids))]
        known = [(pieces[token][1], -at, token) for token, at in pairs if token is not None]
        if not known:
            return ids
        _, at, token = max(known)
        ids[-at : -at + 2] = [token]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rope_base": 500000}, "model.rope_base=500000"),
        ({"no_bias": False}, "model.qkv_bias=True: it has False"),
        ({"layer_norm_epsilon": 1e-6}, "model.layer_norm_epsilon=1e-06: it has 1e-05"),
        ({"head_dim": 16}, "model.head_dim=16: it has 8"),
        ({"qk_norm": "head"}, "model.qk_norm='head'"),
        ({"sliding_window": 4}, "model.sliding_window=4"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "model.rope_scaling="),
    ],
)
def test_what_its_engine_lacks_is_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    save_ours(tmp_path / "ours", **{**ENGINE, **changes})
    found, config, _ = open_checkpoint(str(tmp_path / "ours"))
    with pytest.raises(CheckpointError, match=r"llama2\.c cannot run this model") as caught:
        write_llama2c(found, config, tmp_path / "out", None)
    assert words in str(caught.value) and not (tmp_path / "out").exists()
