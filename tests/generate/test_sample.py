"""Draws from known distributions."""

import pytest
import torch

from internlm_lite.errors import ConfigError
from internlm_lite.generate.sample import Sampling, draw, keep_top, random_numbers

PROBABILITIES = torch.tensor([0.1, 0.4, 0.2, 0.3], dtype=torch.float64)


def frequencies(sampling: Sampling, draws: int = 20_000) -> torch.Tensor:
    logits = PROBABILITIES.log().expand(draws, 4)
    numbers = torch.rand(draws, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return draw(logits, sampling, numbers).bincount(minlength=4) / draws


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(), [0.1, 0.4, 0.2, 0.3]),
        (Sampling(temperature=0), [0, 1, 0, 0]),
        (Sampling(temperature=0.5), [1 / 30, 16 / 30, 4 / 30, 9 / 30]),
        (Sampling(top_k=1), [0, 1, 0, 0]),
        (Sampling(top_k=2), [0, 4 / 7, 0, 3 / 7]),
        (Sampling(top_k=100), [0.1, 0.4, 0.2, 0.3]),
        (Sampling(top_p=0.69), [0, 4 / 7, 0, 3 / 7]),
        (Sampling(top_p=0.71), [0, 4 / 9, 2 / 9, 3 / 9]),
        (Sampling(top_p=0.01), [0, 1, 0, 0]),
        (Sampling(top_k=3, top_p=0.5), [0, 4 / 7, 0, 3 / 7]),
        (Sampling(min_p=0.6), [0, 4 / 7, 0, 3 / 7]),
        (Sampling(min_p=1), [0, 1, 0, 0]),
        (Sampling(temperature=0.5, min_p=0.5), [0, 16 / 25, 0, 9 / 25]),  # after the temperature
    ],
    ids=str,
)
def test_frequencies_are_the_probabilities(sampling, expected):
    assert frequencies(sampling).tolist() == pytest.approx(expected, abs=0.02)


def test_top_k_of_equal_probabilities_keeps_k():
    assert keep_top(torch.full((1, 8), 0.125), Sampling(top_k=3)).count_nonzero() == 3


@pytest.mark.parametrize("temperature", [0.5, 0])
def test_a_sick_model_can_be_looked_at(temperature):
    broken = torch.tensor([[torch.nan, 1.0], [torch.nan, torch.nan], [torch.inf, 0.0], [-torch.inf, -torch.inf]])
    drawn = draw(broken, Sampling(temperature), torch.tensor([0.1, 0.4, 0.6, 0.9], dtype=torch.float64))
    assert drawn.shape == (4,) and set(drawn.tolist()) <= {0, 1} and drawn[2] == 0


def test_the_ends_of_the_random_numbers_draw_tokens_that_are_sampled():
    """A sum that rounds below 1 must not let the largest number fall behind the last token."""
    numbers = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    for vocab in (3, 1000, 50_001):
        logits = torch.linspace(-3, 3, vocab).expand(2, vocab)
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            assert draw(logits.to(dtype), Sampling(), numbers).tolist() == [0, vocab - 1]
        first, last = draw(logits, Sampling(top_k=2), numbers).tolist()
        assert (first, last) == (vocab - 2, vocab - 1)


def test_random_numbers_of_a_row_are_its_own():
    def numbers(*seeds):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return torch.stack([random_numbers(generators) for _ in range(30)])

    both = numbers(5, 7)
    assert torch.equal(both[:, 1:], numbers(7)) and not torch.equal(both[:, 0], both[:, 1])
    assert both.dtype == torch.float64 and both.unique().numel() == 60


def test_all_values_out_of_range_are_named():
    with pytest.raises(ConfigError) as error:
        Sampling(temperature=-1, top_k=-2, top_p=0, min_p=1.5, repetition_penalty=0)
    wrong = ("temperature -1", "top_k -2", "top_p 0", "min_p 1.5", "repetition_penalty 0")
    assert all(name in str(error.value) for name in wrong)
