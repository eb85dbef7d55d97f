"""Generation with a cache against running the whole sequence again for every token."""

from typing import Any

import pytest
import torch

from internlm_lite.errors import DataError, MeshError
from internlm_lite.generate.cache import KVCache
from internlm_lite.generate.generate import generate
from internlm_lite.generate.sample import Sampling
from internlm_lite.mesh.mesh import Mesh, single_process_mesh
from internlm_lite.models.decoder import Transformer, build_model
from tests.models.small import VOCAB, documents, row_of, small_config, small_model
from tests.world import run_world

PROMPTS = [doc.tolist() for doc in documents([3, 7, 1], seed=5)]
GREEDY = Sampling(temperature=0)
DRAWN = Sampling(temperature=1.5, top_k=20, top_p=0.9, seed=11)


@torch.no_grad()
def all_logits(model: Transformer, sequence: list[int]) -> torch.Tensor:
    tokens, positions, _, attend = row_of([torch.tensor(sequence)])
    return model.logits(model.hidden(tokens, positions, attend))


def greedy_without_cache(model: Transformer, prompt: list[int], count: int) -> list[int]:
    sequence = list(prompt)
    for _ in range(count):
        sequence.append(int(all_logits(model, sequence)[-1].argmax()))
    return sequence[len(prompt) :]


@pytest.mark.parametrize("changes", [{}, {"num_kv_attention_heads": None}, {"apply_post_layer_norm": True}])
@torch.no_grad()
def test_cached_logits_equal_a_full_pass(changes):
    model = small_model(**changes)
    docs = documents([11, 15, 9])
    prompt_lengths = [3, 7, 1]
    cache = KVCache(3, 3, 20, model.config.kv_heads, 4, torch.float64, torch.device("cpu"))
    tokens, positions, _, attend = row_of([doc[:n] for doc, n in zip(docs, prompt_lengths, strict=True)])
    model.hidden(tokens, positions, cache.prefill(prompt_lengths, attend))
    full = [all_logits(model, doc.tolist()) for doc in docs]
    for step in range(8):
        at = [n + step for n in prompt_lengths]
        given = torch.stack([doc[i] for doc, i in zip(docs, at, strict=True)])
        logits = model.logits(model.hidden(given, cache.lengths, cache.decode()))
        cache.advance()
        expected = torch.stack([rows[i] for rows, i in zip(full, at, strict=True)])
        torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-10)


def test_greedy_of_a_batch_is_greedy_of_each_prompt():
    model = small_model(init_std=1.0)
    expected = [greedy_without_cache(model, prompt, 12) for prompt in PROMPTS]
    assert generate(model, PROMPTS, 12, GREEDY, eos=None) == expected
    assert len({tuple(tokens) for tokens in expected}) == 3


def test_a_sequence_ends_before_eos_and_the_others_go_on():
    model = small_model()
    free = generate(model, PROMPTS, 12, GREEDY, eos=None)
    eos = free[0][4]
    ended = [tokens[: tokens.index(eos)] if eos in tokens else tokens for tokens in free]
    assert generate(model, PROMPTS, 12, GREEDY, eos) == ended
    assert len(ended[0]) <= 4


def test_the_seed_decides_the_draw():
    model = small_model()
    drawn = generate(model, PROMPTS, 12, DRAWN, eos=None)
    assert drawn == generate(model, PROMPTS, 12, DRAWN, eos=None)
    assert drawn != generate(model, PROMPTS, 12, Sampling(temperature=1.5, seed=12), eos=None)


def test_nothing_to_do_gives_nothing():
    model = small_model()
    assert generate(model, [], 5, GREEDY, None) == []
    assert generate(model, PROMPTS, 0, GREEDY, None) == [[], [], []]


@pytest.mark.parametrize(("prompt", "found"), [([], "prompt 1 is empty"), ([3, VOCAB], f"token id {VOCAB}")])
def test_bad_prompts_are_named(prompt, found):
    with pytest.raises(DataError, match=found):
        generate(small_model(), [[1], prompt], 5, GREEDY, None)


def test_one_pipeline_stage_cannot_generate():
    model = small_model()
    stage = build_model(small_config(), 0.0, single_process_mesh(), model.backend, range(0, 1), True, False)
    with pytest.raises(MeshError, match="whole model"):
        generate(stage, PROMPTS, 5, GREEDY, None)


@pytest.mark.parametrize("dtype", ["torch.float32", "torch.bfloat16", "torch.float16"])
def test_every_dtype_generates(dtype):
    tokens = generate(small_model(dtype=dtype), PROMPTS, 4, DRAWN, eos=None)
    assert all(len(row) == 4 and all(0 <= token < VOCAB for token in row) for row in tokens)


def generate_on_rank(mesh: Mesh) -> Any:
    model = small_model(mesh)
    return [generate(model, PROMPTS, 8, sampling, None) for sampling in (GREEDY, DRAWN)]


def test_tensor_parallel_ranks_agree_with_one_process():
    alone = generate_on_rank(single_process_mesh())
    assert run_world(generate_on_rank, 2, tensor=2) == [alone, alone]
