"""Draws from known distributions."""

import pytest
import torch

from internlm_lite.errors import ConfigError
from internlm_lite.generate.sample import Sampler, Sampling, keep_top

PROBABILITIES = torch.tensor([0.1, 0.4, 0.2, 0.3], dtype=torch.float64)


def frequencies(sampling: Sampling, draws: int = 20_000) -> torch.Tensor:
    logits = PROBABILITIES.log().expand(draws, 4)
    return Sampler(sampling, torch.device("cpu"))(logits).bincount(minlength=4) / draws


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
    ],
    ids=str,
)
def test_frequencies_are_the_probabilities(sampling, expected):
    assert frequencies(sampling).tolist() == pytest.approx(expected, abs=0.02)


def test_top_k_of_equal_probabilities_keeps_k():
    assert keep_top(torch.full((1, 8), 0.125), top_k=3, top_p=1.0).count_nonzero() == 3


@pytest.mark.parametrize("temperature", [0.5, 0])
def test_a_sick_model_can_be_looked_at(temperature):
    broken = torch.tensor([[torch.nan, 1.0], [torch.nan, torch.nan], [torch.inf, 0.0], [-torch.inf, -torch.inf]])
    drawn = Sampler(Sampling(temperature), torch.device("cpu"))(broken)
    assert drawn.shape == (4,) and set(drawn.tolist()) <= {0, 1} and drawn[2] == 0


def test_all_values_out_of_range_are_named():
    with pytest.raises(ConfigError) as error:
        Sampling(temperature=-1, top_k=-2, top_p=0)
    assert all(name in str(error.value) for name in ("temperature -1", "top_k -2", "top_p 0"))
