"""Writes a checkpoint for llama2.c: model.bin, version 0 of its export, which its run.c reads; and tokenizer.bin.

    model.bin      7 int32: width, feed-forward width, layers, heads, key/value heads, vocabulary, positions; the
                   vocabulary is negative where the head has weights of its own
                   float32: embedding; of all layers, one kind after the other: attention norm, q, k, v, o, feed-forward
                   norm, w1, w2, w3; final norm; cosines and sines [positions, head / 2]; head, unless tied
    tokenizer.bin  uint32: bytes of the longest token; for each token float32 score, uint32 bytes, its text

The engine turns features 2i and 2i + 1 of a head together, we i and i + head / 2: so rows of q and k change places.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch

from internlm_lite.apps.convert.hf_config import features
from internlm_lite.apps.convert.recipes import Rows, TensorRecipe, hf_recipes
from internlm_lite.apps.convert.stream import ConvertedFile
from internlm_lite.apps.convert.to_hf import MasterRows, WriteResult, compare_names, new_folder
from internlm_lite.checkpoint.format.catalog import Found
from internlm_lite.config.schema import Config, ModelConfig
from internlm_lite.data.sentencepiece_model import SPACE_MARK, SentencePieceModel
from internlm_lite.data.tokenizer import Tokenizer
from internlm_lite.errors import CheckpointError
from internlm_lite.layers.rope import plain_frequencies

MODEL_FILE, TOKENIZER_FILE = "model.bin", "tokenizer.bin"
_OF_LAYERS = (
    "input_layernorm",
    *(f"self_attn.{letter}_proj" for letter in "qkvo"),
    "post_attention_layernorm",
    *(f"mlp.{name}_proj" for name in ("gate", "down", "up")),
)
_SIZES = ("vocab_size", "hidden_size", "num_layers", "num_attention_heads", "num_kv_attention_heads")
_ENGINE = {"no_bias": True, "layer_norm_epsilon": 1e-5, "rope_base": 10000}
"""Values of the model section that are part of its code."""
_FIRST_BYTE = 3
"""The token that the engine takes for byte 0."""


def write_llama2c(
    found: Found,
    config: Config,
    out: Path,
    tokenizer: Tokenizer | None,
    *,
    done: Callable[[str], object] = lambda name: None,
) -> tuple[WriteResult, tuple[str, ...]]:
    """Write the folder `out`, which must be missing or empty; (what was written, lines for the user).

    Raises CheckpointError when the engine cannot run the model, or the checkpoint is damaged; StorageError.
    """
    model, n_positions = config.model, config.data.seq_len
    if problems := list(_not_run(model)):
        raise CheckpointError("llama2.c cannot run this model:\n  " + "\n  ".join(problems))
    recipes = {recipe.name: _for_the_engine(recipe, model) for recipe in hf_recipes(model, "llama")}
    source = MasterRows(found)
    compare_names(found.manifest_path, source.shapes, {rows.name for one in recipes.values() for rows in one.rows})
    stream = ConvertedFile(recipes, torch.float32, source, done)
    with new_folder(out) as storage:
        files = [MODEL_FILE]
        n_bytes = storage.put(MODEL_FILE, _model_bytes(stream, model, n_positions))
        notes: list[str] = []
        if tokenizer is not None and isinstance(tokenizer.model, SentencePieceModel):
            files.append(TOKENIZER_FILE)
            storage.put(TOKENIZER_FILE, [_tokenizer_bytes(tokenizer.model, model.vocab_size)])
            notes += _tokenizer_notes(tokenizer.model)
        elif tokenizer is not None:
            notes.append(f"no {TOKENIZER_FILE}: its engine reads vocabularies of sentencepiece, not {tokenizer.path}")
    return WriteResult(tuple(files), len(recipes), n_bytes), tuple(notes)


def _not_run(model: ModelConfig) -> Iterator[str]:
    """What of the model is not in the engine's code."""
    like = {**{name: getattr(model, name) for name in (*_SIZES, "mlp_ratio", "multiple_of", "tie_word_embeddings")}}
    theirs = features(ModelConfig.model_validate(like | _ENGINE))
    for name, value in features(model).items():
        if value != theirs[name]:
            yield f"model.{name}={value!r}: it has {theirs[name]!r}"


def _for_the_engine(recipe: TensorRecipe, model: ModelConfig) -> TensorRecipe:
    """With the rows of each head in its order."""
    if not recipe.name.endswith(("q_proj.weight", "k_proj.weight")):
        return recipe
    half = model.head_size // 2
    rows = [
        Rows(part.name, row, row + 1)
        for part in recipe.rows
        for head in range(part.start, part.stop, 2 * half)
        for pair in range(head, head + half)
        for row in (pair, pair + half)
    ]
    return replace(recipe, rows=tuple(rows))


def _model_bytes(stream: ConvertedFile, model: ModelConfig, n_positions: int) -> Iterator[bytes]:
    vocabulary = model.vocab_size if model.tie_word_embeddings else -model.vocab_size
    heads = (model.num_layers, model.num_attention_heads, model.kv_heads)
    yield struct.pack("<7i", model.hidden_size, model.mlp_hidden_size, *heads, vocabulary, n_positions)
    yield from stream.converted("model.embed_tokens.weight")
    for kind in _OF_LAYERS:
        for layer in range(model.num_layers):
            yield from stream.converted(f"model.layers.{layer}.{kind}.weight")
    yield from stream.converted("model.norm.weight")
    angles = torch.outer(torch.arange(n_positions, dtype=torch.float64), plain_frequencies(model.head_size, 10000.0))
    for table in (angles.cos(), angles.sin()):
        yield table.float().numpy().tobytes()
    if not model.tie_word_embeddings:
        yield from stream.converted("lm_head.weight")


def _tokenizer_bytes(model: SentencePieceModel, vocab_size: int) -> bytes:
    """Rows of the vocabulary without a token get one that no text gives."""
    marked = {model.bos: "\n<s>\n", model.eos: "\n</s>\n"}
    pieces = [(marked.get(token, model.piece(token)), model.score(token)) for token in range(model.vocab_size)]
    pieces += [(f"<unused_{token}>", -1e9) for token in range(model.vocab_size, vocab_size)]
    texts = [(piece.replace(SPACE_MARK, " ").encode(), score) for piece, score in pieces]
    longest = max(len(text) for text, _ in texts)
    return struct.pack("<I", longest) + b"".join(struct.pack("<fI", score, len(text)) + text for text, score in texts)


def _tokenizer_notes(model: SentencePieceModel) -> Iterator[str]:
    if model.bos != 1:
        yield f"its engine begins and ends texts with token 1; this tokenizer's begin is {model.bos}"
    if model.piece(_FIRST_BYTE) != "<0x00>":
        yield "its engine takes tokens 3 to 258 for bytes: it reads characters outside the vocabulary wrong"
    if not model.adds_space:
        yield "its engine puts a space before a prompt, which this tokenizer does not"
