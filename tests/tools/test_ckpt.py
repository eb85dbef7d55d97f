"""tools/ckpt.py on a save folder: what it lists, what damage it names, and what it never removes."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
from pathlib import Path

import pytest
import torch

from internlm_lite.checkpoint.admin import listing, verify
from internlm_lite.checkpoint.format import catalog
from internlm_lite.checkpoint.format.catalog import committed
from internlm_lite.checkpoint.format.manifest import Name
from internlm_lite.checkpoint.format.tensor_file import BLOCK_BYTES, parse_header
from internlm_lite.checkpoint.manager import CheckpointManager
from internlm_lite.checkpoint.storage.local import LocalStorage
from internlm_lite.checkpoint.storage.run_lock import Lease
from internlm_lite.cli import ckpt
from internlm_lite.errors import StorageError
from internlm_lite.mesh.layout import LocalShard
from internlm_lite.mesh.mesh import single_process_mesh
from tests.checkpoint.pieces import pieces_of


def save(folder: Path, step: int, kind: str = "milestone") -> Name:
    manager = CheckpointManager(str(folder), single_process_mesh())
    state = {"rng": torch.arange(40, dtype=torch.uint8)}
    name = Name.parse(manager.save(step, kind, pieces_of(0, fill=True), {"step": step}, state))
    assert name is not None
    return name


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three checkpoints, and a folder of snapshots inside."""
    for step in (10, 20, 30):
        save(tmp_path, step)
    save(tmp_path / "snapshot", 35, "snapshot")
    return tmp_path


def names(folder: Path) -> list[Name]:
    """Newest first."""
    return committed(LocalStorage(folder))


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    code = ckpt.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return code, captured.out + captured.err


def payload(folder: Path, name: Name) -> Path:
    return folder / name.folder / "rank-00000.safetensors"


def flip(path: Path, byte: int, bit: int = 0) -> None:
    raw = bytearray(path.read_bytes())
    raw[byte] ^= 1 << bit
    path.write_bytes(raw)


def header_of(path: Path) -> dict:
    raw = path.read_bytes()
    return parse_header(raw[: int.from_bytes(raw[:8], "little") + 8], len(raw))


def test_ls_shows_every_checkpoint(folder, capsys):
    (folder / "data" / "0000000040-00009.abcdef").mkdir()
    (folder / "data" / "0000000040-00009.abcdef" / "rank-00000.safetensors").write_bytes(b"half")
    code, text = run(capsys, "ls", folder)
    assert code == 0
    rows = [line.split() for line in text.splitlines()]
    steps = [(row[0], row[-1]) for row in rows if row and row[0].isdecimal() and len(row) > 5]
    assert steps == [(str(name.step), str(name)) for name in [*names(folder), *names(folder / "snapshot")]]
    assert text.count("milestone") == 3 and text.count("good") == 4 and "unfinished saves: 1, 4 B" in text
    assert f"local:{folder}/snapshot" in text


@pytest.mark.parametrize("deep", [False, True])
def test_ls_json_says_what_was_looked_at(folder, capsys, deep):
    flip(payload(folder, names(folder)[1]), -1)
    code, text = run(capsys, "ls", folder, "--json", *(["--deep"] if deep else []))
    (own, snapshots), newest = json.loads(text), names(folder)[0]
    assert code == 0 and [one["step"] for one in own["checkpoints"]] == [30, 20, 10]
    first = own["checkpoints"][0]
    assert (first["name"], first["kind"], first["layout"]["world"]) == (str(newest), "milestone", 1)
    files = (folder / newest.folder).iterdir()
    assert first["bytes"] == sum(file.stat().st_size for file in files) and 0 <= first["age_seconds"] < 600
    # A flipped bit of a tensor shows only to who reads it.
    assert [one["good"] for one in own["checkpoints"]] == [True, not deep, True]
    assert snapshots["checkpoints"][0]["kind"] == "snapshot" and own["unfinished"] == []


def test_ls_sees_cut_files_and_broken_documents_at_once(folder, capsys):
    newest, middle, oldest = names(folder)
    payload(folder, newest).write_bytes(payload(folder, newest).read_bytes()[:-1])
    flip(folder / middle.manifest, 200)
    flip(folder / oldest.vote(0), 50)
    _, text = run(capsys, "ls", folder)
    assert text.count("damaged") >= 3
    for word in (f"{newest}/rank-00000.safetensors", f"{middle}/manifest.json", f"{oldest}/rank-00000.vote.json"):
        assert word in text


def test_verify_of_good_ones(folder, capsys):
    code, text = run(capsys, "verify", folder)
    assert code == 0 and text.count("good, every byte") == 4
    name = names(folder)[1]
    for path in (folder / "data" / str(name), folder / "commits" / f"{name}.json"):
        code, text = run(capsys, "verify", path)
        assert code == 0 and text.count("good") == 1 and str(name) in text
    shutil.copytree(folder / name.folder, folder.parent / f"{folder.name}-copy")
    code, text = run(capsys, "verify", folder.parent / f"{folder.name}-copy")
    shutil.rmtree(folder.parent / f"{folder.name}-copy")
    assert code == 0 and f"{name}: good" in text


def test_verify_names_file_and_tensor_of_every_damage(folder, capsys):
    name = names(folder)[1]
    path = payload(folder, name)
    header = header_of(path)
    for key in ("master/norm.weight", "exp_avg/output.weight", "rank_state/rng"):
        flip(path, header[key].start + 2)
    flip(folder / name.vote(0), 60)
    code, text = run(capsys, "verify", folder)
    assert code == 2 and text.count("DAMAGED") == 1 and text.count("good, every byte") == 3
    damages = [line for line in text.splitlines() if line.startswith("  ")]
    assert len(damages) == 4 and all(str(name) in line for line in damages)
    for words in ("master/norm.weight: bytes 0..28 differ", "exp_avg/output.weight", "rank_state/rng", ".vote.json"):
        assert any(words in line for line in damages), words


def test_verify_finds_any_flipped_bit(folder, capsys):
    """Of every file of a checkpoint; of tensors by name."""
    name, rng = names(folder)[0], random.Random(7)
    files = [folder / name.commit, *sorted((folder / name.folder).iterdir())]
    header = header_of(payload(folder, name))
    for number in range(120):
        path = files[number % len(files)]
        byte = rng.randrange(path.stat().st_size)
        bit = rng.randrange(8)
        flip(path, byte, bit)
        code, text = run(capsys, "verify", folder / "data" / str(name))
        flip(path, byte, bit)
        assert code == 2 and str(path.relative_to(folder)) in text, (path, byte, bit, text)
        hit = [key for key, tensor in header.items() if tensor.start <= byte < tensor.stop]
        if path == payload(folder, name) and hit:
            assert f"tensor {hit[0]}: bytes 0.." in text
    assert run(capsys, "verify", folder / "data" / str(name))[0] == 0


@pytest.mark.parametrize("keep", [0, 100, 0.5, -1])
def test_verify_of_a_cut_file_names_what_is_lost(folder, capsys, keep):
    name = names(folder)[0]
    path = payload(folder, name)
    header, size = header_of(path), path.stat().st_size
    kept = int(keep * size) if keep == 0.5 else keep % size
    path.write_bytes(path.read_bytes()[:kept])
    code, text = run(capsys, "verify", folder / "data" / str(name))
    assert code == 2 and f"rank-00000.safetensors: has {kept} bytes, expected {size}" in text
    lost = {key for key, tensor in header.items() if tensor.stop > kept and tensor.stop > tensor.start}
    assert lost and all(f"tensor {key}: " in text for key in lost)
    safe = header.keys() - lost if keep in (0.5, -1) else set()
    assert not any(f"tensor {key}: " in text for key in safe)


def test_verify_of_missing_files(folder, capsys):
    newest, middle, oldest = names(folder)
    payload(folder, newest).unlink()
    (folder / middle.manifest).unlink()
    (folder / oldest.vote(0)).unlink()
    code, text = run(capsys, "verify", folder)
    assert code == 2 and text.count("DAMAGED") == 3
    assert f"{newest}/rank-00000.safetensors: is missing" in text and "tensor master/norm.weight: lost" in text
    assert f"{middle}/manifest.json" in text
    assert text.count(f"{oldest}/rank-00000.vote.json: is missing") == text.count("vote.json") == 1


def test_verify_reads_tensors_of_many_blocks(tmp_path, capsys):
    """The damage is in the second read of a tensor, in its third block."""
    big = torch.arange(5 * BLOCK_BYTES // 4 + 3, dtype=torch.float32)
    piece = LocalShard("big", "master", tuple(big.shape), ((0, len(big)),), None, big)
    CheckpointManager(str(tmp_path), single_process_mesh()).save(1, "final", [piece], {})
    (name,) = names(tmp_path)
    assert run(capsys, "verify", tmp_path)[0] == 0
    start = header_of(payload(tmp_path, name))["master/big"].start
    flip(payload(tmp_path, name), start + 2 * BLOCK_BYTES + 5)
    flip(payload(tmp_path, name), start + 5 * BLOCK_BYTES + 1)
    code, text = run(capsys, "verify", tmp_path)
    assert code == 2
    assert f"master/big: bytes {2 * BLOCK_BYTES}..{3 * BLOCK_BYTES} and 1 more blocks differ" in text


def test_prune_keeps_the_newest(folder, capsys):
    newest, middle, oldest = names(folder)
    code, text = run(capsys, "prune", folder, "--keep", 2, "--dry-run")
    assert code == 0 and f"would remove  {oldest}" in text and len(names(folder)) == 3
    code, text = run(capsys, "prune", folder, "--keep", 2)
    assert code == 0 and f"remove  {oldest}" in text
    assert names(folder) == [newest, middle] and not (folder / oldest.folder).exists()
    assert len(names(folder / "snapshot")) == 1, "a folder inside is another folder"
    code, text = run(capsys, "prune", folder, "--keep", 5)
    alone = f"left alone: local:{folder}/snapshot, a save folder of its own\n"
    assert (code, text) == (0, f"{alone}keep    {newest}\nkeep    {middle}\nnothing to remove\n")
    assert run(capsys, "verify", folder)[0] == 0


def test_prune_refuses_while_a_run_uses_the_folder(folder, capsys):
    run_of_another = Lease(LocalStorage(folder), lease_seconds=5, renew_seconds=0.05)
    run_of_another.acquire()
    # As if it were on another host: then only its beat tells that it lives.
    run_of_another._document = lambda: b'{"owner": "x", "host": "node7", "pid": 12, "beat": %d}' % run_of_another._beat
    run_of_another._owner = "x"
    LocalStorage(folder).put("run.lock", [run_of_another._document()])
    code, text = run(capsys, "prune", folder, "--keep", 1)
    assert "is locked: looking whether its run is alive, for up to 60 s" in text
    assert code == 6 and "in use by host node7, pid 12" in text and len(names(folder)) == 3
    assert run(capsys, "prune", folder, "--keep", 1, "--dry-run")[0] == 0
    run_of_another.release()
    assert run(capsys, "prune", folder, "--keep", 1)[0] == 0 and len(names(folder)) == 1
    assert not (folder / "run.lock").exists()


def test_prune_of_the_outer_folder_only(folder, capsys):
    shutil.rmtree(folder / "commits")
    code, text = run(capsys, "prune", folder, "--keep", 1)
    assert code == 2 and f"local:{folder} holds no checkpoint" in text
    assert f"; local:{folder}/snapshot is one" in text


def test_what_a_run_removes_meanwhile_is_not_damaged(folder, capsys, monkeypatch):
    gone = names(folder)[1]
    original = catalog.inspect

    def late(storage, name, *rest):
        if name == gone and storage.name == f"local:{folder}":
            catalog.remove(storage, name)
        return original(storage, name, *rest)

    monkeypatch.setattr(verify, "inspect", late)
    code, text = run(capsys, "verify", folder)
    assert code == 0 and f"{gone}: removed meanwhile" in text and "DAMAGED" not in text
    gone = names(folder)[1]
    monkeypatch.setattr(listing, "inspect", late)
    code, text = run(capsys, "ls", folder)
    assert code == 0 and str(gone) not in text and str(names(folder)[0]) in text


def test_lines_in_a_pipe_are_not_wrapped(tmp_path, capsys):
    folder = tmp_path / ("deep" * 40)
    save(folder, 10)
    layout = "64 ranks dp=8 tp=4 pp=2 zero=8 replica=1"
    listed = next(iter(listing.list_checkpoints(LocalStorage(folder), deep=False)))
    sizes = {"world": 64, "dp": 8, "tp": 4, "pp": 2, "zero": 8, "replica": 16}
    ckpt.ToolConsole(width=ckpt._PIPE_COLUMNS).print(ckpt._table([dataclasses.replace(listed, layout=sizes)]))
    assert layout.rpartition(" ")[0] + " replica=16" in capsys.readouterr().out


def test_settings_of_s3_are_named_as_the_tool_has_them(capsys, monkeypatch):
    def refuse(*_):
        raise StorageError("it does not speak TLS (for plain http set ckpt.s3.insecure=True)")

    monkeypatch.setattr(ckpt, "open_storage", refuse)
    code, text = run(capsys, "ls", "boto3:s3://lab.127.0.0.1:1/x")
    assert code == 6 and "for plain http set --s3 insecure=True" in text


@pytest.mark.parametrize("how", ["flip", "cut", "manifest"])
def test_prune_never_removes_the_newest_good_one(folder, capsys, how):
    newest, middle, oldest = names(folder)
    if how == "flip":
        flip(payload(folder, newest), -1)  # only reading every byte shows it
    elif how == "cut":
        payload(folder, newest).write_bytes(payload(folder, newest).read_bytes()[:-1])
    else:
        (folder / newest.manifest).unlink()
    code, text = run(capsys, "prune", folder, "--keep", 1)
    assert code == 0 and f"keep    {middle}\n" in text and f"keep    {newest}  (damaged" in text
    assert names(folder) == [newest, middle] and f"remove  {oldest}" in text
    assert run(capsys, "verify", folder / "data" / str(middle))[0] == 0


def test_prune_removes_nothing_when_nothing_is_good(folder, capsys):
    for name in names(folder):
        flip(payload(folder, name), -1)
    # Only the newest kept one is read whole; it must be good for anything to go.
    code, text = run(capsys, "prune", folder, "--keep", 1)
    assert code == 2 and "holds no good checkpoint: nothing was removed" in text and len(names(folder)) == 3


@pytest.mark.parametrize("command", [["ls"], ["verify"], ["prune", "--keep", "1"]])
def test_a_folder_without_checkpoints_is_one_clear_error(tmp_path, capsys, command):
    code, text = run(capsys, *command, tmp_path / "nothing")
    assert code == 2 and text.count("\n") == 1 and "checkpoint" in text


def test_prune_wants_at_least_one(folder, capsys):
    with pytest.raises(SystemExit):
        ckpt.main(["prune", str(folder), "--keep", "0"])
    assert "--keep 0: expected at least 1" in capsys.readouterr().err
