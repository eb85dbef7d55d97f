"""Generation with a cache against running the whole sequence again for every token."""

from typing import Any

import pytest
import torch
import transformers
from torch import nn

from internlm_lite.config.schema import Config, ParallelConfig
from internlm_lite.errors import ConfigError, DataError
from internlm_lite.generate.beams import Beams
from internlm_lite.generate.cache import KVCache
from internlm_lite.generate.decode import check, generate, prefill
from internlm_lite.generate.request import Request
from internlm_lite.generate.sample import Sampling
from internlm_lite.layers.flash import AttentionBackend
from internlm_lite.mesh.mesh import Mesh, single_process_mesh
from internlm_lite.models.decoder import Transformer
from internlm_lite.models.initialise import initialise
from internlm_lite.models.stages import WholeModel, build_stages, whole_model
from tests.models.small import VOCAB, documents, row_of, small_config, small_model
from tests.world import run_world

PROMPTS = [doc.tolist() for doc in documents([3, 7, 1], seed=5)]
GREEDY = Sampling(temperature=0)
DRAWN = Sampling(temperature=1.5, top_k=20, top_p=0.9, min_p=0.01, repetition_penalty=1.2)
BEAMS = Beams(3, length_penalty=0.7)
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 12}


@torch.no_grad()
def all_logits(model: Transformer, sequence: list[int]) -> torch.Tensor:
    tokens, positions, _, attend = row_of([torch.tensor(sequence)])
    return model.logits(model.hidden(tokens, positions, attend))


def whole(model: Transformer) -> WholeModel:
    return WholeModel({0: model}, single_process_mesh())


def tokens_of(model: WholeModel, prompts: list[list[int]], count: int, how: Any, **more: Any) -> list[list[int]]:
    requests = [Request(prompt, count, **{"seed": 11, **more}) for prompt in prompts]
    return [continuation.tokens for continuation in generate(model, requests, how)]


def greedy_without_cache(model: Transformer, prompt: list[int], count: int) -> list[int]:
    sequence = list(prompt)
    for _ in range(count):
        sequence.append(int(all_logits(model, sequence)[-1].argmax()))
    return sequence[len(prompt) :]


WINDOWS = [
    {"sliding_window": 5},
    {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"], "attention_softcap": 0.7},
    {"sliding_window": 1, "attention_scale": 0.6, "num_kv_attention_heads": None},
    {"attention_softcap": 1.5, "attention_scale": 0.6},
]


HEADS = [
    {"head_bias": True, "logit_scale": 0.6, "logit_softcap": 1.5, "embed_scale": 3.0, "mlp_type": "geglu_tanh"},
    {"head_bias": True, "tie_word_embeddings": True, "mlp_type": "gelu_tanh", "mlp_bias": True},
]


@pytest.mark.parametrize(
    "changes", [{}, {"num_kv_attention_heads": None}, {"apply_post_layer_norm": True}, *WINDOWS, *HEADS], ids=str
)
@torch.no_grad()
def test_cached_logits_equal_a_full_pass(changes):
    model = small_model(**changes)
    docs = documents([11, 15, 9])
    prompt_lengths = [3, 7, 1]
    full = [all_logits(model, doc.tolist()) for doc in docs]
    prompts = [doc[:n].tolist() for doc, n in zip(docs, prompt_lengths, strict=True)]
    for chunk in (None, 1, 2, 3, 7):
        cache = KVCache(3, 20, torch.device("cpu"))
        at, order = [n - 1 for n in prompt_lengths], [0, 1, 2]
        logits = prefill(whole(model), prompts, cache, chunk)
        for step in range(8):
            expected = torch.stack([full[doc][i] for doc, i in zip(order, at, strict=True)])
            torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-10)
            parents = {3: [2, 0, 0, 1], 5: [1, 3]}.get(step, list(range(len(order))))
            cache.select(parents)
            order, at = [order[parent] for parent in parents], [at[parent] + 1 for parent in parents]
            given = torch.stack([docs[doc][i] for doc, i in zip(order, at, strict=True)])
            logits = whole(model).logits(given, cache.lengths, cache.decode())
            cache.advance()


@pytest.mark.parametrize("changes", [{"sliding_window": 8}, {"attention_softcap": 1.5}, WINDOWS[1]], ids=str)
@torch.no_grad()
def test_windows_see_the_same_with_and_without_a_cache(changes, monkeypatch):
    """By absolute position, in chunks and one by one, also when what is behind the window is dropped."""
    monkeypatch.setattr("internlm_lite.generate.cache._GROWTH", 2)
    model, window = small_model(**changes), changes.get("sliding_window", 8)
    docs = documents([3 * window + 9, 3 * window + 4])
    full = [all_logits(model, doc.tolist()) for doc in docs]
    for length in (window - 1, window, window + 1, 3 * window):
        for chunk in (None, 1, 3, 7):
            cache = KVCache(2, 4 * window + 9, torch.device("cpu"))
            lengths = [length, length - 2]  # of two texts at different places
            prompts = [doc[:n].tolist() for doc, n in zip(docs, lengths, strict=True)]
            logits = prefill(whole(model), prompts, cache, chunk)
            for step in range(6):
                expected = torch.stack([rows[n - 1 + step] for rows, n in zip(full, lengths, strict=True)])
                torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-10)
                given = torch.stack([doc[n + step] for doc, n in zip(docs, lengths, strict=True)])
                logits = whole(model).logits(given, cache.lengths, cache.decode())
                cache.advance()


@torch.no_grad()
def test_a_sliding_layer_keeps_its_window_alone(monkeypatch):
    monkeypatch.setattr("internlm_lite.generate.cache._GROWTH", 4)
    model = whole(small_model(sliding_window=6, layer_types=["sliding_attention", "full_attention"]))
    cache = KVCache(1, 10**6, torch.device("cpu"))
    prefill(model, [documents([90])[0].tolist()], cache, chunk=8)
    for _ in range(60):
        model.logits(torch.tensor([1]), cache.lengths, cache.decode())
        cache.advance()
    kept = [cache._stores[layer].keys.shape[1] for layer in range(3)]
    assert kept[1] >= 150 and kept[0] == kept[2] < 40


def test_a_long_prompt_in_chunks_has_the_logits_of_one_pass():
    model = small_model(num_layers=1)
    prompts = [doc.tolist() for doc in documents([70, 33])]
    expected = torch.stack([all_logits(model, prompt)[-1] for prompt in prompts])
    for chunk in (1, 16, 33, 34, 69, 70, 100):
        logits = prefill(whole(model), prompts, KVCache(2, 70, torch.device("cpu")), chunk)
        torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-10)


def test_greedy_of_a_batch_is_greedy_of_each_prompt():
    model = small_model(init_std=1.0)
    expected = [greedy_without_cache(model, prompt, 12) for prompt in PROMPTS]
    assert tokens_of(whole(model), PROMPTS, 12, GREEDY) == expected
    assert len({tuple(tokens) for tokens in expected}) == 3


def test_rows_end_at_their_own_stop_tokens_and_lengths():
    model = small_model(init_std=1.0)
    free = tokens_of(whole(model), PROMPTS, 12, GREEDY)
    stops = [frozenset({free[0][4], free[0][2]}), frozenset({free[1][6]}), frozenset[int]()]
    requests = [Request(prompt, length, ids) for prompt, length, ids in zip(PROMPTS, (12, 12, 5), stops, strict=True)]
    ended = [next((i for i, token in enumerate(row) if token in ids), 99) for row, ids in zip(free, stops, strict=True)]
    found = generate(whole(model), requests, GREEDY)
    assert [row.tokens for row in found] == [free[0][: ended[0]], free[1][: ended[1]], free[2][:5]]
    assert [row.ended_by for row in found] == ["stop", "stop", "length"] and ended[0] <= 2 and ended[1] <= 6


@pytest.mark.parametrize("how", [DRAWN, Sampling(), GREEDY, BEAMS], ids=lambda how: type(how).__name__)
def test_what_is_generated_does_not_depend_on_what_is_beside_it(how):
    model = whole(small_model())
    prompts = [*PROMPTS, *(doc.tolist() for doc in documents([19, 2, 7, 3], seed=8))]
    requests = [Request(prompt, 4 + 3 * row, frozenset({row, 40}), seed=row % 3) for row, prompt in enumerate(prompts)]
    alone = [generate(model, [request], how)[0] for request in requests]
    order = [4, 2, 6, 0, 1, 5, 3]
    for batch in (range(7), order, [5, 1], [3, 3]):
        for row, found in zip(batch, generate(model, [requests[row] for row in batch], how), strict=True):
            assert (found.tokens, found.ended_by) == (alone[row].tokens, alone[row].ended_by)
    assert generate(model, requests, how, chunk=4)[5].tokens == alone[5].tokens


def test_the_seed_decides_the_draw_and_the_length_does_not():
    model = whole(small_model())
    drawn = tokens_of(model, PROMPTS, 20, DRAWN)
    assert drawn == tokens_of(model, PROMPTS, 20, DRAWN)
    assert drawn != tokens_of(model, PROMPTS, 20, DRAWN, seed=12)
    assert [row[:7] for row in drawn] == tokens_of(model, PROMPTS, 7, DRAWN)


def test_a_cache_grows_with_the_text_and_not_with_what_is_allowed(monkeypatch):
    """A length of 10**12 takes no memory before it is reached; growing changes nothing."""
    model, row = whole(small_model()), PROMPTS[0]
    stop = frozenset({tokens_of(model, [row], 40, DRAWN)[0][30]})
    (expected,) = tokens_of(model, [row], 40, DRAWN, stop_ids=stop)
    monkeypatch.setattr("internlm_lite.generate.cache._GROWTH", 2)
    assert tokens_of(model, [row], 10**12, DRAWN, stop_ids=stop) == [expected]
    assert tokens_of(model, [*PROMPTS, row], 40, DRAWN, stop_ids=stop)[3] == expected


def test_a_short_prompt_has_the_same_answer_before_and_after_a_long_one():
    """Nothing of a prompt stays: neither a rotary table that was made longer, nor keys."""
    model, long = small_model(), documents([500])[0].tolist()
    before, logits = tokens_of(whole(model), PROMPTS, 8, DRAWN), all_logits(model, PROMPTS[1])
    tokens_of(whole(model), [long], 8, DRAWN)
    assert tokens_of(whole(model), PROMPTS, 8, DRAWN) == before
    assert torch.equal(all_logits(model, PROMPTS[1]), logits)


def test_a_repetition_penalty_is_that_of_the_whole_sequence():
    model, penalty = small_model(init_std=1.0), 1.8
    expected = []
    for prompt in PROMPTS:
        sequence = list(prompt)
        for _ in range(10):
            logits = all_logits(model, sequence)[-1]
            for token in set(sequence):
                logits[token] = logits[token] / penalty if logits[token] > 0 else logits[token] * penalty
            sequence.append(int(logits.argmax()))
        expected.append(sequence[len(prompt) :])
    penalised = Sampling(temperature=0, repetition_penalty=penalty)
    assert tokens_of(whole(model), PROMPTS, 10, penalised) == expected
    assert expected != tokens_of(whole(model), PROMPTS, 10, GREEDY)


def test_nothing_to_do_gives_nothing():
    model = whole(small_model())
    assert generate(model, [], GREEDY) == []
    requests = [Request(prompt, count) for prompt, count in zip(PROMPTS, (0, 2, 0), strict=True)]
    heard = []
    found = generate(model, requests, GREEDY, lambda ids: "." * len(ids), lambda number, piece: heard.append(number))
    assert [len(row.tokens) for row in found] == [0, 2, 0] and set(heard) == {1}


BAD = {
    "an empty prompt": (lambda: [Request([1], 5), Request([], 5)], {}, DataError, "prompt 1 is empty"),
    "an id too large": (lambda: [Request([3, VOCAB], 5)], {}, DataError, f"token id {VOCAB}: expected 0..63"),
    "a negative length": (lambda: [Request([1], -1)], {}, ConfigError, "max_new_tokens -1: expected 0 or more"),
    "a number as stop string": (lambda: [Request([1], 5, stop_strings=(5,))], {}, ConfigError, r"stop_strings \(5,\)"),
    "one text as stop strings": (lambda: [Request([1], 5, stop_strings="ab")], {}, ConfigError, "stop_strings 'ab'"),
    "an empty stop string": (lambda: [Request([1], 5, stop_strings=("",))], {}, ConfigError, "none of them empty"),
    "a text as stop id": (lambda: [Request([1], 5, frozenset({"a"}))], {}, ConfigError, r"stop_ids \['a'\]"),
    "a seed of 70 bits": (lambda: [Request([1], 5, seed=2**70)], {}, ConfigError, "expected a whole number of 64 bits"),
    "no tokenizer": (lambda: [Request([1], 5, stop_strings=("a",))], {}, ConfigError, "expected also `decode`"),
    "chunks of nothing": (lambda: [Request([1], 5)], {"chunk": 0}, ConfigError, "chunk 0: expected at least 1"),
    "no beams": (lambda: [], {"how": lambda: Beams(0)}, ConfigError, "beams 0: expected at least 1"),
    "too much penalty": (
        lambda: [],
        {"how": lambda: Beams(1, 99)},
        ConfigError,
        "length_penalty 99: expected a number",
    ),
    "no number": (lambda: [], {"how": lambda: Beams(1, float("nan"))}, ConfigError, "length_penalty nan: expected"),
    "beams, penalty 0": (lambda: [], {"how": lambda: Beams(1, 1, 0)}, ConfigError, "repetition_penalty 0: expected"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_error(case):
    requests, more, error, found = BAD[case]
    how = more.pop("how", lambda: GREEDY) if "how" in more else (lambda: GREEDY)
    with pytest.raises(error, match=found):
        generate(whole(small_model(num_layers=1)), requests(), how(), **more)


@pytest.mark.parametrize("dtype", ["torch.float32", "torch.bfloat16", "torch.float16"])
@pytest.mark.parametrize("how", [DRAWN, BEAMS])
def test_every_dtype_generates(dtype, how):
    tokens = tokens_of(whole(small_model(dtype=dtype)), PROMPTS, 4, how)
    assert all(len(row) == 4 and all(0 <= token < VOCAB for token in row) for row in tokens)


SEQUENCE = Config.model_validate(
    {
        "data": {"seq_len": 32, "total_steps": 1},
        "lr_scheduler": {"total_steps": 1},
        "model": small_config(
            num_layers=4, sliding_window=5, layer_types=["sliding_attention"] * 2 + ["full_attention"], **HEADS[0]
        ).model_dump(),
    }
)


def generate_on_rank(mesh: Mesh, parallel: dict[str, Any], chunks: int) -> Any:
    """Prompts of odd lengths, so that sequence parallelism has nothing it could split evenly."""
    config = SEQUENCE.model_copy(
        update={
            "parallel": ParallelConfig.model_validate(parallel),
            "model": SEQUENCE.model.model_copy(update={"num_chunks": chunks}),
        }
    )
    stages = build_stages(config, mesh, AttentionBackend.SDPA)
    initialise(nn.ModuleList(stages.values()), 7)
    model = whole_model(config, mesh, stages)
    long = generate(model, [Request(prompt, 8) for prompt in PROMPTS], GREEDY, chunk=2)
    return [tokens_of(model, PROMPTS, 8, how) for how in (GREEDY, DRAWN, BEAMS)] + [[row.tokens for row in long]]


@pytest.fixture(scope="module")
def alone() -> Any:
    return generate_on_rank(single_process_mesh(), {}, 1)


@pytest.mark.parametrize("by_sequence", [False, True])
def test_tensor_parallel_ranks_agree_with_one_process(alone, by_sequence):
    args = ({"tensor": 2, "sequence_parallel": by_sequence}, 1)
    assert run_world(generate_on_rank, 2, args, tensor=2) == [alone, alone]


@pytest.mark.parametrize(("schedule", "chunks"), [("1f1b", 1), ("interleaved", 2), ("zbv", 2)])
def test_pipeline_ranks_agree_with_one_process(alone, schedule, chunks):
    args = ({"pipeline": {"size": 2, "schedule": schedule}}, chunks)
    assert run_world(generate_on_rank, 2, args, pipeline=2) == [alone, alone]


KINDS: dict[str, dict[str, Any]] = {
    "learned": {"position": "learned", "max_position_embeddings": 20, "embed_split_hidden": False},
    "sinusoidal": {"position": "sinusoidal"},
    "none": {"position": "none"},
    "some layers without": {"no_rope_every": 2, "partial_rotary_factor": 0.5},
    "two bases": {"sliding_window": 5, "layer_types": ["full_attention", "sliding_attention"], "rope_local_base": 50.0},
    "dynamic, within its length": {"rope_scaling": {**DYNAMIC, "original_max_position_embeddings": 20}},
}


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_cached_tokens_have_the_positions_of_a_full_pass(kind):
    model = small_model(**KINDS[kind])
    docs = [doc.tolist() for doc in documents([20, 13])]
    full = [all_logits(model, doc) for doc in docs]
    for chunk in (None, 1, 3):
        cache = KVCache(2, 20, torch.device("cpu"))
        logits = prefill(whole(model), [docs[0][:9], docs[1][:2]], cache, chunk)
        for step in range(11):
            torch.testing.assert_close(
                logits, torch.stack([full[0][8 + step], full[1][1 + step]]), rtol=1e-10, atol=1e-10
            )
            given = torch.tensor([docs[0][9 + step], docs[1][2 + step]])
            logits = whole(model).logits(given, cache.lengths, cache.decode(), lengths=cache.lengths + 1)
            cache.advance()


def keys_as_they_came(model: Transformer, prompt: list[int], count: int) -> list[int]:
    """Greedy tokens with dynamic frequencies, without a cache: a token of the prompt has the prompt's length, each
    further one that of the text which ends with it."""
    sequence, lengths = list(prompt), [len(prompt)] * len(prompt)
    for _ in range(count):
        tokens, positions, _, attend = row_of([torch.tensor(sequence)])
        logits = model.logits(model.hidden(tokens, positions, attend, torch.tensor(lengths)))
        sequence.append(int(logits[-1].argmax()))
        lengths.append(len(sequence))
    return sequence[len(prompt) :]


@torch.no_grad()
def test_dynamic_frequencies_follow_the_text():
    """Whatever may still come, what is beside it, in which chunks its prompt came, and what came before it."""
    model = small_model(init_std=1.0, rope_scaling=DYNAMIC)
    prompts = [doc.tolist() for doc in documents([9, 3, 30])]
    expected = [keys_as_they_came(model, prompt, 20) for prompt in prompts]
    assert tokens_of(whole(model), prompts, 20, GREEDY) == expected
    assert [tokens_of(whole(model), [prompt], 20, GREEDY)[0] for prompt in prompts] == expected
    requests = [Request(prompt, 20) for prompt in prompts]
    assert [found.tokens for found in generate(whole(model), requests, GREEDY, chunk=4)] == expected
    assert [row[:20] for row in tokens_of(whole(model), prompts, 26, GREEDY)] == expected
    before = all_logits(model, prompts[0])
    tokens_of(whole(model), [documents([500])[0].tolist()], 3, GREEDY)
    assert torch.equal(all_logits(model, prompts[0]), before)
    assert tokens_of(whole(model), prompts, 20, GREEDY) == expected


@torch.no_grad()
def test_dynamic_frequencies_are_those_of_transformers_while_it_generates():
    ours = small_model(rope_scaling=DYNAMIC, no_bias=True, init_std=0.5, num_layers=2)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=12,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
        eos_token_id=None,
        pad_token_id=0,
        bos_token_id=None,
    )
    theirs = transformers.LlamaForCausalLM(config).double().eval()
    weights = dict(ours.named_parameters())
    names = {"embed_tokens": "tok_embeddings", "lm_head": "output", "input_layernorm": "attention_norm"}
    names |= {"post_attention_layernorm": "ffn_norm", "o_proj": "attention.wo", "gate_proj": "feed_forward.w1"}
    names |= {"up_proj": "feed_forward.w3", "down_proj": "feed_forward.w2"}
    for name, param in theirs.named_parameters():
        *_, leaf = (parts := name.removeprefix("model.").removesuffix(".weight").split("."))
        prefix = f"layers.{parts[1]}." if parts[0] == "layers" else ""
        if leaf in ("q_proj", "k_proj", "v_proj"):
            rows = weights[f"{prefix}attention.wqkv.weight"].view(4, 4, 4, 32)
            param.copy_(
                rows[:, {"q_proj": slice(0, 2), "k_proj": slice(2, 3), "v_proj": slice(3, 4)}[leaf]].reshape_as(param)
            )
        else:
            param.copy_(weights[f"{prefix}{names.get(leaf, leaf)}.weight"])
    for length in (3, 12, 25):
        prompt = documents([length], seed=length)[0]
        expected = theirs.generate(prompt[None], max_new_tokens=30, do_sample=False)[0, length:].tolist()
        assert tokens_of(whole(ours), [prompt.tolist()], 30, GREEDY) == [expected]
        theirs.model.rotary_emb.__init__(config)  # its table stays grown


def test_texts_longer_than_the_learned_positions_are_refused():
    model = whole(small_model(position="learned", max_position_embeddings=12))
    prompt = documents([9])[0].tolist()
    for how in (GREEDY, BEAMS):
        assert len(generate(model, [Request(prompt, 3)], how)[0].tokens) == 3
        with pytest.raises(DataError, match=r"prompt 1 has 9 tokens, and 4 more .* has 12 positions .*ask for fewer"):
            generate(model, [Request(prompt, 3), Request(prompt, 4)], how)
    with pytest.raises(DataError, match=r"prompt 0 has 13 tokens: the model has 12 positions .*; shorten the prompt$"):
        check(model, [Request(documents([13])[0].tolist(), 0)])
