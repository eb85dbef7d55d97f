"""Text from an encoder-decoder: cached sources against full passes over both sides, and against transformers."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, cast

import pytest
import torch
import transformers
from torch import nn

from internlm_lite.config.schema import Config, ParallelConfig
from internlm_lite.errors import DataError
from internlm_lite.generate.beams import Beams
from internlm_lite.generate.cache import KVCache
from internlm_lite.generate.decode import generate, prefill
from internlm_lite.generate.request import Request
from internlm_lite.generate.sample import Sampling
from internlm_lite.generate.source_cache import SourceCache, source_row
from internlm_lite.layers.flash import AttentionBackend
from internlm_lite.mesh.layout import Parameter
from internlm_lite.mesh.mesh import Mesh, single_process_mesh
from internlm_lite.models.decoder import Transformer
from internlm_lite.models.initialise import initialise
from internlm_lite.models.stages import build_stages, whole_model
from tests.generate.test_beams import ENDS, LogProbabilities, search_without_bound
from tests.generate.test_generate import BEAMS, DRAWN, GREEDY, whole
from tests.models.small import documents, row_of, small_config, small_model
from tests.world import run_world

TWO_SIDES: dict[str, Any] = {"num_encoder_layers": 2, "source_vocab_size": 70, "num_layers": 3, "init_std": 0.5}
SOURCES = [doc.tolist() for doc in documents([5, 1, 9, 5, 3], seed=3)]
PREFIXES = [[1], [1], [1, 8, 9], [1], [1, 7]]
STOPS = frozenset({5, 6, 7, 54})


def requests(count: int = 12, stops: frozenset[int] = STOPS, **more: Any) -> list[Request]:
    return [Request(p, count, stops, source=s, **more) for p, s in zip(PREFIXES, SOURCES, strict=True)]


@torch.no_grad()
def full_logits(model: Transformer, source: list[int], target: list[int]) -> torch.Tensor:
    """[T, vocab] of one pass over both sides, without a cache."""
    tokens, positions, _, attend = row_of([torch.tensor(target)])
    row = source_row(AttentionBackend.SDPA, [source], [len(target)], torch.device("cpu"))
    return model.logits(model.hidden(tokens, positions, attend, source=row))


class OfTarget(LogProbabilities):
    """Of every next token after a part of the target of one source."""

    def __init__(self, model: Transformer, source: list[int]) -> None:
        super().__init__(model)
        self.source = source

    def __call__(self, prefix: tuple[int, ...]) -> list[float]:
        if prefix not in self.known:
            self.known[prefix] = full_logits(self.model, self.source, list(prefix))[-1].log_softmax(-1).tolist()
        return self.known[prefix]


def greedy_by_full_passes(model: Transformer, request: Request) -> list[int]:
    target = list(request.prompt)
    while len(target) < len(request.prompt) + request.max_new_tokens:
        token = int(full_logits(model, list(request.source), target)[-1].argmax())
        if token in request.stop_ids:
            break
        target.append(token)
    return target[len(request.prompt) :]


SHAPES: dict[str, dict[str, Any]] = {
    "grouped heads": {},
    "norms of heads, caps, windows": {
        "qk_norm": "head",
        "attention_softcap": 0.8,
        "sliding_window": 3,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "the seed's": {
        "num_kv_attention_heads": None,
        "norm_type": "sample_layernorm",
        "position": "sinusoidal",
        "head_bias": True,
        "mlp_type": "relu",
    },
    "post-norm, one vocabulary": {
        "apply_post_layer_norm": True,
        "source_vocab_size": None,
        "tie_word_embeddings": True,
        "tie_source_embeddings": True,
    },
}


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_cached_logits_equal_a_full_pass(shape):
    """Sequences in any order, several of one source, sources that go; prompts whole or in chunks."""
    model = small_model(**{**TWO_SIDES, **SHAPES[shape]})
    targets = [doc.tolist() for doc in documents([11, 15, 9], seed=4)]
    starts = [3, 7, 1]
    full = [full_logits(model, source, target) for source, target in zip(SOURCES, targets, strict=False)]
    for chunk in (None, 2):
        cache, sources = KVCache(3, 20, torch.device("cpu")), SourceCache(whole(model), SOURCES[:3])
        prompts = [target[:n] for target, n in zip(targets, starts, strict=True)]
        at, order = [n - 1 for n in starts], [0, 1, 2]
        logits = prefill(whole(model), prompts, cache, chunk, sources)
        for step in range(8):
            expected = torch.stack([full[doc][i] for doc, i in zip(order, at, strict=True)])
            torch.testing.assert_close(logits, expected, rtol=1e-12, atol=1e-12)
            parents = {2: [2, 0, 0, 1], 4: [1, 3, 2], 6: [0, 2, 2]}.get(step, list(range(len(order))))
            cache.select(parents)
            sources.select(parents)
            order, at = [order[parent] for parent in parents], [at[parent] + 1 for parent in parents]
            given = torch.tensor([targets[doc][i] for doc, i in zip(order, at, strict=True)])
            side = sources.side([1] * len(order))
            logits = whole(model).logits(given, cache.lengths, cache.decode(), source=side)
            cache.advance()
    assert order == [0, 0, 0] and [store[0].shape[0] for store in sources._stores.values()] == [1, 1, 1]


def test_greedy_is_that_of_full_passes_and_of_one_beam():
    model = small_model(**TWO_SIDES)
    expected = [greedy_by_full_passes(model, request) for request in requests()]
    for chunk in (None, 1, 2):
        assert [found.tokens for found in generate(whole(model), requests(), GREEDY, chunk=chunk)] == expected
    assert [found.tokens for found in generate(whole(model), requests(), Beams(1, length_penalty=0.0))] == expected
    assert len({len(tokens) for tokens in expected}) > 2


@pytest.mark.parametrize("penalty", [-0.3, 0.0, 1.0])
def test_beams_are_those_of_a_search_over_full_passes(penalty):
    model = small_model(**{**TWO_SIDES, "vocab_size": 5, "num_layers": 1})
    prompts = [(2, 0, 3), (0,), (3, 3), (0,), (0,)]
    log_p = [OfTarget(model, source) for source in SOURCES]
    for beams in (1, 3):
        how = Beams(beams, penalty)
        asked = [Request(p, 8, ENDS, source=source) for p, source in zip(prompts, SOURCES, strict=True)]
        found = generate(whole(model), asked, how)
        expected = [search_without_bound(of, p, 8, how) for of, p in zip(log_p, prompts, strict=True)]
        assert [row.score for row in found] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("how", [DRAWN, BEAMS], ids=lambda how: type(how).__name__)
def test_what_is_beside_a_source_changes_nothing(how):
    model, heard = whole(small_model(**TWO_SIDES)), dict[int, str]()
    asked = requests(seed=4, stop_strings=("q9",))
    decode = lambda ids: "".join(f"q{token}" for token in ids)  # noqa: E731
    together = generate(model, asked, how, decode, lambda n, piece: heard.update({n: heard.get(n, "") + piece}))
    for request, found in zip(asked, together, strict=True):
        (lone,) = generate(model, [request], how, decode)
        assert (lone.tokens, lone.text, lone.ended_by) == (found.tokens, found.text, found.ended_by)
    assert how is BEAMS or [heard.get(n, "") for n in range(5)] == [found.text for found in together]


def on_rank(mesh: Mesh, parallel: dict[str, Any], chunks: int) -> Any:
    shape = {**TWO_SIDES, "num_encoder_layers": 3, "qk_norm": "full", "num_chunks": chunks}
    model = small_config(**shape).model_dump()
    data = {"data": {"seq_len": 32, "total_steps": 1}, "lr_scheduler": {"total_steps": 1}}
    config = Config.model_validate({**data, "model": model, "parallel": ParallelConfig.model_validate(parallel)})
    stages = build_stages(config, mesh, AttentionBackend.SDPA)
    initialise(nn.ModuleList(stages.values()), 7)
    model = whole_model(config, mesh, stages)
    return [[row.tokens for row in generate(model, requests(8), how, chunk=2)] for how in (GREEDY, DRAWN, BEAMS)]


@lru_cache(1)
def alone() -> Any:
    return on_rank(single_process_mesh(), {}, 1)


@pytest.mark.parametrize(
    ("axis", "parallel", "chunks"),
    [
        ("tensor", {"tensor": 2, "sequence_parallel": True}, 1),
        ("pipeline", {"pipeline": {"size": 2, "schedule": "interleaved"}}, 2),
    ],
)
def test_ranks_agree_with_one_process(axis, parallel, chunks):
    assert run_world(on_rank, 2, (parallel, chunks), **{axis: 2}) == [alone(), alone()]


def test_sides_that_a_model_does_not_have_are_refused():
    model, both = whole(small_model(num_layers=1)), whole(small_model(**TWO_SIDES))
    refused = {
        "prompt 0 has a source, and the model is a decoder alone": (model, [3]),
        "source 0 is empty": (both, []),
        "source 0 holds token id 70: expected 0..69": (both, [3, 70]),
    }
    for message, (of, source) in refused.items():
        with pytest.raises(DataError, match=message):
            generate(of, [Request([1], 4, source=source)], GREEDY)
    learned = whole(small_model(**TWO_SIDES, position="learned", max_position_embeddings=8))
    with pytest.raises(DataError, match=r"source 0 has 9 tokens: the model has 8 positions .*; shorten the source$"):
        generate(learned, [Request([1], 4, source=[3] * 9)], GREEDY)


THEIRS: dict[str, dict[str, Any]] = {"Pegasus": {}, "Marian": {"apply_post_layer_norm": True}}
"""Encoder-decoders of transformers without a norm of embeddings, one pre-norm and one post-norm."""


@lru_cache(2)
def transformers_twin(kind: str) -> tuple[Transformer, Any]:
    """(ours, theirs) with the same weights; one table for source, target and head."""
    shape = {**TWO_SIDES, **SHAPES["the seed's"], "norm_type": "layernorm", "embed_scale": 32**0.5, "mlp_bias": True}
    shape |= {"source_vocab_size": None, "tie_word_embeddings": True, "tie_source_embeddings": True, "init_std": 0.3}
    ours = small_model(**{**shape, **THEIRS[kind]})
    sizes = {"ffn_dim": 64, "attention_heads": 8}
    sides = {f"{side}_{key}": size for side in ("encoder", "decoder") for key, size in sizes.items()}
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=64,
        d_model=32,
        encoder_layers=2,
        decoder_layers=3,
        max_position_embeddings=40,
        activation_function="relu",
        scale_embedding=True,
        pad_token_id=0,
        decoder_start_token_id=0,
        eos_token_id=6,
        forced_eos_token_id=None,
        **sides,
    )
    theirs = getattr(transformers, f"{kind}MTModel" if kind == "Marian" else f"{kind}ForConditionalGeneration")(config)
    weights = {cast(Parameter, param).shard_spec.name: param.data for param in ours.parameters()}
    weights["output.bias"][0] = -1e4  # Marian never gives padding
    theirs = theirs.double().eval()
    renamed = {"self_attn_layer_norm": "attention_norm", "encoder_attn_layer_norm": "cross_attention_norm"}
    renamed |= {"final_layer_norm": "ffn_norm", "fc1": "feed_forward.w1", "fc2": "feed_forward.w2"}
    fused = {"self_attn": ("attention.wqkv", "qkv"), "encoder_attn": ("cross_attention.wkv", "kv")}
    for name, param in theirs.named_parameters():
        *path, leaf = name.removeprefix("model.").split(".")
        side = "encoder." if path[0] == "encoder" else ""
        if path[-1] == "shared":
            found = weights["tok_embeddings.weight"]
        elif path[-1] == "embed_positions":
            assert ours.tok_embeddings is not None
            at = torch.arange(len(param))
            found = ours.tok_embeddings(0 * at, at) - 32**0.5 * weights["tok_embeddings.weight"][0]
        elif path[-1] == "layer_norm":
            found = weights[f"{side}norm.{leaf}"]
        else:
            before, part = f"{side}layers.{path[2]}.", path[3]
            own = {"out_proj": "wo", "q_proj": "wq"}.get(path[-1])
            if part in renamed:
                found = weights[f"{before}{renamed[part]}.{leaf}"]
            elif own == "wo" or (own == "wq" and part == "encoder_attn"):
                found = weights[f"{before}{fused[part][0].split('.')[0]}.{own}.{leaf}"]
            else:
                whole_name, letters = fused[part]
                rows = weights[f"{before}{whole_name}.{leaf}"].unflatten(0, (8, len(letters), 4))
                found = rows[:, letters.index(path[-1][0])].flatten(0, 1)
        param.data.copy_(found)
    theirs.final_logits_bias.copy_(weights["output.bias"])
    return ours, theirs


@pytest.mark.parametrize("kind", THEIRS)
@pytest.mark.parametrize("options", [{}, {"num_beams": 3, "length_penalty": 0.7}], ids=str)
def test_text_is_that_of_transformers(kind, options):
    ours, theirs = transformers_twin(kind)
    ends = [5, 6, 7, 54]
    how = Beams(3, 0.7) if options else Sampling(temperature=0)
    asked = [Request([0], 12, frozenset(ends), source=source) for source in SOURCES]
    for source, found in zip(SOURCES, generate(whole(ours), asked, how), strict=True):
        given = torch.tensor([source])
        more = {"early_stopping": "never", **options} if options else {}
        expected = theirs.generate(
            given,
            attention_mask=torch.ones_like(given),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=ends,
            return_dict_in_generate=True,
            output_scores=True,
            **more,
        )
        tokens = expected.sequences[0, 1:].tolist()
        assert found.tokens == tokens[: next((at for at, token in enumerate(tokens) if token in ends), len(tokens))]
        assert not options or found.score == pytest.approx(expected.sequences_scores[0].item(), rel=2e-6)
