"""Files that grow, are cut, are replaced, end in half a line, or are not there."""

from __future__ import annotations

from pathlib import Path

import pytest

from internlm_lite.apps.report import tail
from internlm_lite.apps.report.tail import LineDelta, Tail


def test_only_what_is_new_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"1\n2\n")
    reader = Tail(path)
    assert reader.read() == LineDelta([b"1", b"2"], False)
    assert reader.read() == LineDelta([], False)
    with path.open("ab") as file:
        file.write(b"3\n")
    assert reader.read() == LineDelta([b"3"], False)


def test_half_a_line_is_kept_until_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b'1\n{"ste')
    reader = Tail(path)
    assert reader.read().lines == [b"1"]
    assert not reader.read()
    with path.open("ab") as file:
        file.write(b'p":2}\n')
    assert reader.read() == LineDelta([b'{"step":2}'], False)


@pytest.mark.parametrize("text", [b"9\n", b"8\n9\n", b"7\n8\n9\n"], ids=["shorter", "as long", "longer"])
def test_a_file_that_was_cut_or_written_again_starts_anew(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"1\n2\n")
    reader = Tail(path)
    reader.read()
    (tmp_path / "b").write_bytes(text)
    (tmp_path / "b").replace(path)
    assert reader.read() == LineDelta(text.split(b"\n")[:-1], True)


def test_a_file_cut_in_place_and_grown_beyond_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"1\n2\n")
    reader = Tail(path)
    reader.read()
    path.write_bytes(b"3\n4\n5\n")
    assert reader.read() == LineDelta([b"3", b"4", b"5"], True)


def test_no_file_is_nothing_and_a_file_that_went_is_anew(tmp_path: Path) -> None:
    path = tmp_path / "a"
    reader = Tail(path)
    assert not reader.read()
    path.write_bytes(b"1\n")
    assert reader.read() == LineDelta([b"1"], False)
    path.unlink()
    assert reader.read() == LineDelta([], True)
    assert not reader.read()


def test_long_files_come_in_pieces_and_long_lines_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tail, "CHUNK_BYTES", 4)
    path = tmp_path / "a"
    path.write_bytes(b"1\n2\n3\n" + b"x" * 50 + b"\n4\n")
    reader, found = Tail(path), []
    while gain := reader.read():
        found += gain.lines
        assert len(gain.lines) <= 2
    assert found == [b"1", b"2", b"3", b"x" * 50, b"4"]
