"""Damaged and hostile data files: one DataError that names the file, soon, in little memory, and nothing unpickled.

FUZZ_SEED and FUZZ_COUNT draw other inputs, and more of them.
"""

from __future__ import annotations

import errno
import json
import os
import pickle
import random
import resource
import shutil
import signal
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import psutil
import pytest

from internlm_lite.batch import Position
from internlm_lite.data.data_loader import open_training_data, open_validation_data
from internlm_lite.data.folders import find_folders, open_documents
from internlm_lite.data.text import DEFAULTS, find_text, read_documents
from internlm_lite.data.text_files import BadLimit, Tally
from internlm_lite.errors import DataError, InternLMError, StorageError
from tests.data.corpora import data_config, write_internlm, write_native
from tests.data.damage import METADATA, damage, write_folder, write_texts
from tests.world import fork_context

SEED, COUNT = int(os.environ.get("FUZZ_SEED", "1")), int(os.environ.get("FUZZ_COUNT", "540"))
LIMIT_SECONDS, LIMIT_BYTES = 10, 1 << 30


def _read_all(root: Path) -> None:
    data = open_training_data(data_config(root, micro_num=1, micro_bsz=1), 501, 0, 1, seed=0)
    position = Position()
    for _ in range(sum(folder.rows for folder in data.packed)):
        position = data.build(position).after


def _read_texts(root: Path) -> None:
    tally = Tally(BadLimit())
    for file in find_text(root / "docs", DEFAULTS, tally):
        for _ in read_documents(file, DEFAULTS, tally):
            pass


def _problem(root: Path, read: Callable[[Path], None]) -> str | None:
    """What is wrong with how damaged data are answered; None if they are read or refused as they should be."""
    signal.alarm(LIMIT_SECONDS)
    try:
        read(root)
    except InternLMError as error:
        if str(root) not in str(error) or len(str(error)) > 1500 or not str(error).isprintable():
            return f"message {error}"
    except BaseException:
        return traceback.format_exc()
    finally:
        signal.alarm(0)
    return "something was unpickled" if (root / "docs" / "unpickled").exists() else None


def _too_long(*_: object) -> None:
    raise TimeoutError(f"more than {LIMIT_SECONDS} s")


def _fuzz(folder: Path, seeds: range, results: Connection) -> None:
    signal.signal(signal.SIGALRM, _too_long)
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + LIMIT_BYTES,) * 2)
    for seed in seeds:
        root = folder / str(seed)
        write, read = (write_texts, _read_texts) if seed % 4 == 0 else (write_folder, _read_all)
        done = damage(write(root), random.Random(seed))
        if problem := _problem(root, read):
            results.send(f"seed {seed}, {done}: {problem}")
        shutil.rmtree(root)
    results.send(None)


def test_damaged_files_are_refused_with_words(tmp_path: Path) -> None:
    ours, theirs = fork_context.Pipe(duplex=False)
    process = fork_context.Process(target=_fuzz, args=(tmp_path, range(SEED * 10**6, SEED * 10**6 + COUNT), theirs))
    process.start()
    theirs.close()
    problems = []
    try:
        while problem := ours.recv():
            problems.append(problem)
    except EOFError:
        problems.append(f"the process died (exit code {process.join() or process.exitcode})")
    process.join()
    assert not problems, "\n".join(problems[:20])


SURPRISES = {
    "npz": (
        "b.bin.meta",
        lambda path: np.savez(path.open("wb"), np.zeros((3, 2))),
        r"found .*\(a zip or npz archive\)",
    ),
    "pickle": ("b.bin.meta", lambda path: path.write_bytes(pickle.dumps([1])), r"found .*\(a pickle\)"),
    "old Megatron": (
        "a.idx",
        lambda path: path.write_bytes(b"TNTIDX\0\0" + bytes(99)),
        r"\(an index of the old kind of M",
    ),
    "multimodal": ("a.idx", lambda path: path.open("ab").write(bytes(20)), "it is of a multimodal dataset"),
    "many rows": (
        "b.bin.meta",
        lambda path: _promise(path, b"(20, 2)", b"(10**9, 2)"),
        "expected a numpy array of int",
    ),
    "more rows": (
        "b.bin.meta",
        lambda path: _promise(path, b"(20, 2), }  ", b"(999999999, 2), }"),
        "for 999999999 doc",
    ),
    "FIFO": ("a.idx", lambda path: (path.unlink(), os.mkfifo(path)), r"a\.idx is a FIFO, expected a file"),
    "device": (
        "a.bin",
        lambda path: (path.unlink(), path.symlink_to("/dev/zero")),
        r"a\.bin is a device, expected a file",
    ),
    "folder": (
        "a.meta.json",
        lambda path: (path.unlink(), path.mkdir()),
        r"a\.meta\.json is a folder, expected a file",
    ),
    "nested": ("b.bin", lambda path: path.write_bytes(b"[" * 10**6), r"b\.bin: document 19 at byte \d+: expected"),
    "wrong type": (
        "a.meta.json",
        lambda path: path.write_text(json.dumps({**METADATA, "max_token": "5"})),
        r"found damaged metadata \(max_token: Input should be a valid integer\)",
    ),
}


def _promise(path: Path, old: bytes, new: bytes) -> None:
    path.write_bytes(path.read_bytes().replace(old, new).replace(b" " * (len(new) - len(old)) + b"\n", b"\n", 1))


@pytest.mark.parametrize("name", SURPRISES)
def test_it_is_called_what_it_is(name: str, tmp_path: Path) -> None:
    file, put, message = SURPRISES[name]
    put(write_folder(tmp_path) / file)
    with pytest.raises(DataError, match=message) as raised:
        find_folders(tmp_path, "train_folder")
    assert str(tmp_path / "docs" / file) in str(raised.value)


def test_an_empty_shard_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_folder(tmp_path)
    write_native(folder / "c.bin", [])
    write_native(folder / "d.bin", [[], []])
    write_internlm(folder / "e.bin", [])
    (opened,) = find_folders(tmp_path, "train_folder")
    assert [file.path.name for file in opened.files] == ["a.bin", "b.bin"]
    find_folders(tmp_path, "train_folder", log=False)  # as all ranks but the first
    assert [record.args for record in caplog.records] == [(folder / f"{name}.bin",) for name in "cde"]
    for name in "ab":
        for file in folder.glob(f"{name}.*"):
            file.unlink()
    with pytest.raises(DataError, match=r"all tokenised files in .* are empty"):
        find_folders(tmp_path, "train_folder")


@pytest.mark.parametrize("name", ["a.bin", "b.bin"])
def test_a_file_cut_while_it_is_used(tmp_path: Path, name: str) -> None:
    folder = write_folder(tmp_path)
    documents = open_documents(folder / name)
    n_bytes = (folder / name).stat().st_size
    os.truncate(folder / name, 10)
    with pytest.raises(DataError, match=rf"{name}: was cut while it was in use: found 10 bytes, expected {n_bytes}"):
        documents.tokens(1, 0, int(documents.lengths[1]))


def test_a_failing_disk_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = open_documents(write_folder(tmp_path) / "a.bin")

    def fail(*_: object) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "pread", fail)
    with pytest.raises(StorageError, match=r"a\.bin: cannot be read at byte 0 \(Input/output error\)"):
        documents.tokens(0, 0, 1)


def test_a_root_that_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    for name, found in (("x\0y", "unreadable"), ("loop", "unreadable"), ("x" * 300, "unreadable"), ("no", "missing")):
        with pytest.raises(DataError, match=rf"is {found}.*, expected a folder of tokenised data"):
            find_folders(tmp_path / name, "train_folder")


@pytest.mark.parametrize("link", ["../docs", "..", "."])
def test_links_in_a_loop_are_followed_once(tmp_path: Path, link: str) -> None:
    folder = write_folder(tmp_path)
    (folder / "loop").symlink_to(link)
    (opened,) = find_folders(tmp_path, "train_folder")
    assert [file.path for file in opened.files] == [folder / "a.bin", folder / "b.bin"]


@pytest.mark.parametrize("write", [write_native, write_internlm])
def test_data_without_a_label(tmp_path: Path, write: Callable[..., Path]) -> None:
    """Prompts alone, and documents of one token; a folder with a single label is enough."""
    write(tmp_path / "docs" / "a.bin", [[-5, -6, -7]] * 20 + [[3]] * 20)
    for open_data, key in ((open_training_data, "train_folder"), (open_validation_data, "valid_folder")):
        config = data_config(tmp_path, valid_folder=str(tmp_path), min_length=0, micro_num=1)
        with pytest.raises(DataError, match=rf"data\.{key}: folder docs: found no label in its 40 documents"):
            open_data(config, 501, 0, 1, seed=0)
    write(tmp_path / "docs" / "b.bin", [[-5, 6]])
    assert open_training_data(config, 501, 0, 1, seed=0).folders == ("docs",)


def test_the_search_for_a_label_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_native(tmp_path / "docs" / "a.bin", [[-5, -6]] * 100)
    monkeypatch.setattr("internlm_lite.data.pack.MOST_SEARCHED", 5000)
    assert open_training_data(data_config(tmp_path), 501, 0, 1, seed=0).folders == ("docs",)
