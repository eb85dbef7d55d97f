"""Clocks, folders and the text, with two ranks as threads on one store."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import HashStore

from internlm_lite.apps.doctor import clocks, probe_folders
from internlm_lite.apps.doctor.bandwidth import AllReduceSpeed
from internlm_lite.apps.doctor.diagnose import Finding, diagnose_folder
from internlm_lite.apps.doctor.examine import Examination
from internlm_lite.apps.doctor.exchange import Exchange
from internlm_lite.apps.doctor.render_findings import findings_text, last_line, spans
from internlm_lite.errors import PeerLostError
from internlm_lite.runtime.dist_env import common_variables, read_dist_env
from tests.apps.doctor.test_diagnose import info

MAIN = read_dist_env({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1",
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"})  # fmt: skip
OTHER = replace(MAIN, rank=1, hostname="other")


@pytest.fixture
def pair() -> tuple[Exchange, Exchange]:
    """Of two hosts."""
    store = HashStore()
    return tuple(Exchange(store, dist_env, timedelta(seconds=20)) for dist_env in (MAIN, OTHER))


def both(*calls: Callable[[], Any]) -> list[Any]:
    with ThreadPoolExecutor(2) as pool:
        return [future.result(60) for future in [pool.submit(call) for call in calls]]


def test_a_clock_that_is_five_seconds_ahead(pair):
    main, other = pair

    def answer() -> None:
        for n in range(clocks.ROUNDS):
            other.receive(f"clock/1/{n}/asked")
            other.send(f"clock/1/{n}/answer", time.time() + 5)

    offset = both(lambda: clocks.clock_offsets(main, [1]), answer)[0][1]
    assert abs(offset.seconds - 5) <= offset.error + 0.01


def test_a_clock_that_is_right(pair):
    main, other = pair
    true, nothing = both(lambda: clocks.clock_offsets(main, [1]), lambda: clocks.clock_offsets(other, [1]))
    assert abs(true[1].seconds) <= true[1].error + 0.01 and nothing == {}


def test_who_never_answers_is_named():
    lonely = Exchange(HashStore(), MAIN, timedelta(seconds=0.2))
    with pytest.raises(PeerLostError, match="nothing from rank 1 for"):
        lonely.gather("info", {})


def test_the_same_folder_and_another(pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Of two ranks with one process id, as in containers on two hosts."""
    monkeypatch.setattr(probe_folders, "PROBE_BYTES", 2**20)
    monkeypatch.setattr(probe_folders, "_SEEN_SECONDS", 0.2)
    for name, apart in (("a", "same"), ("b", "other")):
        for folder in {"same", apart}:
            (tmp_path / name / folder).mkdir(parents=True)
        probes = both(
            lambda name=name: probe_folders.probe_folder(pair[0], name, tmp_path / name / "same" / "not" / "yet"),
            lambda name=name, apart=apart: probe_folders.probe_folder(pair[1], name, tmp_path / name / apart),
        )
        assert [probe["shared"] for probe in probes] == [True, apart == "same"]
        assert probes[0]["path"] == str(tmp_path / name / "same")
        assert all(probe["write_bytes_per_second"] > 0 and probe["free_bytes"] > 0 for probe in probes)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()], "nothing is left"


def test_a_folder_that_cannot_be_written(tmp_path: Path):
    (file := tmp_path / "file").touch()
    (link := tmp_path / "link").symlink_to("nowhere")
    for folder, problem in (
        (Path("/proc/foo"), "/proc: "),
        (file, f"{file}: a file, expected a folder"),
        (file / "ckpts", f"{file}: a file, expected a folder"),
        (link, f"{link}: a dangling link, expected a folder"),
    ):
        alone = Exchange(HashStore(), replace(MAIN, world_size=1), timedelta(seconds=5))
        found = probe_folders.probe_folder(alone, "x", folder)
        assert found["problem"].startswith(problem) and found["write_bytes_per_second"] is None
        assert len(list(diagnose_folder("x", [found]))) == 1, "no free space is no second finding"


def test_variables_are_shown_without_secrets():
    environ = {
        "NCCL_DEBUG": "INFO", "AWS_SECRET_ACCESS_KEY": "hidden1", "S3_ACCESS_KEY_ID": "hidden2", "HF_TOKEN": "hidden3",
        "https_proxy": "http://me:hidden4@proxy", "NCCL_SOME_TOKEN": "hidden5", "HOME": "/root", "OMP_NUM_THREADS": "8",
        "WANDB_API_KEY": "hidden6", "CUDA_VISIBLE_DEVICES": "3", "MY_PASSWORD": "hidden7",
        "UCX_NET": "x://me:hidden8@y",
    }  # fmt: skip
    found = common_variables(environ)
    assert "hidden" not in str(found)
    assert found["NCCL_DEBUG"] == "INFO" and found["OMP_NUM_THREADS"] == "8"
    assert found["HF_TOKEN"] == "set" and found["https_proxy"] == "set" and found["NCCL_SOME_TOKEN"] == "***"
    assert not {"HOME", "CUDA_VISIBLE_DEVICES", "MY_PASSWORD"} & set(found)


def test_the_text():
    report = Examination(MAIN, [info(rank) for rank in range(4)])
    report.reduced = AllReduceSpeed("nccl", 2**28, 0.001, 4.0e11)
    assert last_line(report) == (
        "4 ranks on 2 hosts (RANK=0 is set): nothing differs, nothing is wrong; "
        "all-reduce of 256.00 MiB over nccl: 400.00 GB/s"
    )
    report.findings = [
        Finding("versions.torch", "", {"2.13.0": (0, 1, 3), "2.9": (2,)}, "fix it"),
        Finding("limits.open_files", "256 open files", {"256 open files": (0, 1)}, "raise it"),
    ]
    assert findings_text(report, report.findings).splitlines() == [
        "DIFFERS  versions.torch",
        "           2.13.0   [ranks 0-1 3 on a b]",
        "           2.9      [rank 2 on b]",
        "           -> fix it",
        "WRONG    limits.open_files: 256 open files   [ranks 0-1 on a]",
        "           -> raise it",
    ]
    assert ": 2 things to fix;" in last_line(report)
    assert spans([0]) == "0" and spans([0, 1, 2, 5, 7, 8]) == "0-2 5 7-8"
