"""Trouble with the storage of a run that trains: it goes on, tells, and saves again as soon as it can."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from internlm_lite.checkpoint import manager
from internlm_lite.checkpoint.admin.verify import damages_of
from internlm_lite.checkpoint.format.catalog import committed
from internlm_lite.checkpoint.format.manifest import Name
from internlm_lite.checkpoint.save import commit
from internlm_lite.checkpoint.storage.local import LocalStorage
from internlm_lite.errors import CheckpointError
from internlm_lite.mesh.mesh import single_process_mesh
from internlm_lite.monitor.jsonl import read_objects
from tests.cli import ROOT, ended, start
from tests.corpus import write_corpus
from tests.faults.trouble import STEPS, assert_sound, config_for, fill, remount, small_disk, trained
from tests.train.runs import curve, run_training


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("trouble") / "corpus")


@pytest.fixture(scope="module")
def untroubled(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[float, float]]:
    """Loss and gradient norm of every step when nothing is saved."""
    folder = tmp_path_factory.mktemp("untroubled")
    return curve(run_training(single_process_mesh(), config_for(corpus, None), folder))


def full(disk: Path) -> tuple[Callable[[], object], Callable[[], object]]:
    return lambda: fill(disk), (disk / "filler").unlink


def full_halfway(disk: Path) -> tuple[Callable[[], object], Callable[[], object]]:
    return lambda: fill(disk, left_bytes=200_000), (disk / "filler").unlink


def read_only(disk: Path) -> tuple[Callable[[], object], Callable[[], object]]:
    return lambda: remount(disk, "ro"), lambda: remount(disk, "rw")


@pytest.mark.parametrize(
    ("trouble", "words"),
    [(full, "the disk is full"), (full_halfway, "the disk is full"), (read_only, "the file system is read-only")],
)
def test_disk_temporarily_full_or_read_only(
    trouble: Any, words: str, corpus: Path, untroubled: list[tuple[float, float]], tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    with small_disk(disk, "16m"):
        break_it, mend_it = trouble(disk)
        told = trained(config_for(corpus, disk), tmp_path / "run", {3: break_it, 7: mend_it})
        assert told.curve == untroubled
        assert told.done == [2, 8, 10] and set(told.alarms) == {4, 6}
        assert all(words in why for why in told.alarms.values()), told.alarms
        assert_sound(disk / "snapshots", [10, 8])
        assert_sound(disk / "saves", [STEPS])


def lost(disk: Path) -> tuple[Callable[[], object], Callable[[], object]]:
    """As when a mount is lost: an empty folder, which can be written, in place of the storage."""

    def come_back() -> None:
        shutil.rmtree(disk)
        (disk.parent / "away").rename(disk)

    def go() -> None:
        disk.rename(disk.parent / "away")
        disk.mkdir()

    return go, come_back


def replaced(disk: Path) -> tuple[Callable[[], object], Callable[[], object]]:
    """A file in place of the folder."""

    def come_back() -> None:
        disk.unlink()
        (disk.parent / "away").rename(disk)

    return lambda: (disk.rename(disk.parent / "away"), disk.write_text("")), come_back


@pytest.mark.parametrize("trouble", [lost, replaced])
def test_storage_temporarily_unreachable(
    trouble: Any, corpus: Path, untroubled: list[tuple[float, float]], tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    go, come_back = trouble(disk)
    told = trained(config_for(corpus, disk), tmp_path / "run", {3: go, 7: come_back})
    assert told.curve == untroubled
    assert told.done == [2, 8, 10] and set(told.alarms) == {4, 6}
    assert_sound(disk / "snapshots", [10, 8])
    assert_sound(disk / "saves", [STEPS])


def test_storage_unreachable_at_first_save_after_resume(corpus: Path, tmp_path: Path) -> None:
    """Its next checkpoint is still newer than all there were before."""
    disk, config = tmp_path / "disk", None
    config = config_for(corpus, disk, checkpoint_every=3)
    trained(config, tmp_path / "first", {})
    go, come_back = lost(disk)
    values = config.model_dump()
    values["ckpt"]["allow_changed_schedule"] = True
    values["data"]["total_steps"] = values["lr_scheduler"]["total_steps"] = STEPS + 6
    longer = type(config).model_validate(values)
    told = trained(longer, tmp_path / "second", {STEPS + 1: go, STEPS + 2: come_back})
    assert set(told.alarms) == {STEPS + 2} and told.done == [STEPS + 3, STEPS + 4]
    assert_sound(disk / "snapshots", [STEPS + 4, 10])
    assert_sound(disk / "saves", [STEPS + 6, STEPS + 3, STEPS, 9, 6, 3])


def test_full_staging_folder(corpus: Path, untroubled: list[tuple[float, float]], tmp_path: Path) -> None:
    disk, staging = tmp_path / "disk", tmp_path / "staging"
    with small_disk(staging, "256k"):
        fill(staging)
        config = config_for(corpus, disk, async_upload_tmp_folder=str(staging))
        told = trained(config, tmp_path / "run", {})
        assert [path.name for path in staging.iterdir()] == ["filler"]
    assert told.curve == untroubled
    assert told.done == [2, 4, 6, 8, 10] and not told.alarms
    assert "cannot take" in told.log and "ordinary memory is used" in told.log
    assert_sound(disk / "snapshots", [10, 8])


@pytest.mark.parametrize("in_background", [True, False])
@pytest.mark.parametrize(
    "error", [MemoryError("no room"), CheckpointError("not stored exactly once"), KeyError("ETag")]
)
def test_failed_save_is_an_alarm(
    error: Exception,
    in_background: bool,
    corpus: Path,
    untroubled: list[tuple[float, float]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original = commit.commit_votes

    def failing(storage: Any, name: Name, *rest: Any) -> Any:
        if name.step == 4:
            raise error
        return original(storage, name, *rest)

    monkeypatch.setattr(commit, "commit_votes", failing)
    disk = tmp_path / "disk"
    told = trained(config_for(corpus, disk, async_upload=in_background), tmp_path / "run", {})
    assert told.curve == untroubled
    assert set(told.alarms) == {4} and str(error) in told.alarms[4]
    assert_sound(disk / "snapshots", [10, 8])
    assert_sound(disk / "saves", [STEPS])


class Slow(LocalStorage):
    """A disk that takes its time."""

    def put(self, key: str, chunks: Iterable[Any]) -> int:
        time.sleep(0.1)
        return super().put(key, chunks)


def test_slow_disk(
    corpus: Path, untroubled: list[tuple[float, float]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = tmp_path / "disk"
    monkeypatch.setattr(manager, "open_storage", lambda folder, s3: Slow(Path(folder.removeprefix("local:"))))
    told = trained(config_for(corpus, disk), tmp_path / "run", {}, patient=False)
    assert told.curve == untroubled and not told.alarms
    assert told.skipped >= 1 and f"({told.skipped} skipped so far)" in told.log
    assert len(told.done) == STEPS // 2 - 1 - told.skipped
    assert_sound(disk / "saves", [STEPS])


def test_full_disk_under_whole_run(tmp_path: Path) -> None:
    """train.py, from its command line to its end by a signal; its disk fills up and is emptied from outside."""
    disk, log = tmp_path / "disk", tmp_path / "output.log"
    with small_disk(disk, "64m"):
        save = ("ckpt.enable_save_ckpt=True", f"ckpt.save_ckpt_folder=local:{disk}/saves", "ckpt.oss_snapshot_freq=5")
        arguments = ("--config", str(ROOT / "configs/tiny.py"), "TOTAL_STEPS=100000", *save)
        run = start("train.py", *arguments, folder=tmp_path, log=log)

        def wait_for(words: str, after: int = 0) -> None:
            deadline = time.monotonic() + 60
            while not log.exists() or words not in log.read_text()[after:]:
                assert run.is_alive() and time.monotonic() < deadline, log.read_text()
                time.sleep(0.01)

        wait_for("saved snapshot checkpoint")
        fill(disk)
        wait_for("ALARM: checkpoint")
        (disk / "filler").unlink()
        wait_for("saved snapshot checkpoint", after=len(log.read_text()))
        os.kill(run.pid, signal.SIGTERM)
        end = ended(run, log)
        assert end.code == 3, end.output
        assert "the disk is full" in end.output and "stopped by SIGTERM" in end.output
        (events,) = (tmp_path / "RUN" / "tiny" / "latest").glob("events.jsonl")
        assert any(event["event"] == "alarm" for event in read_objects(events))
        for folder, kept in ((disk / "saves", 1), (disk / "saves" / "snapshot", 2)):
            names = committed(LocalStorage(folder))
            assert len(names) == len(list((folder / "data").iterdir())) == kept
            assert [str(damage) for name in names for damage in damages_of(LocalStorage(folder), name)] == []
