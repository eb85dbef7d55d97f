"""The local disk behind the storage protocol: whole objects or none, names, links, refusals."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from internlm_lite.checkpoint.storage import retry
from internlm_lite.checkpoint.storage.base import UnreadableError
from internlm_lite.checkpoint.storage.local import LocalStorage
from internlm_lite.checkpoint.storage.open import open_storage
from internlm_lite.errors import ConfigError, StorageError


@pytest.fixture
def storage(tmp_path: Path) -> LocalStorage:
    return LocalStorage(tmp_path / "save")


def test_put_read_list_delete(storage: LocalStorage) -> None:
    assert storage.list("") == [] and storage.size("a/b") is None
    assert storage.put("a/b", [b"12", memoryview(b"345"), b""]) == 5
    storage.put("c", [])
    assert storage.read("a/b", 5) == b"12345" and storage.size("c") == 0
    buffer = bytearray(3)
    storage.read_into("a/b", 1, memoryview(buffer))
    assert bytes(buffer) == b"234"
    assert [(entry.key, entry.size) for entry in storage.list("")] == [("a/b", 5), ("c", 0)]
    assert [entry.key for entry in storage.list("a")] == ["a/b"]
    storage.delete("c")
    storage.delete("c")
    storage.delete_folder("a")
    storage.delete_folder("a")
    assert storage.list("") == []


def test_put_if_absent_keeps_the_first(storage: LocalStorage) -> None:
    assert storage.put_if_absent("commits/x", b"one")
    assert not storage.put_if_absent("commits/x", b"two")
    assert storage.read("commits/x", 10) == b"one"
    assert os.listdir(storage.root / "commits") == ["x"]


def test_put_if_absent_without_hard_links(storage: LocalStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    assert storage.put_if_absent("x", b"one") and not storage.put_if_absent("x", b"two")


def after(name: str, number: int, times: int = 1) -> Callable[..., Any]:
    """os.`name` that does its work and reports a failure all the same, the first `times` times."""
    original, left = getattr(os, name), [number] * times

    def failing(*arguments: Any, **named: Any) -> Any:
        found = original(*arguments, **named)
        if left:
            raise OSError(left[0], os.strerror(left.pop()))
        return found

    return failing


def use(storage: LocalStorage) -> None:
    """Every operation, with what must come of it."""
    assert storage.put("data/x/a", [b"12", b"345"]) == 5 and storage.size("data/x/a") == 5
    assert storage.put_if_absent("commits/x", b"one") and not storage.put_if_absent("commits/x", b"two")
    assert storage.replace("commits/x", b"one", b"two") and not storage.replace("commits/x", b"one", b"three")
    assert storage.read("commits/x", 9) == b"two"
    assert [entry.key for entry in storage.list("")] == ["commits/x", "data/x/a"]
    storage.sweep(0)
    storage.delete("commits/x")
    storage.delete_folder("data")
    assert storage.list("") == []


UNKNOWN = ("EINVAL", "ENOTSUP", "EOPNOTSUPP", "ENOSYS", "EBADF")


@pytest.mark.parametrize("error", UNKNOWN)
@pytest.mark.parametrize("call", ["posix_fadvise", "fsync"])
def test_what_a_file_system_does_not_know_is_left_out(
    storage: LocalStorage, monkeypatch: pytest.MonkeyPatch, call: str, error: str
) -> None:
    """A hint, or the flush of a folder. That of a file must succeed."""
    original = getattr(os, call)

    def unknown(descriptor: int, *arguments: int) -> None:
        if call == "fsync" and stat.S_ISREG(os.fstat(descriptor).st_mode):
            return original(descriptor)
        raise OSError(getattr(errno, error), error)

    monkeypatch.setattr(os, call, unknown)
    use(storage)


@pytest.mark.parametrize(("call", "error"), [("link", "EEXIST"), ("rename", "ENOENT")])
def test_lost_answers_of_nfs(storage: LocalStorage, monkeypatch: pytest.MonkeyPatch, call: str, error: str) -> None:
    """The work was done, the answer was lost, and the request that was sent again met what it had done."""
    monkeypatch.setattr(os, call, after(call, getattr(errno, error), times=2))
    use(storage)


CALLS = ("open", "close", "fstat", "fsync", "link", "lstat", "mkdir", "preadv", "rename", "rmdir", "stat", "unlink")


@pytest.mark.parametrize("error", ["EIO", "ESTALE", "ETIMEDOUT"])
@pytest.mark.parametrize("call", CALLS)
def test_passing_errors_are_ridden_out(
    storage: LocalStorage, monkeypatch: pytest.MonkeyPatch, call: str, error: str
) -> None:
    """They are reported after the call was made, as by a file server: the next attempt finds what it did."""
    monkeypatch.setattr(retry, "_FIRST_PAUSE", 0.001)
    monkeypatch.setattr(os, call, after(call, getattr(errno, error), times=2))
    use(storage)


def test_lasting_errors_end_at_the_deadline(
    storage: LocalStorage, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    storage.deadline_seconds = 0.5
    storage.put("x", [b"1"])
    monkeypatch.setattr(os, "fsync", after("fsync", errno.ESTALE, times=1000))
    with pytest.raises(StorageError, match=r"cannot write .*the file server forgot it: .*; tried \d+ times in 0 s"):
        storage.put("a/b", [b"1"])
    assert "trying again for up to" in caplog.text and os.listdir(storage.root) == ["x"]
    monkeypatch.setattr(os, "preadv", after("preadv", errno.EIO, times=1000))
    with pytest.raises(UnreadableError, match=r"the medium failed.*tried \d+ times"):
        storage.read("x", 1)


def test_a_source_that_cannot_be_read_again_is_tried_once(
    storage: LocalStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "rename", after("rename", errno.EIO))
    with pytest.raises(StorageError, match=r"the medium failed\)$"):
        storage.put("x", (letter for letter in (b"1", b"2")))


@pytest.mark.parametrize(
    "key", ["", "/etc/x", "../x", "a/../x", "a//b", ".hidden", "a/.tmp-1", "a b", "é", "a\n", "a" * 201]
)
def test_bad_keys_are_refused(storage: LocalStorage, key: str) -> None:
    for attempt in (lambda: storage.put(key, [b"1"]), lambda: storage.read(key, 9), lambda: storage.delete(key)):
        with pytest.raises(StorageError, match="no name for a stored object"):
            attempt()


def test_symbolic_links_are_refused(storage: LocalStorage, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "x").write_bytes(b"secret")
    storage.put("a/b", [b"1"])
    (storage.root / "link").symlink_to(outside)
    (storage.root / "a/x").symlink_to(outside / "x")
    for key in ("link/x", "a/x"):
        with pytest.raises(StorageError, match="symbolic link"):
            storage.read(key, 100)
        with pytest.raises(StorageError, match="symbolic link"):
            storage.put(key, [b"2"])
    with pytest.raises(StorageError, match="symbolic link"):
        storage.delete_folder("link")
    assert (outside / "x").read_bytes() == b"secret"
    assert "link/x" not in [entry.key for entry in storage.list("")]


def test_bad_objects_are_told_from_bad_storage(storage: LocalStorage, tmp_path: Path) -> None:
    storage.put("a", [b"123"])
    with pytest.raises(UnreadableError, match="ends at byte 3, expected 4"):
        storage.read_into("a", 1, memoryview(bytearray(3)))
    with pytest.raises(UnreadableError, match="missing"):
        storage.read("missing", 9)
    with pytest.raises(UnreadableError, match="at most 2"):
        storage.read("a", 2)
    os.mkfifo(storage.root / "pipe")
    with pytest.raises(UnreadableError, match="not a regular file"):
        storage.read("pipe", 9)


class _KilledError(BaseException):
    pass


def test_interrupted_put_leaves_nothing(storage: LocalStorage) -> None:
    def chunks() -> Iterator[bytes]:
        yield b"half"
        raise _KilledError

    with pytest.raises(_KilledError):
        storage.put("a/b", chunks())
    assert os.listdir(storage.root / "a") == []


def test_sweep_removes_old_leftovers_only(storage: LocalStorage) -> None:
    storage.put("data/x/a", [b"1"])
    old, new = storage.root / "data/x/.tmp-old", storage.root / "data/x/.tmp-new"
    empty = storage.root / "data/y"
    empty.mkdir()
    for path in (old, new):
        path.write_bytes(b"1")
    for path in (old, empty):
        os.utime(path, (time.time() - 100, time.time() - 100))
    assert [entry.key for entry in storage.list("")] == ["data/x/a"]
    storage.sweep(50)
    assert not old.exists() and not empty.exists() and new.exists() and (storage.root / "data/x/a").exists()


def test_sweep_leaves_alone_what_is_not_the_runs(storage: LocalStorage, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    foreign = [storage.root / "notes/mine", storage.root / "data/x/deeper", storage.root / "data/link", outside / "y"]
    ours = [storage.root, storage.root / "commits", storage.root / "data/x", storage.root / "probe-0"]
    (outside / "y").mkdir(parents=True)
    for folder in (*ours, *foreign[:2]):
        folder.mkdir(parents=True, exist_ok=True)
    (storage.root / "data/link").symlink_to(outside)
    for folder in (*ours, *foreign):
        (folder / ".tmp-old").write_bytes(b"1")
        os.utime(folder / ".tmp-old", (0, 0))
    (empty := storage.root / "notes/empty").mkdir()
    os.utime(empty, (0, 0))
    storage.sweep(50)
    assert empty.is_dir() and all((folder / ".tmp-old").exists() for folder in foreign)
    assert not any((folder / ".tmp-old").exists() for folder in ours)


def test_path_below_a_file_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        StorageError, match=r"cannot write .*file/save/a: Not a directory \(a part of the path is a file"
    ):
        LocalStorage(tmp_path / "file/save").put("a", [b"1"])


def test_folder_nobody_can_make_is_a_clear_error() -> None:
    with pytest.raises(StorageError, match="cannot write local:/proc/nothing/a"):
        LocalStorage(Path("/proc/nothing")).put("a", [b"1"])


def test_full_disk_is_a_clear_error_and_leaves_nothing(tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", f"disk-{os.getpid()}", str(small)]
    mounted = subprocess.run(mount, capture_output=True)
    if mounted.returncode:
        pytest.skip("needs the right to mount a small tmpfs")
    try:
        storage = LocalStorage(small)
        storage.put("a", [b"1" * 20_000])
        with pytest.raises(StorageError, match="the disk is full"):
            storage.put("b", [b"2" * 40_000, b"3" * 40_000])
        assert os.listdir(small) == ["a"]
        storage.put("c", [b"2" * 20_000])
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_open_storage_reads_the_spellings_of_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for where in (f"local:{tmp_path}/a", f"{tmp_path}/a", "a", "local:a"):
        assert open_storage(where).name == f"local:{tmp_path}/a"
    for where in ("", "local:", "gs://bucket/a", "boto:x"):
        with pytest.raises(ConfigError, match="expected `local:PATH`"):
            open_storage(where)


def test_put_is_durable_before_it_is_visible(storage: LocalStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data flushed, then renamed, then the folder flushed; made folders are flushed into their parents first."""
    calls: list[str] = []
    fsync, rename, link = os.fsync, os.rename, os.link

    def watched_fsync(descriptor: int) -> None:
        calls.append(f"flush {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name[:5]}")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "rename", lambda a, b: (calls.append(f"rename {b.name}"), rename(a, b)))
    monkeypatch.setattr(os, "link", lambda a, b: (calls.append(f"link {b.name}"), link(a, b)))
    storage.put("data/x", [b"1"])
    assert calls[-4:] == ["flush save", "flush .tmp-", "rename x", "flush data"]
    calls.clear()
    storage.put_if_absent("data/y", b"1")
    assert calls == ["flush .tmp-", "link y", "flush data"]


def test_replace_compares_and_swaps(storage: LocalStorage) -> None:
    assert not storage.replace("x", b"", b"new") and storage.size("x") is None
    storage.put("x", [b"one"])
    for other in (b"", b"on", b"one more", b"two"):
        assert not storage.replace("x", other, b"new")
    assert storage.replace("x", b"one", b"two") and storage.read("x", 9) == b"two"
    assert not storage.replace("x", b"one", b"three")
    assert os.listdir(storage.root) == ["x"]


def test_of_many_that_replace_one_object_one_wins(storage: LocalStorage) -> None:
    for turn in range(20):
        storage.put("x", [b"old"])
        with ThreadPoolExecutor(4) as pool:
            won = list(pool.map(lambda n: storage.replace("x", b"old", b"%d" % n), range(4)))
        assert sum(won) == 1 and storage.read("x", 9) == b"%d" % won.index(True), turn


def test_replace_where_the_file_system_has_no_locks(storage: LocalStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    storage.put("x", [b"one"])
    assert storage.replace("x", b"one", b"two") and not storage.replace("x", b"one", b"three")


def test_an_object_that_another_replaces_now_is_left_to_it(storage: LocalStorage) -> None:
    storage.put("x", [b"one"])
    with open(storage.root / "x", "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert not storage.replace("x", b"one", b"two")
    assert storage.replace("x", b"one", b"two")
