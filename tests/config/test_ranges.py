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
    assert parse_rampup(" 2  2 100 ") == Rampup(2, 2, 100)
    for text in ("1 2", "1 2 3 4", "0 1 1", "1 0 1", "1 1 0", "a b c", "1,1,4", "-1 1 1", "1.0 1 1"):
        with pytest.raises(ConfigError, match="expected three integers > 0"):
            parse_rampup(text)


def test_skip_batches() -> None:
    assert parse_skip_batches("") == parse_skip_batches(" ") == ()
    assert parse_skip_batches("1-3,7") == (range(1, 4), range(7, 8))
    assert parse_skip_batches(" 1 - 3 , 0 ") == (range(1, 4), range(0, 1))
    for text in ("1-", "-3", "1,,2", "a", "1-2-3", "1.5", "1;2", "1,"):
        with pytest.raises(ConfigError, match="expected batch ids and inclusive ranges"):
            parse_skip_batches(text)
    with pytest.raises(ConfigError, match='write "1-3" for'):
        parse_skip_batches("3-1")
