"""Checkpoints made by somebody who means harm: nothing in them is executed, followed or believed."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pickle
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from internlm_lite.checkpoint.format import catalog
from internlm_lite.checkpoint.format.manifest import Commit, Manifest, Name, Vote, dump_with_crc, load_with_crc
from internlm_lite.checkpoint.manager import CheckpointManager
from internlm_lite.checkpoint.storage.local import LocalStorage
from internlm_lite.errors import CheckpointError, InternLMError, StorageError
from internlm_lite.mesh.mesh import single_process_mesh
from tests.checkpoint.pieces import pieces_of
from tests.faults.states import loaded_step, save_at


class Bomb:
    """Unpickled, it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.marker),)


@pytest.fixture
def names(tmp_path: Path) -> list[str]:
    """Checkpoints of steps 1 and 2."""
    manager = CheckpointManager(str(tmp_path / "save"), single_process_mesh())
    return [str(save_at(manager, step, "milestone")) for step in (1, 2)]


def files_of(name: str) -> dict[str, str]:
    data = f"data/{name}"
    return {
        "commit": f"commits/{name}.json",
        "manifest": f"{data}/manifest.json",
        "vote": f"{data}/rank-00000.vote.json",
        "payload": f"{data}/rank-00000.safetensors",
    }


def fallen_back(folder: Path) -> str:
    """Resume; the older checkpoint must be taken. Why the newer one was not."""
    manager = CheckpointManager(str(folder), single_process_mesh(), saving=None)
    restored = manager.resume(pieces_of(0, fill=False))
    assert restored is not None and restored.found.step == 1
    (reason,) = restored.found.rejected
    return reason


def test_pickles_beside_checkpoint_are_not_read(tmp_path: Path, names: list[str]) -> None:
    folder, marker = tmp_path / "save", tmp_path / "exploded"
    for place in ("", "commits", "data", f"data/{names[1]}"):
        for file in ("model_tp0_pp0.pt", "rank-00000.pt", "context.pt", f"{names[1]}.pt", "rank-00001.safetensors"):
            torch.save({"w": Bomb(marker)}, folder / place / file)
    assert loaded_step(folder) == 2 and not marker.exists()


@pytest.mark.parametrize("part", ["commit", "manifest", "vote", "payload"])
@pytest.mark.parametrize("how", ["torch", "pickle"])
def test_pickles_as_checkpoint_files_are_not_read(tmp_path: Path, names: list[str], part: str, how: str) -> None:
    folder, marker = tmp_path / "save", tmp_path / "exploded"
    path = folder / files_of(names[1])[part]
    if how == "torch":
        torch.save(Bomb(marker), path)
    else:
        path.write_bytes(pickle.dumps(Bomb(marker)))
    assert path.name in fallen_back(folder)
    assert not marker.exists()
    with pytest.raises(FileExistsError):  # it would have worked
        marker.mkdir()
        pickle.loads(pickle.dumps(Bomb(marker)))


def test_path_to_pickle_is_refused(tmp_path: Path) -> None:
    marker, file = tmp_path / "exploded", tmp_path / "model.pt"
    torch.save(Bomb(marker), file)
    manager = CheckpointManager(str(tmp_path), single_process_mesh(), saving=None)
    for path in (str(file), f"local:{file}"):
        with pytest.raises(InternLMError):
            manager.open(path)
    assert not marker.exists()


def resealed(folder: Path, name: str, payload: bytes, header_bytes: int | None = None) -> None:
    """Put another tensor file into a checkpoint, with every check sum of vote, manifest and commit made to fit."""
    files = {part: folder / key for part, key in files_of(name).items()}
    vote = load_with_crc(Vote, files["vote"].read_bytes(), "vote")
    manifest = load_with_crc(Manifest, files["manifest"].read_bytes(), "manifest")
    commit = load_with_crc(Commit, files["commit"].read_bytes(), "commit")
    length = int.from_bytes(payload[:8], "little") + 8 if header_bytes is None else header_bytes
    facts = {
        "size": len(payload),
        "sha256": hashlib.sha256(payload).hexdigest(),
        "header_bytes": length,
        "header_crc32": zlib.crc32(payload[:length]),
    }
    told = dump_with_crc(vote.model_copy(update={"facts": vote.facts.model_copy(update=facts)}))
    (file,) = manifest.files
    facts |= {"vote_size": len(told), "vote_sha256": hashlib.sha256(told).hexdigest()}
    index = dump_with_crc(manifest.model_copy(update={"files": {file: manifest.files[file].model_copy(update=facts)}}))
    sha256 = hashlib.sha256(index).hexdigest()
    for part, data in (
        ("payload", payload),
        ("vote", told),
        ("manifest", index),
        ("commit", dump_with_crc(commit.model_copy(update={"size": len(index), "sha256": sha256}))),
    ):
        files[part].write_bytes(data)


def hostile(change: str, payload: bytes) -> tuple[bytes, int | None]:
    """A tensor file that wants to be believed, and how long it says its header is."""
    length = int.from_bytes(payload[:8], "little") + 8
    header: dict[str, Any] = json.loads(payload[8:length])
    data = payload[length:]
    entry = header["master/norm.weight"]
    if change == "enormous length":
        return (2**62).to_bytes(8, "little") + payload[8:], length
    if change == "header of the whole file":
        return payload, len(payload) + 1
    if change == "nested":
        text = b"[" * 200_000
        return len(text).to_bytes(8, "little") + text + data, None
    if change == "key twice":
        text = payload[8:length].rstrip().removesuffix(b"}") + b',"master/norm.weight":' + json.dumps(entry).encode()
        text += b"}"
        return len(text).to_bytes(8, "little") + text + data, None
    changes: dict[str, Callable[[], object]] = {
        "enormous shape": lambda: entry.update(shape=[2**40, 2**40]),
        "outside the file": lambda: entry.update(data_offsets=[2**40, 2**40 + 28]),
        "over another tensor": lambda: entry.update(data_offsets=[0, 28]),
        "negative": lambda: entry.update(data_offsets=[-28, 0]),
        "no numbers": lambda: entry.update(shape=["7"]),
        "code for a dtype": lambda: entry.update(dtype="__import__('os')"),
    }
    changes[change]()
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data, None


@pytest.mark.parametrize(
    "change",
    [
        "enormous length", "header of the whole file", "nested", "key twice", "enormous shape", "outside the file",
        "over another tensor", "negative", "no numbers", "code for a dtype",
    ],
)  # fmt: skip
def test_false_headers_with_valid_checksums_are_refused(tmp_path: Path, names: list[str], change: str) -> None:
    folder = tmp_path / "save"
    good = (folder / files_of(names[1])["payload"]).read_bytes()
    resealed(folder, names[1], good)
    assert loaded_step(folder) == 2, "resealing itself harms nothing"
    resealed(folder, names[1], *hostile(change, good))
    assert "rank-00000.safetensors" in fallen_back(folder)


@pytest.mark.parametrize("part", ["commit", "manifest"])
def test_deeply_nested_json_is_refused(tmp_path: Path, names: list[str], part: str) -> None:
    folder = tmp_path / "save"
    path = folder / files_of(names[1])[part]
    body = b'{"state":' + b"[" * 300_000 + b"]" * 300_000 + b"}"
    path.write_bytes(b'{"crc32":"%08x","body":%s}\n' % (zlib.crc32(body), body))
    assert path.name in fallen_back(folder)


@pytest.mark.parametrize(
    "lie",
    ["../rank-00000.safetensors", "/etc/passwd", "rank-00000.safetensors/../../x", "..", "rank-00000.pt", ".tmp-1"],
)
def test_file_names_outside_checkpoint_are_refused(tmp_path: Path, names: list[str], lie: str) -> None:
    folder = tmp_path / "save"
    path = folder / files_of(names[1])["manifest"]
    raw = path.read_bytes().replace(b'"rank-00000.safetensors"', json.dumps(lie).encode())
    body = raw[raw.index(b'"body":') + 7 : -2]
    path.write_bytes(b'{"crc32":"%08x","body":%s}\n' % (zlib.crc32(body), body))
    commit_path = folder / files_of(names[1])["commit"]
    commit = load_with_crc(Commit, commit_path.read_bytes(), "commit")
    data = path.read_bytes()
    facts = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    commit_path.write_bytes(dump_with_crc(commit.model_copy(update=facts)))
    reason = fallen_back(folder)
    assert "manifest.json" in reason and "should match pattern" in reason, reason


def test_commit_of_other_folder_is_refused(tmp_path: Path, names: list[str]) -> None:
    folder = tmp_path / "save"
    path = folder / files_of(names[1])["commit"]
    commit = load_with_crc(Commit, path.read_bytes(), "commit")
    for lie in (f"data/{names[0]}/manifest.json", "../outside/manifest.json", "/etc/passwd"):
        path.write_bytes(dump_with_crc(commit.model_copy(update={"manifest": lie})))
        assert path.name in fallen_back(folder)


def linked(path: Path, aside: Path) -> None:
    path.rename(aside)
    path.symlink_to(aside)


def test_linked_data_folder_is_refused(tmp_path: Path, names: list[str]) -> None:
    folder, aside = tmp_path / "save", tmp_path / "aside"
    linked(folder / "data" / names[1], aside)
    reason = fallen_back(folder)
    assert names[1] in reason and ("symbolic link" in reason or "is missing" in reason), reason
    name = Name.parse(names[1])
    assert name is not None
    with pytest.raises(StorageError, match="symbolic link"):
        catalog.remove(LocalStorage(folder), name)
    assert len(os.listdir(aside)) == 3


@pytest.mark.parametrize("top", ["commits", "data"])
def test_linked_top_folder_is_refused(tmp_path: Path, names: list[str], top: str) -> None:
    folder, aside = tmp_path / "save", tmp_path / "aside"
    linked(folder / top, aside)
    before = sorted(os.listdir(aside))
    manager = CheckpointManager(str(folder), single_process_mesh())
    with pytest.raises((StorageError, CheckpointError), match="symbolic link"):
        manager.resume(pieces_of(0, fill=False))
    with pytest.raises(StorageError, match="symbolic link"):
        save_at(manager, 3)
    assert sorted(os.listdir(aside)) == before


def test_sweep_does_not_follow_links(tmp_path: Path, names: list[str]) -> None:
    folder, aside = tmp_path / "save", tmp_path / "aside"
    aside.write_text("precious")
    os.utime(aside, (0, 0))
    (folder / ".tmp-x").symlink_to(aside)
    (folder / "data" / "0000000009-00009.abcdef").symlink_to(tmp_path / "elsewhere")
    LocalStorage(folder).sweep(0)
    assert aside.read_text() == "precious"


def test_stored_text_is_not_formatted_or_run(
    tmp_path: Path, names: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Words in a state that look like code or a log format come back as words."""
    manager = CheckpointManager(str(tmp_path / "save"), single_process_mesh())
    state = {"step": 3, "%s%n": "{0.__class__}", "__import__('os')": "$(touch exploded)"}
    with caplog.at_level(logging.INFO):
        manager.save(3, "final", pieces_of(0, fill=True), state)
        restored = manager.resume(pieces_of(0, fill=False))
    assert restored is not None and restored.state == state
