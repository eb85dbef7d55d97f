"""Checkpoints on S3, saved and resumed by the same manager as on a disk; crashes, damage, secrets. On a real server."""

from __future__ import annotations

import logging
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from internlm_lite.checkpoint.format import catalog
from internlm_lite.checkpoint.manager import CheckpointManager
from internlm_lite.checkpoint.storage.run_lock import Lease
from internlm_lite.checkpoint.storage.s3 import S3Storage
from internlm_lite.config.paths import parse_s3
from internlm_lite.config.schema import S3Config
from internlm_lite.errors import CheckpointError, StorageError
from internlm_lite.mesh.mesh import Mesh, single_process_mesh
from tests.checkpoint.conftest import s3_environment
from tests.checkpoint.pieces import assert_true_values, pieces_of
from tests.s3faults import Fault, FaultProxy
from tests.s3server import ACCESS_KEY, BUCKET, SECRET_KEY, S3Server
from tests.world import run_world

INSECURE = S3Config(insecure=True)
ROOT = Path(__file__).parents[2]
STATE = {"step": 7, "data": {"name": "köln", "none": None}}


def _manager(folder: str, settings: S3Config = INSECURE, **options: Any) -> CheckpointManager:
    return CheckpointManager(folder, single_process_mesh(), s3=settings, **options)


def _save(manager: CheckpointManager, step: int = 7, kind: Any = "snapshot", state: Any = STATE) -> str:
    name = manager.save(step, kind, pieces_of(0, fill=True), state, {"cpu": torch.get_rng_state()})
    assert name is not None
    return name


def _objects(server: S3Server, folder: str) -> list[str]:
    """What lies below a folder, unfinished uploads too."""
    prefix = folder.rpartition("/")[2] + "/"
    client = server.client()
    stored = client.list_objects_v2(Bucket=BUCKET, Prefix=prefix).get("Contents", [])
    uploads = client.list_multipart_uploads(Bucket=BUCKET, Prefix=prefix).get("Uploads", [])
    return sorted(item["Key"].removeprefix(prefix) for item in [*stored, *uploads])


def _change(server: S3Server, folder: str, key: str, data: bytes) -> None:
    server.client().put_object(Bucket=BUCKET, Key=f"{folder.rpartition('/')[2]}/{key}", Body=data)


def test_round_trip_and_the_objects_of_the_protocol(s3_server: S3Server, s3_folder: str) -> None:
    name = _save(_manager(s3_folder))
    assert _objects(s3_server, s3_folder) == [
        f"commits/{name}.json",
        f"data/{name}/manifest.json",
        f"data/{name}/rank-00000.safetensors",
        f"data/{name}/rank-00000.vote.json",
    ]
    pieces = pieces_of(0, fill=False)
    restored = _manager(s3_folder, saving=None).resume(pieces)
    assert restored is not None and restored.found.name == name and restored.state == STATE
    assert_true_values(pieces)
    assert restored.rank_state is not None and torch.equal(restored.rank_state["cpu"], torch.get_rng_state())


def test_an_empty_folder_has_no_checkpoint(s3_server: S3Server, s3_folder: str) -> None:
    assert _manager(s3_folder).resume(pieces_of(0, fill=False)) is None
    assert _objects(s3_server, s3_folder) == []


def test_rotation_and_a_nested_snapshot_folder(s3_server: S3Server, s3_folder: str) -> None:
    manager = _manager(s3_folder, snapshot_folder=s3_folder + "/snapshot")
    kept = [_save(manager, 1, "milestone")]
    kept += [_save(manager, step, "snapshot") for step in (2, 3, 4, 5)][-2:]
    commits = [key for key in _objects(s3_server, s3_folder) if "commits/" in key]
    assert commits == [f"commits/{kept[0]}.json", *(f"snapshot/commits/{name}.json" for name in kept[1:])]
    assert len(_objects(s3_server, s3_folder)) == 12
    restored = manager.resume(pieces_of(0, fill=False))
    assert restored is not None and restored.found.name == kept[2]


def test_open_takes_every_spelling_of_a_checkpoint(s3_folder: str) -> None:
    manager = _manager(f"{s3_folder}/save")
    first, second = _save(manager, 1, "milestone"), _save(manager, 2, "milestone")
    other = _manager(f"{s3_folder}/other", saving=None)
    assert other.open(f"{s3_folder}/save/").name == second
    for path in (f"commits/{first}.json", f"data/{first}", f"data/{first}/", first):
        assert other.open(f"{s3_folder}/save/{path}").name == first, path
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        other.open(f"{s3_folder}/nowhere")


FILES = ("commits/{}.json", "data/{}/manifest.json", "data/{}/rank-00000.vote.json", "data/{}/rank-00000.safetensors")


@pytest.mark.parametrize("file", FILES)
def test_damage_is_found_and_the_checkpoint_before_is_used(s3_server: S3Server, s3_folder: str, file: str) -> None:
    manager = _manager(s3_folder)
    names = [_save(manager, step, "milestone", {"step": step}) for step in (1, 2)]
    key = file.format(names[1])
    good = manager.storage.read(key, 1 << 20)
    rng = random.Random(file)
    for change in ("flip", "flip", "cut", "gone"):
        if change == "gone" and file.startswith("commits"):
            continue  # without its commit it was never there
        place = rng.randrange(len(good))
        flipped = good[:place] + bytes([good[place] ^ 4]) + good[place + 1 :]
        _change(s3_server, s3_folder, key, good[:place] if change == "cut" else flipped)
        if change == "gone":
            manager.storage.delete(key)
        pieces = pieces_of(0, fill=False)
        restored = _manager(s3_folder, saving=None).resume(pieces)
        assert restored is not None and restored.state == {"step": 1}, change
        assert_true_values(pieces)
        (reason,) = restored.found.rejected
        assert key in reason, reason


class _KilledError(BaseException):
    """The process dies here: nothing catches it, nothing is cleaned up."""


class _DyingStorage(S3Storage):
    """Dies before its n-th change."""

    left = 0

    def _count(self) -> None:
        if self.left == 0:
            raise _KilledError
        self.left -= 1

    def put(self, key: str, chunks: Iterable[Any]) -> int:
        self._count()
        return super().put(key, chunks)

    def put_if_absent(self, key: str, data: bytes) -> bool:
        self._count()
        done = super().put_if_absent(key, data)
        self._count()
        return done

    def delete(self, key: str) -> None:
        self._count()
        super().delete(key)

    def delete_folder(self, folder: str) -> None:
        self._count()
        super().delete_folder(folder)


def test_a_crash_at_any_change_leaves_the_old_or_the_new_checkpoint(s3_folder: str) -> None:
    outcomes = []
    for after in range(100):
        root = f"{s3_folder}/{after}"
        manager = _manager(root)
        for step in (1, 2):
            _save(manager, step)
        path = parse_s3(root)
        assert path is not None
        dying = _DyingStorage(path, INSECURE)
        dying.left, manager.folders[0].storage = after, dying
        died = False
        try:
            manager.save(3, "snapshot", pieces_of(0, fill=True), {"step": 3})
        except _KilledError:
            died = True
        pieces = pieces_of(0, fill=False)
        restored = _manager(root, saving=None).resume(pieces)
        assert restored is not None and restored.found.rejected == ()
        assert_true_values(pieces)
        outcomes.append(restored.found.step)
        if not died:
            break
    assert outcomes == sorted(outcomes) and set(outcomes) == {2, 3} and len(outcomes) > 6


WRITER = """
import sys
from internlm_lite.checkpoint.storage.s3 import S3Storage
from internlm_lite.config.paths import parse_s3
from internlm_lite.config.schema import S3Config
storage = S3Storage(parse_s3(sys.argv[1]), S3Config(insecure=True), part_bytes=5 * 1024 * 1024)
def chunks():
    while True:
        print("more", flush=True)
        yield bytes(5 * 1024 * 1024)
storage.put("data/0000000009-00009.abcdef/rank-00000.safetensors", chunks())
"""


def test_a_writer_killed_in_the_middle_leaves_nothing_visible_and_is_swept(
    s3_server: S3Server, s3_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = _manager(s3_folder)
    name = _save(manager)
    writer = subprocess.Popen([sys.executable, "-c", WRITER, s3_folder], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    for _ in range(6):
        assert writer.stdout.readline() == "more\n"
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    time.sleep(1)  # what it sent has been worked off
    orphan = "data/0000000009-00009.abcdef/rank-00000.safetensors"
    assert manager.storage.size(orphan) is None and orphan in _objects(s3_server, s3_folder)
    restored = _manager(s3_folder).resume(pieces_of(0, fill=False))
    assert restored is not None and restored.found.name == name
    monkeypatch.setattr(catalog, "ORPHAN_SECONDS", -60.0)
    _save(_manager(s3_folder), 8)
    assert orphan not in _objects(s3_server, s3_folder)


@pytest.mark.parametrize("match", ["rank-00000.safetensors", "vote.json", "manifest.json", "commits/"])
def test_a_failed_save_leaves_nothing_and_the_next_one_works(
    s3_server: S3Server, s3_folder: str, s3_proxy: FaultProxy, match: str
) -> None:
    folder = s3_folder.replace(s3_server.endpoint, s3_proxy.endpoint)
    manager = _manager(folder, S3Config(insecure=True, deadline_seconds=4))
    first = _save(manager, 1)
    s3_proxy.faults.append(Fault("503", f"PUT .*{match}", times=1000))
    with pytest.raises(StorageError, match="SlowDown"):
        _save(manager, 2)
    s3_proxy.faults.clear()
    assert {key.split("/")[1].removesuffix(".json") for key in _objects(s3_server, s3_folder)} == {first}
    third = _save(manager, 3)
    found = manager.latest()
    assert found is not None and found.name == third


def test_a_background_save_fails_while_s3_is_away_and_the_next_one_works(
    s3_server: S3Server, s3_folder: str, s3_proxy: FaultProxy
) -> None:
    folder = s3_folder.replace(s3_server.endpoint, s3_proxy.endpoint)
    manager = _manager(folder, S3Config(insecure=True, deadline_seconds=4))
    manager.lock()
    try:
        s3_proxy.faults.append(Fault("reset", "PUT .*data", times=1000))
        assert manager.save(1, "snapshot", pieces_of(0, fill=True), {}, wait=False) is not None
        assert manager.finished() is None, "the main thread does not wait for the end, which comes after four seconds"
        saved = manager.wait()
        assert saved is not None and isinstance(saved.error, StorageError)
        s3_proxy.faults.clear()
        second = manager.save(2, "snapshot", pieces_of(0, fill=True), {}, wait=False)
        saved = manager.wait()
        assert saved is not None and saved.error is None and str(saved.name) == second
    finally:
        manager.release()
    assert {key.split("/")[1].removesuffix(".json") for key in _objects(s3_server, s3_folder)} == {second}


def test_two_runs_are_kept_out_of_one_folder(s3_folder: str) -> None:
    storage = _manager(s3_folder).storage
    first, second = (Lease(storage, lease_seconds=30, renew_seconds=0.2) for _ in range(2))
    first.acquire()
    with pytest.raises(StorageError, match=rf"is in use by host .*, pid {os.getpid()}"):
        second.acquire()
    first.release()
    second.acquire()
    second.release()
    assert storage.list("") == []


def test_a_folder_that_cannot_be_written_is_found_at_construction(s3_folder: str, monkeypatch: Any) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
    with pytest.raises(StorageError, match=r"SignatureDoesNotMatch.*change ckpt.save_ckpt_folder"):
        _manager(s3_folder)


def _save_and_resume(mesh: Mesh, folder: str, environ: dict[str, str]) -> str | None:
    os.environ.update(environ)
    manager = CheckpointManager(folder, mesh, s3=INSECURE)
    size = mesh.world.size
    if size == 2:
        manager.save(1, "milestone", pieces_of(mesh.rank, tp=2, fill=True), {"step": 1})
        manager.save(2, "milestone", pieces_of(mesh.rank, zero=2, fill=True), {"step": 2})
    pieces = pieces_of(mesh.rank, tp=size, fill=False)
    restored = manager.resume(pieces)
    assert_true_values(pieces)
    return restored and restored.found.name


def test_two_ranks_save_and_one_resumes(s3_folder: str) -> None:
    first, second = run_world(_save_and_resume, 2, (s3_folder, s3_environment()))
    (alone,) = run_world(_save_and_resume, 1, (s3_folder, s3_environment()))
    assert first == second == alone and alone is not None


def _train(folder: Path, save: str, *more: str) -> subprocess.CompletedProcess[str]:
    keys = {"S3_ACCESS_KEY_ID": ACCESS_KEY, "S3_SECRET_ACCESS_KEY_ID": SECRET_KEY}
    environ = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")} | keys
    environ |= {"AWS_EC2_METADATA_DISABLED": "true", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "train.py", "--config", "configs/tiny.py", "--device", "cpu", "--run-dir", str(folder)]
    command += ["ckpt.enable_save_ckpt=True", f"ckpt.save_ckpt_folder={save}", "ckpt.s3.insecure=True"]
    command += ["ckpt.checkpoint_every=2", "TOTAL_STEPS=6", "ckpt.s3.deadline_seconds=4.0", *more]
    return subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=120)


def test_secrets_appear_nowhere_in_a_run_that_fails(
    tmp_path: Path, s3_server: S3Server, s3_folder: str, s3_proxy: FaultProxy
) -> None:
    """A whole run on S3, keys by InternLM's names; its last saves fail; then everything it wrote is searched."""
    save = s3_folder.replace(s3_server.endpoint, s3_proxy.endpoint)
    s3_proxy.faults += [Fault("reset", "PUT .*0000000002"), Fault("lost", "PUT .*commits/0000000002")]
    s3_proxy.faults += [Fault("503", "PUT .*0000000004", times=1000), Fault("403", "PUT .*0000000006", times=1000)]
    run = _train(tmp_path / "RUN", save)
    assert run.returncode == 6 or "AccessDenied" in run.stdout, run.stdout + run.stderr
    written = {str(path): path.read_bytes() for path in (tmp_path / "RUN").rglob("*") if path.is_file()}
    written |= {"stdout": run.stdout.encode(), "stderr": run.stderr.encode()}
    storage = _manager(s3_folder, saving=None).storage
    written |= {entry.key: storage.read(entry.key, 1 << 30) for entry in storage.list("")}
    assert any("commits/0000000002" in name for name in written), sorted(written)
    assert len(written) > 8
    for name, data in written.items():
        for secret in (ACCESS_KEY, SECRET_KEY, SECRET_KEY.replace("/", "%2F").replace("+", "%2B")):
            assert secret.encode() not in data, name


def test_secrets_are_not_logged_at_any_level(
    s3_server: S3Server, s3_folder: str, s3_proxy: FaultProxy, caplog: pytest.LogCaptureFixture
) -> None:
    s3_proxy.faults += [Fault("503", "PUT "), Fault("lost", "PUT .*commits")]
    with caplog.at_level(logging.DEBUG):
        _save(_manager(s3_folder.replace(s3_server.endpoint, s3_proxy.endpoint)))
    assert "trying again" in caplog.text
    assert ACCESS_KEY not in caplog.text and SECRET_KEY not in caplog.text and "Signature=" not in caplog.text


def test_a_server_that_fell_silent_is_not_asked_for_more(
    s3_server: S3Server, s3_folder: str, s3_proxy: FaultProxy
) -> None:
    folder = s3_folder.replace(s3_server.endpoint, s3_proxy.endpoint)
    manager = _manager(folder, S3Config(insecure=True, deadline_seconds=3))
    manager.lock()
    _save(manager, 0)
    s3_proxy.faults.append(Fault("hang", ".", times=1000))
    begun = len(s3_proxy.seen)
    with pytest.raises(StorageError, match="the server fell silent"):
        _save(manager, 1)
    assert not manager.reachable
    asked = s3_proxy.seen[begun:]
    assert asked and not any(words in request for request in asked for words in ("refused", "DELETE"))
    s3_proxy.faults.clear()
    name = _save(manager, 2)
    assert manager.reachable and manager.latest().name == name, "the next save asks again"
    manager.release()
    assert not any("run.lock" in key for key in _objects(s3_server, s3_folder))


def test_a_save_folder_on_s3_is_searched_with_those_inside_it(s3_folder: str) -> None:
    manager = _manager(s3_folder, snapshot_folder=f"{s3_folder}/snapshot")
    _save(manager, 1, "milestone")
    name = _save(manager, 2)
    pieces = pieces_of(0, fill=False)
    assert _manager(s3_folder, saving=None).load_at(s3_folder, pieces).found.name == name
    assert_true_values(pieces)
