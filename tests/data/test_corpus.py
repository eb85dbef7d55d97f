"""The demo's corpus: what is written, what is held out, what is refused."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from internlm_lite.data.corpus import HELD_OUT, Sourced, _docstrings, _files, build_corpus, machine_folders
from internlm_lite.errors import DataError


def numbered(n: int, word: str = "word") -> Callable[[], Iterator[Sourced]]:
    return lambda: ((f"{word}/{i}.py", f"{word} {i} " * 50) for i in range(n))


def written(target: Path, part: str, folder: str) -> list[dict]:
    return [json.loads(line) for line in (target / part / folder / "text.jsonl").read_text("utf-8").splitlines()]


def test_split_is_stable_partition(tmp_path: Path) -> None:
    folders = {"a": numbered(1000, "alpha"), "b": numbered(1000, "beta")}
    sizes = build_corpus(tmp_path / "once", folders, 10_000_000, needed_folders=2, needed_bytes=1000)
    build_corpus(tmp_path / "twice", folders, 10_000_000, needed_folders=2, needed_bytes=1000)
    for folder in folders:
        train, valid = (written(tmp_path / "once", part, folder) for part in ("train", "valid"))
        assert len(train) + len(valid) == sizes[folder].documents == 1000
        assert len(valid) == pytest.approx(1000 / HELD_OUT, rel=0.5)
        assert sum(len(document["text"].encode()) for document in valid) == sizes[folder].valid_bytes
        assert train == written(tmp_path / "twice", "train", folder)


def test_split_is_equal_in_all_folders(tmp_path: Path) -> None:
    folders = {"code": numbered(500), "docs": lambda: ((s, t.upper()) for s, t in numbered(500)())}
    build_corpus(tmp_path, folders, 10_000_000, needed_folders=2, needed_bytes=1000)
    held_out = [{document["source"] for document in written(tmp_path, "valid", folder)} for folder in folders]
    assert held_out[0] == held_out[1]


def test_limit_duplicates_and_lengths(tmp_path: Path) -> None:
    def documents() -> Iterator[Sourced]:
        yield "short.py", "too short"
        yield "long.py", "x" * 200_001
        yield from itertools.chain(numbered(300)(), (("again/" + s, t) for s, t in numbered(300)()))

    sizes = build_corpus(tmp_path / "all", {"a": documents}, 10_000_000, needed_folders=1, needed_bytes=1)
    assert sizes["a"].documents == 300
    sizes = build_corpus(tmp_path / "some", {"a": documents}, 50_000, needed_folders=1, needed_bytes=1)
    assert 50_000 <= sizes["a"].total_bytes < 51_000


def test_too_little_text(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"found code .* expected 3 folders and 9\.54 MiB"):
        build_corpus(tmp_path, {"code": numbered(500), "docs": lambda: iter(())}, 10_000_000)


def test_docstrings(tmp_path: Path) -> None:
    (tmp_path / "pkg").mkdir()
    (tmp_path / "pkg" / "__init__.py").write_text(
        '"""The package."""\nclass A:\n    """A class.\n\n    More.\n    """\n    def f(self):\n        "Does f."\n'
    )
    (tmp_path / "broken.py").write_text("def (")
    (tmp_path / "silent.py").write_text("x = 1\n")
    files = _files(tmp_path, "python", lambda name: name.endswith(".py"))
    assert list(_docstrings(files)) == [
        ("python/pkg/__init__.py", "pkg\n\nThe package.\n\n\npkg.A\n\nA class.\n\nMore.\n\n\npkg.A.f\n\nDoes f.")
    ]


@pytest.mark.parametrize("folder", ["code", "docs", "cpp"])
def test_machine_folders(folder: str) -> None:
    found = list(itertools.islice(machine_folders()[folder](), 20))
    assert len(found) == 20
    assert all(text for _, text in found)
