"""Closed-form packing against the same written with lists of tokens."""

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from internlm_lite.batch import IGNORE
from internlm_lite.data.folders import Folder, open_documents
from internlm_lite.data.pack import PackedFolder, Packing
from internlm_lite.errors import DataError
from tests.data.corpora import reference_rows, write_internlm, write_native


def _fill(packed: PackedFolder, row: int) -> tuple[list[int], list[int], list[int], list[int]]:
    tokens, labels, positions = (np.full(packed.row_tokens, -7, np.int64) for _ in range(3))
    boundaries = packed.fill(row, tokens, labels, positions)
    return tokens.tolist(), labels.tolist(), positions.tolist(), boundaries.tolist()


def _packed(tmp_path: Path, documents: list[list[int]], **changes: object) -> PackedFolder:
    """One native and one InternLM file."""
    half = len(documents) // 2
    files = [open_documents(write_native(tmp_path / "b.bin", documents[half:]))]
    if half:
        files.insert(0, open_documents(write_internlm(tmp_path / "a.bin", documents[:half])))
    settings = {"row_tokens": 8, "seq_len": 4, "vocab_size": 100, "seed": 3, **changes}
    return PackedFolder(Folder("x", tuple(files)), Packing(**settings))


def _order(documents: list[list[int]], min_length: int, seed: int) -> list[int]:
    order = np.array([i for i, tokens in enumerate(documents) if len(tokens) >= max(1, min_length)], dtype=int)
    np.random.RandomState(seed).shuffle(order)
    return order.tolist()


@settings(max_examples=60, deadline=None)
@given(
    documents=st.lists(st.lists(st.integers(-99, 99), min_size=1, max_size=40), min_size=1, max_size=12),
    seq_len=st.integers(1, 9),
    micro_bsz=st.integers(1, 4),
    min_length=st.integers(0, 5),
    one_sample=st.booleans(),
)
def test_rows_equal_the_reference(documents, seq_len, micro_bsz, min_length, one_sample):
    with tempfile.TemporaryDirectory() as folder:
        size = micro_bsz * seq_len
        changes = {"row_tokens": size, "seq_len": seq_len, "min_length": min_length, "one_sample": one_sample}
        packed = _packed(Path(folder), documents, **changes)
        tailed = _packed(Path(folder), documents, keep_tail=True, **changes)
        order = _order(documents, min_length, seed=3)
        expected = reference_rows(documents, order, size, seq_len, one_sample)
        assert packed.rows == len(expected)
        assert [_fill(packed, row) for row in range(packed.rows)] == expected
        assert packed.tokens == sum(len(documents[i]) for i in order)
        assert tailed.rows == -(-packed.tokens // size)
        assert [_fill(tailed, row) for row in range(packed.rows)] == expected


def test_label_across_row_end(tmp_path):
    packed = _packed(tmp_path, [list(range(1, 20))])
    assert _fill(packed, 0)[1] == [2, 3, 4, 5, 6, 7, 8, 9]
    assert _fill(packed, 0)[3] == [0, 4, 8]
    assert _fill(packed, 1)[1] == [10, 11, 12, 13, 14, 15, 16, 17]


def test_prompt_tokens_are_no_labels(tmp_path):
    document = [-1, -2, 3, 4, -5, -6, 7, 8, -9, 10, 11, 12, 13, 14, 15, 16]
    packed = _packed(tmp_path, [document])
    assert _fill(packed, 0)[0] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert _fill(packed, 0)[1] == [IGNORE, 3, 4, IGNORE, IGNORE, 7, 8, IGNORE]
    assert _fill(packed, 1)[1] == [10, 11, 12, 13, 14, 15, 16, IGNORE]


def test_tail_is_padded(tmp_path):
    packed = _packed(tmp_path, [list(range(1, 12))], keep_tail=True)
    tokens, labels, positions, boundaries = _fill(packed, 1)
    assert tokens == [9, 10, 11, 0, 0, 0, 0, 0]
    assert labels == [10, 11, IGNORE, IGNORE, IGNORE, IGNORE, IGNORE, IGNORE]
    assert (positions, boundaries) == ([0, 1, 2, 0, 1, 2, 3, 0], [0, 3, 7, 8])
    assert _fill(packed, 5) == ([0] * 8, [IGNORE] * 8, [0, 1, 2, 3] * 2, [0, 4, 8])


@pytest.mark.parametrize("token", [100, -100, 2**31 - 1])
def test_id_outside_the_vocabulary_is_located(tmp_path, token):
    packed = _packed(tmp_path, [list(range(1, 12)), [1, 2, 3, token, 5, 6, 7]])
    with pytest.raises(
        DataError, match=rf"b\.bin: document 0, token 3: found id {abs(token)}, expected ids below .* 100"
    ):
        for row in range(packed.rows):
            _fill(packed, row)


def test_label_beyond_row_end_is_checked(tmp_path):
    packed = _packed(tmp_path, [[1, 2, 3, 4, 5, 6, 7, 8, 500]])
    with pytest.raises(DataError, match="token 8: found id 500"):
        _fill(packed, 0)


def test_an_end_token_with_the_id_of_padding_is_a_label(tmp_path):
    """Padding is known by its place, so that a model learns to end a text whose end token is 0, too."""
    packed = _packed(tmp_path, [[5, 6, 0, 7, 8, 0]], keep_tail=True)
    assert _fill(packed, 0)[1] == [6, 0, 7, 8, 0, IGNORE, IGNORE, IGNORE]
