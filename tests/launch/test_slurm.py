"""train.py under a real Slurm: four ranks on two nodes train, save, are preempted, put back, and go on."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from tests import cli
from tests.cli import ROOT
from tests.launch.conftest import prepare
from tests.launch.curves import joined_curve
from tests.slurmlab import SlurmLab

CPU_BATCH = ["--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=0", "--cpus-per-task=1", "--time=10"]
"""sbatch options for launch/slurm.sh on nodes without GPUs."""
TRAIN = ["python", str(ROOT / "train.py"), "--config", "config.py"]


def await_line(log: Path, text: str, job: str, slurm: SlurmLab, times: int = 1) -> None:
    deadline = time.monotonic() + 90
    while (log.read_text() if log.exists() else "").count(text) < times:
        ended = slurm.job(job).get("JobState") in ("FAILED", "COMPLETED", "CANCELLED")
        assert time.monotonic() < deadline and not ended, f"{slurm.job(job)}\n{texts(log.parent.parent)}"
        time.sleep(0.05)


def texts(folder: Path) -> str:
    """All logs of a folder's jobs."""
    return "\n".join(f"--- {file}\n{file.read_text()[-3000:]}" for file in sorted(folder.rglob("*.log")))


def submit(slurm: SlurmLab, folder: Path, *overrides: str, **environment: str) -> str:
    exported = ",".join(["ALL", f"REPOSITORY={ROOT}", *(f"{name}={value}" for name, value in environment.items())])
    script = str(ROOT / "launch" / "slurm.sh")
    return slurm.submit(*CPU_BATCH, f"--export={exported}", script, "config.py", *overrides, folder=folder)


def go_on_until_told(folder: Path) -> None:
    """Along the curve of 60 steps, and beyond: to the number in the file `steps` when the ranks start."""
    config = (folder / "config.py").read_text()
    told = config.replace("total_steps=STEPS, train_folder", "total_steps=int(open('steps').read()), train_folder")
    assert told != config
    (folder / "config.py").write_text(told)
    (folder / "steps").write_text("100000")


def some_more(folder: Path) -> None:
    """Steps, to the end."""
    (folder / "steps").write_text(str(len(joined_curve(folder)) + 20))


@pytest.fixture(scope="module")
def uninterrupted(slurm: SlurmLab, tmp_path_factory: pytest.TempPathFactory):
    """The folder of a run of four ranks on two nodes, to its end, and what srun showed."""
    folder = prepare(tmp_path_factory.mktemp("uninterrupted"))
    done = slurm.run("srun", "-N", "2", "-n", "4", "--ntasks-per-node=2", *TRAIN, folder=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done.stdout


def test_srun_gives_the_curve_of_one_process(slurm: SlurmLab, uninterrupted, folder: Path):
    ranks, shown = uninterrupted
    assert "a task of srun: SLURM_PROCID=0 is set" in shown
    assert "data parallel size: 4" in shown and "is bound to host:node1" in shown
    assert "saved final checkpoint" in shown and list((ranks / "saves" / "commits").glob("0000000060-*.json"))
    single = cli.run("train.py", "--config", "config.py", "MICRO_NUM=8", folder=folder)
    assert single.code == 0, single.output
    for ours, theirs in zip(joined_curve(ranks), joined_curve(folder), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-9)


def test_preempted_and_requeued_gives_the_same_curve(slurm: SlurmLab, uninterrupted, folder: Path):
    go_on_until_told(folder)
    job = submit(slurm, folder)
    log = folder / f"slurm-{job}" / "rank-0.log"
    await_line(log, "step=9 ", job, slurm)
    assert slurm.run("scancel", "--signal=TERM", job).returncode == 0
    slurm.await_state(job, "PENDING")
    some_more(folder)
    slurm.start_now(job)
    ended = slurm.await_end(job)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("COMPLETED", "0:0", "1"), texts(folder)
    assert "code 3: stopped; requeued" in (folder / f"slurm-{job}.log").read_text()
    assert sorted(file.name for file in log.parent.iterdir()) == [f"rank-{rank}.log" for rank in range(4)]
    assert log.read_text().count("saved rescue checkpoint") == 1
    found, whole = joined_curve(folder), joined_curve(uninterrupted[0])
    assert found[: len(whole)] == whole[: len(found)], "to the bit"
    assert slurm.processes() == {}


def test_a_node_that_is_missing_after_a_requeue_is_done_without(slurm: SlurmLab, uninterrupted, folder: Path):
    go_on_until_told(folder)
    job = submit(slurm, folder)
    await_line(folder / f"slurm-{job}" / "rank-0.log", "step=9 ", job, slurm)
    slurm.run("scontrol", "update", "NodeName=node2", "State=DRAIN", "Reason=test")
    try:
        assert slurm.run("scancel", "--signal=TERM", job).returncode == 0
        slurm.await_state(job, "PENDING")
        some_more(folder)
        assert slurm.run("scontrol", "update", f"JobId={job}", "NumNodes=1", "NumTasks=2").returncode == 0
        slurm.start_now(job)
        ended = slurm.await_end(job)
    finally:
        slurm.run("scontrol", "update", "NodeName=node2", "State=RESUME")
    assert (ended["JobState"], ended["NumNodes"], ended["Restarts"]) == ("COMPLETED", "1", "1"), texts(folder)
    assert "data.micro_num=4 instead of 2: with 2 data-parallel ranks now" in texts(folder)
    for ours, theirs in zip(joined_curve(folder), joined_curve(uninterrupted[0]), strict=False):
        assert ours == pytest.approx(theirs, rel=1e-9)


def test_a_killed_rank_is_requeued_and_a_cancelled_job_is_not(slurm: SlurmLab, folder: Path):
    job = submit(slurm, folder, "STEPS=100000")
    log = folder / f"slurm-{job}" / "rank-0.log"
    await_line(log, "step=5 ", job, slurm)
    victim = next(pid for pid, command in slurm.processes().items() if "train.py" in command and is_rank(pid, 2))
    os.kill(victim, 9)
    slurm.start_now(job)
    text = (folder / f"slurm-{job}.log").read_text()
    assert "rank 2 on node2 failed first (code 5), at step" in text and "code 5: a rank was lost; requeued" in text, (
        text
    )
    told = json.loads((folder / "RUN" / "launch" / "latest" / "FAILED.json").read_text())
    assert (told["cause"]["rank"], told["cause"]["kind"]) == (2, "lost"), told
    assert (folder / f"slurm-{job}" / "failures").read_text() == "5\n"
    await_line(log, "step=0 ", job, slurm, times=2)
    slurm.run("scancel", job)
    assert slurm.await_end(job)["JobState"] == "CANCELLED"
    slurm.until_quiet()
    assert slurm.job(job)["JobState"] == "CANCELLED" and slurm.processes() == {}


def test_the_stop_file_ends_the_job(slurm: SlurmLab, folder: Path):
    (folder / "stop").write_text("5")
    job = submit(slurm, folder, "STEPS=100000", "ckpt.stop_file_path=stop")
    ended = slurm.await_end(job)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "3:0", "0"), texts(folder)
    assert "code 3: stopped by the stop file; not requeued" in (folder / f"slurm-{job}.log").read_text()


def is_rank(pid: int, rank: int) -> bool:
    command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    return command[0].endswith(b"python") and f"SLURM_PROCID={rank}".encode() in (
        Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    )


def test_ranks_that_stop_are_not_killed_by_the_first_that_has_ended(slurm: SlurmLab, folder: Path):
    ending = ["python", "-m", "tests.launch.ending"]
    done = slurm.run("srun", "--kill-on-bad-exit=1", "-N", "2", "-n", "2", *ending, folder=folder, PYTHONPATH=str(ROOT))
    assert done.returncode == 3, done.stdout + done.stderr
    assert "rank 0 ends" in done.stdout


@pytest.mark.parametrize(
    ("config", "environment", "words"),
    [
        ("absent.py", {}, "node node2: found no config absent.py in"),
        (
            "config.py",
            {"REPOSITORY": "/absent"},
            "node node1: found no train.py in /absent: call sbatch in the repository",
        ),
    ],
)
def test_what_is_missing_is_said_before_the_start(slurm, folder: Path, config, environment, words):
    exported = ",".join(["ALL", *(f"{name}={value}" for name, value in {"REPOSITORY": ROOT, **environment}.items())])
    script = str(ROOT / "launch" / "slurm.sh")
    job = slurm.submit(*CPU_BATCH, f"--export={exported}", script, config, folder=folder)
    ended = slurm.await_end(job)
    assert (ended["JobState"], ended["ExitCode"]) == ("FAILED", "2:0")
    text = (folder / f"slurm-{job}.log").read_text()
    assert words in text and "not started, see above" in text
