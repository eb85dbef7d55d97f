"""Generation against transformers' on the same converted weights, in fp64 and fp32."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from internlm_lite.apps.convert.from_hf import read_hf
from internlm_lite.generate.beams import Beams
from internlm_lite.generate.decode import generate
from internlm_lite.generate.load_model import load_model
from internlm_lite.generate.request import Request
from internlm_lite.generate.sample import Sampling
from internlm_lite.mesh.mesh import single_process_mesh
from internlm_lite.models.stages import WholeModel
from tests.apps.convert.made import save_llama

PROMPTS = [[5, 17, 42, 8, 8, 61], [90], [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]]
ENDS = [7, 30, 88]


@pytest.fixture(scope="module")
def both(tmp_path_factory) -> tuple[Any, WholeModel]:
    """(theirs, ours): larger weights than at a start, so that the next token is far from every token's average."""
    folder = tmp_path_factory.mktemp("hf")
    theirs = save_llama(folder / "hf", kv_heads=2, initializer_range=0.15)
    read_hf(folder / "hf", str(folder / "ours"))
    return theirs.double(), load_model(str(folder / "ours"), single_process_mesh(), "torch.float64")[0]


def their_tokens(model: Any, prompt: list[int], count: int, **options: Any) -> Any:
    given = torch.tensor([prompt])
    return model.generate(
        given,
        attention_mask=torch.ones_like(given),
        max_new_tokens=count,
        do_sample=False,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_scores=True,
        **{"eos_token_id": None, **options},
    )


def without_prompt(found: Any, prompt: list[int], ends: list[int]) -> list[int]:
    """Up to the first end token, as ours are."""
    tokens = found.sequences[0, len(prompt) :].tolist()
    return tokens[: next((at for at, token in enumerate(tokens) if token in ends), len(tokens))]


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_fifty_greedy_tokens_are_transformers(both, penalty):
    theirs, ours = both
    how = Sampling(temperature=0, repetition_penalty=penalty)
    free = generate(ours, [Request(prompt, 50) for prompt in PROMPTS], how, chunk=4)
    ends = sorted({row.tokens[at] for row, at in zip(free, (49, 12, 30), strict=True)})
    ended = generate(ours, [Request(prompt, 50, frozenset(ends)) for prompt in PROMPTS], how)
    for prompt, row, short in zip(PROMPTS, free, ended, strict=True):
        expected = their_tokens(theirs, prompt, 50, repetition_penalty=penalty)
        assert len(row.tokens) == 50 and row.tokens == without_prompt(expected, prompt, [])
        expected = their_tokens(theirs, prompt, 50, repetition_penalty=penalty, eos_token_id=ends)
        assert len(short.tokens) < 50 and short.tokens == without_prompt(expected, prompt, ends)
    assert len({tuple(row.tokens) for row in free}) == 3


def test_one_beam_is_transformers_greedy(both):
    theirs, ours = both
    found = generate(ours, [Request(prompt, 12) for prompt in PROMPTS], Beams(1))
    expected = [without_prompt(their_tokens(theirs, prompt, 12), prompt, []) for prompt in PROMPTS]
    assert [row.tokens for row in found] == expected


@pytest.mark.parametrize("penalty", [-0.5, 0.5, 1.0, 2.0])
def test_beams_and_their_scores_are_transformers(both, penalty):
    """Its rules with early_stopping="never"; those of its default stop too early for penalties above 0. It adds the
    log-probabilities in fp32."""
    theirs, ours = both
    for ends in ([7], ENDS):
        requests = [Request(prompt, 12, frozenset(ends)) for prompt in PROMPTS]
        for prompt, row in zip(PROMPTS, generate(ours, requests, Beams(3, penalty)), strict=True):
            options = {"length_penalty": penalty, "early_stopping": "never", "num_beams": 3}
            expected = their_tokens(theirs, prompt, 12, eos_token_id=ends, **options)
            assert row.score == pytest.approx(expected.sequences_scores[0].item(), rel=2e-6)
            assert row.tokens == without_prompt(expected, prompt, ends)
