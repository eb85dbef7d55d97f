"""Generation with a cache against running the whole sequence again for every token."""

from typing import Any

import pytest
import torch
from torch import nn

from internlm_lite.config.schema import Config, ParallelConfig
from internlm_lite.errors import DataError
from internlm_lite.generate.cache import KVCache
from internlm_lite.generate.decode import generate
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
DRAWN = Sampling(temperature=1.5, top_k=20, top_p=0.9, seed=11)


@torch.no_grad()
def all_logits(model: Transformer, sequence: list[int]) -> torch.Tensor:
    tokens, positions, _, attend = row_of([torch.tensor(sequence)])
    return model.logits(model.hidden(tokens, positions, attend))


def whole(model: Transformer) -> WholeModel:
    return WholeModel({0: model}, single_process_mesh())


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
    cache = KVCache(3, 20, torch.device("cpu"))
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
    assert generate(whole(model), PROMPTS, 12, GREEDY, eos=None) == expected
    assert len({tuple(tokens) for tokens in expected}) == 3


def test_a_sequence_ends_before_eos_and_the_others_go_on():
    model = small_model()
    free = generate(whole(model), PROMPTS, 12, GREEDY, eos=None)
    eos = free[0][4]
    ended = [tokens[: tokens.index(eos)] if eos in tokens else tokens for tokens in free]
    assert generate(whole(model), PROMPTS, 12, GREEDY, eos) == ended
    assert len(ended[0]) <= 4


def test_the_seed_decides_the_draw():
    model = small_model()
    drawn = generate(whole(model), PROMPTS, 12, DRAWN, eos=None)
    assert drawn == generate(whole(model), PROMPTS, 12, DRAWN, eos=None)
    assert drawn != generate(whole(model), PROMPTS, 12, Sampling(temperature=1.5, seed=12), eos=None)


def test_nothing_to_do_gives_nothing():
    model = small_model()
    assert generate(whole(model), [], 5, GREEDY, None) == []
    assert generate(whole(model), PROMPTS, 0, GREEDY, None) == [[], [], []]


@pytest.mark.parametrize(("prompt", "found"), [([], "prompt 1 is empty"), ([3, VOCAB], f"token id {VOCAB}")])
def test_bad_prompts_are_named(prompt, found):
    with pytest.raises(DataError, match=found):
        generate(whole(small_model()), [[1], prompt], 5, GREEDY, None)


@pytest.mark.parametrize("dtype", ["torch.float32", "torch.bfloat16", "torch.float16"])
def test_every_dtype_generates(dtype):
    tokens = generate(whole(small_model(dtype=dtype)), PROMPTS, 4, DRAWN, eos=None)
    assert all(len(row) == 4 and all(0 <= token < VOCAB for token in row) for row in tokens)


SEQUENCE = Config.model_validate(
    {
        "data": {"seq_len": 32, "total_steps": 1},
        "lr_scheduler": {"total_steps": 1},
        "model": small_config(num_layers=4).model_dump(),
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
    return [generate(model, PROMPTS, 8, sampling, None) for sampling in (GREEDY, DRAWN)]


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
