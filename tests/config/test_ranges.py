"""Skip lists and ramp-up."""

import pytest

from internlm_lite.config.ranges import Rampup, parse_rampup, parse_skip_batches
from internlm_lite.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "full", "expected"),
    [
        ("1 1 4", 4, [1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4, 4, 4]),
        ("2 2 2", 8, [2, 2, 4, 4, 6, 6, 8, 8, 8]),
        ("4 1 1", 4, [4, 4, 4]),
    ],
)
def test_rampup(text: str, full: int, expected: list[int]) -> None:
    rampup = parse_rampup(text)
    assert rampup is not None
    assert [rampup.micro_num(batch, full) for batch in range(len(expected))] == expected


def test_rampup_texts() -> None:
    assert parse_rampup("") is None and parse_rampup("  ") is None
    assert parse_rampup(" 2  2 100 ") == parse_rampup("2 2 100 steps") == Rampup(2, 2, 100)
    for text in (
        "1 2",
        "1 2 3 4",
        "0 1 1",
        "1 0 1",
        "1 1 0",
        "a b c",
        "1,1,4",
        "-1 1 1",
        "1.0 1 1",
        "1 1 4 rows",
        "tokens",
        "1 tokens",
    ):
        with pytest.raises(ConfigError, match="expected three integers > 0"):
            parse_rampup(text)


@pytest.mark.parametrize(
    ("start", "increment", "every", "micro_tokens"), [(1, 1, 40, 16), (2, 3, 1, 7), (1, 2, 1000, 8), (4, 1, 5, 3)]
)
def test_a_ramp_by_tokens_is_one_of_batches(start: int, increment: int, every: int, micro_tokens: int) -> None:
    """Against counting: a batch has one increment for each `every` tokens before it; some are shorter than a batch."""
    full = start + 4 * increment
    rampup = parse_rampup(f"{start} {increment} {every} tokens")
    assert rampup == Rampup(start, increment, every, by_tokens=True)
    resolved, tokens = rampup.in_batches(full, [(0, micro_tokens)]), 0
    sizes = []
    for batch in range(300):
        sizes.append(min(full, start + increment * (tokens // every)))
        assert resolved.micro_num(batch, full) == sizes[-1], batch
        tokens += sizes[-1] * micro_tokens
    for batch in range(200):
        later = [other for other in range(batch + 1, 300) if sizes[other] != sizes[batch]]
        assert resolved.next_border(batch, full) == (later[0] if later else None), batch


def test_the_next_size_of_a_ramp_by_steps() -> None:
    rampup = Rampup(1, 1, 4)
    assert [rampup.next_border(batch, 3) for batch in (0, 3, 4, 7, 8, 90)] == [4, 4, 8, 8, None, None]


def test_skip_batches() -> None:
    assert parse_skip_batches("") == parse_skip_batches(" ") == ()
    assert parse_skip_batches("1-3,7") == (range(1, 4), range(7, 8))
    assert parse_skip_batches(" 1 - 3 , 0 ") == (range(1, 4), range(0, 1))
    for text in ("1-", "-3", "1,,2", "a", "1-2-3", "1.5", "1;2", "1,"):
        with pytest.raises(ConfigError, match="expected batch ids and inclusive ranges"):
            parse_skip_batches(text)
    with pytest.raises(ConfigError, match='write "1-3" for'):
        parse_skip_batches("3-1")
