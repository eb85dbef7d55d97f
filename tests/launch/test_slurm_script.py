"""What launch/slurm.sh makes of srun's exit codes and of signals, with an srun and a scontrol that do as told."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
from torch.distributed import HashStore

from internlm_lite.runtime.dist_env import DistEnv
from internlm_lite.runtime.rendezvous import _difference, _missing
from tests.cli import ROOT

SRUN = """#!/bin/bash
case " $* " in *" bash -c "*) exit "${CHECK:-0}" ;; esac
echo "$@" >"$HERE/called"
[ -z "${SAYS:-}" ] || echo "$SAYS" >>"$HERE/slurm-7/rank-${RANK:-0}.log"
if [ -n "${WAITS:-}" ]; then
    trap '[ "$CODE" = slow ] || exit "$CODE"' USR1 TERM
    touch "$HERE/waiting"
    while :; do /bin/sleep 0.05; done
fi
exit "$CODE"
"""


SCONTROL = """#!/bin/bash
case $1 in
show) echo "JobState=$(cat "$HERE/state" 2>/dev/null || echo RUNNING)" ;;
*) echo "$@" >>"$HERE/scontrol" ;;
esac
"""


@pytest.fixture
def here(tmp_path: Path) -> Path:
    programs = tmp_path / "programs"
    programs.mkdir()
    texts = {
        "srun": SRUN,
        "scontrol": SCONTROL,
        "sleep": "#!/bin/sh\nexec /bin/sleep 0.05\n",
    }
    texts["squeue"] = '#!/bin/bash\ndate --date "${LEFT:-120} seconds" +%FT%T\n'
    for name, text in texts.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    return tmp_path


def start(here: Path, *arguments: str, **environment: object) -> subprocess.Popen[str]:
    path = f"{here / 'programs'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    own = {"HERE": here, "PATH": path, "REPOSITORY": ROOT, "SLURM_SUBMIT_DIR": here, "SLURM_JOB_ID": 7}
    own |= {"SLURM_JOB_NUM_NODES": 2, "SLURM_NTASKS_PER_NODE": 8, "SLURM_CPUS_PER_TASK": 8, **environment}
    return subprocess.Popen(
        ["bash", str(ROOT / "launch" / "slurm.sh"), *arguments],
        cwd=here,
        env={**os.environ, **{name: str(value) for name, value in own.items()}},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # its children come and go: all are signalled as one group
    )


def run(here: Path, code: int, **environment: object) -> tuple[int, str, bool]:
    """(exit code, what was said, whether the job was requeued)."""
    script = start(here, "config.py", "a.b=c d", CODE=code, **environment)
    return ended(here, script)


def ended(here: Path, script: subprocess.Popen[str]) -> tuple[int, str, bool]:
    output = script.communicate(timeout=60)[0]
    calls = here / "scontrol"
    requeued = calls.exists()
    if requeued:
        assert calls.read_text() == "requeue 7\n"
        calls.unlink()
    return script.returncode, output, requeued


def signalled(here: Path, number: signal.Signals, code: int, step: bool = True) -> tuple[int, str, bool]:
    script = start(here, "config.py", CODE=code, WAITS=1)
    until_it_waits(here)
    if number == signal.SIGTERM and step:  # which Slurm sends it to as well
        os.killpg(script.pid, number)
    else:
        script.send_signal(number)
    return ended(here, script)


def until_it_waits(here: Path) -> None:
    deadline = time.monotonic() + 30
    while not (here / "waiting").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_what_srun_is_told(here: Path):
    assert run(here, 0)[0] == 0
    assert (here / "called").read_text().split() == [
        "--kill-on-bad-exit=1", "--ntasks=16", "--output=./slurm-7/rank-%t.log", "--open-mode=append",
        "--cpus-per-task=8", "python", f"{ROOT}/train.py", "--launcher", "slurm", "--config", "config.py", "a.b=c", "d",
    ]  # fmt: skip
    assert run(here, 0, LOG_FOLDER="logs", SLURM_CPUS_PER_TASK="")[0] == 0
    assert "--output=logs/slurm-7/rank-%t.log" in (here / "called").read_text()
    assert "--cpus-per-task" not in (here / "called").read_text()


@pytest.mark.parametrize(("asked", "nodes", "tasks"), [(16, 2, 16), (16, 1, 8), (4, 2, 4)])
def test_fewer_nodes_than_asked_for_get_fewer_tasks(here: Path, asked: int, nodes: int, tasks: int):
    assert run(here, 0, SLURM_NTASKS=asked, SLURM_JOB_NUM_NODES=nodes)[0] == 0
    assert f"--ntasks={tasks} " in (here / "called").read_text()


@pytest.mark.parametrize(
    ("code", "requeued", "words"),
    [
        (0, False, "job 7: done"),
        (1, True, "code 1: a rank failed; requeued"),
        (2, False, "code 2: see"),
        (3, True, "code 3: stopped; requeued"),
        (4, True, "code 4: a rank hung; requeued"),
        (5, True, "code 5: a rank was lost; requeued"),
        (6, False, "code 6: see ./slurm-7; not requeued"),
        (7, False, "code 7: see"),
        (137, True, "code 137: a rank was killed; requeued"),
    ],
)
def test_exit_codes(here: Path, code, requeued, words):
    found = run(here, code)
    assert (found[0], found[2]) == (code, requeued) and words in found[1]


def test_failures_in_a_row_are_tried_twice_again(here: Path):
    assert [run(here, code)[2] for code in (5, 4, 3, 5, 137)] == [True] * 5, "a save in between starts anew"
    code, output, requeued = run(here, 5)
    assert (code, requeued) == (5, False) and "for the third time; see ./slurm-7; not requeued" in output


def test_only_a_new_checkpoint_makes_a_failure_a_new_one(here: Path):
    """And not that meeting or hanging took long."""
    saved = "saved milestone checkpoint 0000000010-00001.338d2a: 8 KiB on rank 0, 0.2 s"
    assert run(here, 4, SAYS=f"9999-01-01 00:00:00,000 INFO write.py:79 in run -- {saved}")[2]
    assert [run(here, 4, SECONDS=601)[2] for _ in range(3)] == [True, True, False]
    assert run(here, 4, SAYS=f"22:02:13 {saved}")[2]


def test_the_stop_file_ends_a_job(here: Path):
    _, output, requeued = run(here, 3, SAYS="... stopped by stop file with 5 after step 4 of 9: saved; ...")
    assert not requeued and "code 3: stopped by the stop file; not requeued" in output


def test_a_job_that_saves_nothing_is_not_started_again(here: Path):
    _, output, requeued = run(here, 3, SAYS="... stopped by SIGUSR1 after step 4 of 9: nothing saved, because ...")
    assert not requeued and "code 3: stopped, with nothing saved (ckpt.enable_save_ckpt=False); not requ" in output


def test_failed_checks_start_nothing(here: Path):
    assert run(here, 0, CHECK=1)[0] == 2
    assert not (here / "called").exists()


@pytest.mark.parametrize("code", [3, 138])
def test_the_limits_signal_reaches_srun(here: Path, code):
    """138: it came before the ranks listened."""
    assert signalled(here, signal.SIGUSR1, code)[::2] == (code, True)
    assert not (here / "slurm-7" / "failures").exists()


def test_a_save_that_the_limit_would_cut_off_is_left_to_the_next_start(here: Path):
    script = start(here, "config.py", CODE="slow", WAITS=1, LEFT=21)
    until_it_waits(here)
    script.send_signal(signal.SIGUSR1)
    deadline, calls = time.monotonic() + 60, here / "scontrol"
    while not (calls.exists() and calls.read_text().startswith("requeue 7\n")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(script.pid, signal.SIGKILL)  # as requeueing does
    assert "job 7: still saving shortly before the time limit: requeued" in script.communicate(timeout=60)[0]


def test_a_cancelled_job_is_not_requeued(here: Path):
    (here / "state").write_text("CANCELLED")
    code, output, requeued = signalled(here, signal.SIGTERM, 3)
    assert (code, requeued) == (3, False) and "code 3: stopped, and Slurm ends the job" in output


def test_sigterm_of_a_job_that_runs_on_is_a_warning_as_well(here: Path):
    """As of sbatch --signal=B:TERM@120."""
    assert signalled(here, signal.SIGTERM, 3, step=False)[::2] == (3, True)


CAUSE = "rank 2 on node2 failed first (code 2), at step 7, data: DataError: no file"
FULL, COMPACT = "9999-01-01 00:00:00,000 ERROR ending.py:9 in failed -- ", "ERROR 22:02:13 "
"""What stands before a message in either log style."""


@pytest.mark.parametrize("style", [FULL, COMPACT], ids=["full", "compact"])
def test_the_cause_decides_and_not_the_highest_code(here: Path, style: str):
    found = run(here, 5, SAYS=style + CAUSE, RANK=3)
    assert f"job 7: {CAUSE}\n" in found[1] and "code 2: see ./slurm-7; not requeued" in found[1] and not found[2]
    _, output, requeued = run(here, 5)
    assert requeued and CAUSE not in output and "code 5: a rank was lost; requeued" in output, "that start is over"
    code, output, requeued = run(here, 0)
    assert (code, requeued) == (0, False) and output.endswith("job 7: done\n")


def test_a_job_that_is_done_has_no_cause(here: Path):
    code, output, requeued = run(here, 0, SAYS=FULL + CAUSE)
    assert (code, requeued) == (0, False) and CAUSE not in output


@pytest.mark.parametrize("begin", [FULL, COMPACT, ""], ids=["full", "compact", "before the log"])
def test_where_all_ranks_fail_alike_the_first_says_why(here: Path, begin: str):
    why = "NumericsError: step 40: the last 11 updates were left out"
    warned = begin.replace("ERROR", "WARNING") + "wandb: TimeoutError: no answer"
    output = run(here, 7, SAYS=f"{begin}DataError: not the last\n{begin}{why}\n{warned}")[1]
    said = [line.partition("job 7: ")[2] for line in output.splitlines()]
    assert said == [why, "code 7: see ./slurm-7; not requeued"]


PLACE = DistEnv(0, 2, 0, 1, "node1", "slurm", "", "127.0.0.1", 18101)
MISSING = _missing([1], PLACE, timedelta(seconds=8))


@pytest.mark.parametrize(
    "why",
    [
        MISSING,
        "rank 1 on node2 did not reach rank 0 at node1:18101 within 8 s: no answer",
    ],
)
def test_a_rank_that_never_comes_is_lost_and_not_killed(here: Path, why: str):
    for requeued in (True, True, False):
        found = run(here, 143, SAYS=f"{FULL}MeshError: {why}", SECONDS=601)
        assert (found[0], found[2]) == (5, requeued), found
        assert f"job 7: MeshError: {why}\n" in found[1] and "code 5: a rank was lost" in found[1]


def test_a_wrong_config_ends_the_job_though_late_ranks_are_killed(here: Path):
    code, output, requeued = run(here, 143, SAYS="ConfigError: command line: adam.lr: found -1")
    assert (code, requeued) == (2, False) and "code 2: see ./slurm-7; not requeued" in output


def test_a_config_that_is_wrong_on_one_node_ends_the_job(here: Path):
    (here / "slurm-7").mkdir()
    (here / "slurm-7" / "rank-8.log").write_text("")
    script = start(here, "config.py", CODE=143, SAYS=f"{FULL}MeshError: {MISSING}", WAITS=1)
    until_it_waits(here)
    (here / "slurm-7" / "rank-8.log").write_text("rank 8 on node2: ConfigError: config.py:3: adam.lr: found -1\n")
    script.send_signal(signal.SIGUSR1)
    code, output, requeued = ended(here, script)
    assert (code, requeued) == (2, False) and "rank 8 on node2: ConfigError: config.py:3" in output


def test_ranks_that_were_not_started_alike_end_the_job(here: Path):
    came = [{"digest": digest, "host": f"node{digest}"} for digest in "12"]
    store = HashStore()
    store.set("fingerprint/1", '{"seed": "2"}')
    why = _difference(came, store, {"seed": "1"})
    assert "seed is 2, expected 1" in why
    code, output, requeued = run(here, 143, SAYS=f"{FULL}MeshError: {why}", SECONDS=601)
    assert (code, requeued) == (2, False) and f"job 7: MeshError: {why}\n" in output


def test_a_job_whose_end_slurm_does_not_tell_is_not_cut_short(here: Path):
    (here / "programs" / "squeue").write_text("#!/bin/bash\necho N/A\n")
    code, output, requeued = signalled(here, signal.SIGUSR1, 3)
    assert (code, requeued) == (3, True) and "still saving" not in output


def test_of_a_job_array_one_element_is_requeued(here: Path):
    script = start(here, "config.py", CODE=5, SLURM_ARRAY_JOB_ID=6, SLURM_ARRAY_TASK_ID=1)
    assert "requeued" in script.communicate(timeout=60)[0]
    assert (here / "scontrol").read_text() == "requeue 6_1\n"
