"""The fault table: what goes wrong in a job of several ranks, what it does about it, and how it goes on.

fault                          what happens                                                     within
-----------------------------  ---------------------------------------------------------------  --------------
SIGKILL of one rank            named by the others, code 5; started again: the same bits        2 s
early exit of one rank         named by the others, code 5                                      2 s
SIGSTOP of one rank            named with phase and step, code 4; stacks of the others          time-out + 5 s
a rank hangs in data, forward  named with phase and step, code 4; its own stacks                time-out + 5 s
a rank holds Python's lock     named, ended by a signal; its own stacks; code 4 of the others   time-out + 6 s
exception, out of memory       its own error is the cause, code 1; the others follow, code 5    2 s
SIGTERM, SIGHUP to all         saved, code 3; started again: the same bits                      10 s
port in use                    code 2, with what to do                                          at once
a rank starts late             waited for
a rank never starts            named, code 2                                                    time-out
worlds of different sizes      who is missing, code 2                                           time-out
all ranks suspended for long   go on when they may: the same bits
full disk while a rank hangs   code 4 all the same                                              time-out + 5 s
passing EIO: start, last save  tried again, warned of; the same bits                            1 s
lost answers of NFS            noticed by the link count; a hint that is unknown is left out
killed while it saves          its data go when it is started again on that host                at once
corrupted shard at a restart   the snapshot before it, the same bits
nan in a layer's gradient      left out and counted; the 11th in a row: code 7, snapshots kept  a step
nan in one tensor rank's copy  left out and counted                                             a step
nan or inf in the state        code 7 at the next save, which names the tensor and is not made  the next save
forward pass not finite        left out; never saved, also in fp16, nor at a stop: code 7       11 steps
batches without a label        left out; the 11th in a row: code 2                              11 steps
overflow at the scale's floor  code 7                                                           a step
one flipped bit of a weight    rank named, code 7                                               the next check
a spike                        noted, left out, or rolled back; back too often: code 7          a step
torchrun, a rank is killed     started again by torchrun: the same bits                         15 s

Times are of a quiet machine; `pytest -s` prints those measured. None is asserted: what takes ever so long still ends.
"""

from __future__ import annotations

import signal
import socket
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from internlm_lite.checkpoint.admin.verify import damages_of
from internlm_lite.checkpoint.format.catalog import committed
from internlm_lite.checkpoint.storage.local import LocalStorage
from internlm_lite.monitor.jsonl import read_objects
from tests.faults.trouble import small_disk
from tests.faults.worlds import (
    PATIENCE,
    STEPS,
    Job,
    arguments,
    curve_of,
    damage,
    events,
    final_bits,
    metrics_of,
    report,
    run_folder,
    snapshots,
    torchrun,
)

AT = 33
"""Step of the faults: three after a snapshot."""
SAVED = "ckpt.async_upload=False"
"""That snapshot is there then, however slow the machine."""
HANG = ("--timeout", "4")


def told(what: str, seconds: float, job: Job) -> None:
    codes = [process.exitcode for process in job.ranks.values()]
    print(f"\n{what:50} {seconds:6.1f} s   codes {codes}")


def trained_until(job: Job, step: int) -> float:
    """Wait for that step's line; the clock's time then."""
    deadline = time.monotonic() + PATIENCE
    alive = True
    while not any(line["step"] >= step for line in metrics_of(job.folder)):
        assert alive and time.monotonic() < deadline, job.output()[-6000:]
        time.sleep(0.02)
        alive = any(process.is_alive() for process in job.ranks.values())  # asked before the lines are read
    return time.monotonic()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Any]]:
    """Curve and final bits of two ranks. The second starts late: the first waits for it."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with Job(folder, 2, *arguments(), ranks=[0]) as job:
        time.sleep(3)
        job.start(1)
        job.finish()
    yield curve_of(folder), final_bits(folder)


def started_again(folder: Path, undisturbed: tuple[Any, Any]) -> int:
    """Start the job of two ranks anew: it ends as if nothing had happened. Steps done where it began."""
    begin = time.monotonic()
    with Job(folder, 2, *arguments()) as job:
        trained_until(job, STEPS - 1)
        print(f"{'    started again: at the last step after':50} {time.monotonic() - begin:6.1f} s")
        job.finish()
    assert (curve_of(folder), final_bits(folder)) == undisturbed, "to the bit"
    assert not (run_folder(folder) / "FAILED.json").exists(), "what has gone on has not failed"
    first = events(folder, "start")[-1]["step"]
    assert isinstance(first, int)
    return first


@pytest.mark.parametrize(("size", "culprit_ranks", "how"), [(3, 2, "kill"), (2, 0, "kill"), (2, 1, "exit")])
def test_killed_rank_is_named(size: int, culprit_ranks: int, how: str, undisturbed: Any, tmp_path: Path) -> None:
    with Job(tmp_path, size, *arguments(SAVED), faults=f"{how} {culprit_ranks} {AT}") as job:
        others = [rank for rank in range(size) if rank != culprit_ranks]
        begin = trained_until(job, AT - 1)
        assert job.codes(*others) == [5] * len(others), job.output()[-6000:]
        assert job.codes(culprit_ranks) == [-signal.SIGKILL if how == "kill" else 0]
        told(f"{how} of rank {culprit_ranks} of {size}", time.monotonic() - begin, job)
    cause = report(tmp_path)["cause"]
    assert (cause["rank"], cause["kind"], cause["follows"]) == (culprit_ranks, "lost", False)
    # Gradients are reduced in the backward pass already: the first who misses it may be there, or later.
    assert cause["step"] == AT and cause["phase"] in ("training", "updating")
    assert sorted(other["rank"] for other in report(tmp_path)["others"]) == others
    for rank in others:
        assert (
            f"rank {culprit_ranks} on {cause['host']} failed first (code 5), at step {AT}, {cause['phase']}: lost"
            in job.output(rank)
        )
    if how == "kill" and size == 2:
        newest = snapshots(tmp_path)[0]
        assert newest.step == 30
        damage(tmp_path / "saves" / "snapshot" / newest.folder)
        assert started_again(tmp_path, undisturbed) == 20, "the newest snapshot is corrupted"


@pytest.mark.parametrize(("size", "culprit_ranks"), [(3, 1), (2, 0)])
def test_stopped_rank_is_named(size: int, culprit_ranks: int, tmp_path: Path) -> None:
    with Job(tmp_path, size, *arguments(*HANG), faults=f"stop {culprit_ranks} {AT}") as job:
        others = [rank for rank in range(size) if rank != culprit_ranks]
        begin = trained_until(job, AT - 1)
        codes = job.codes(*others)
        told(f"SIGSTOP of rank {culprit_ranks} of {size}, time-out 4 s", time.monotonic() - begin, job)
        assert 4 in codes and set(codes) <= {4, 5}, job.output()  # 5: saw the first one end
    cause = report(tmp_path)["cause"]
    assert (cause["rank"], cause["kind"], cause["follows"]) == (culprit_ranks, "hang", False), report(tmp_path)
    stacks = [file.name for file in (run_folder(tmp_path) / "logs").glob("*.stacks")]
    assert stacks and all("trainer.py" in (run_folder(tmp_path) / "logs" / file).read_text() for file in stacks)


@pytest.mark.parametrize(("how", "phase", "frame"), [("sleep", "data", "in slow"), ("stuck", "training", "in hidden")])
def test_hanging_rank_is_named_with_stacks(how: str, phase: str, frame: str, tmp_path: Path) -> None:
    with Job(tmp_path, 2, *arguments(*HANG), faults=f"{how} 1 {AT}") as job:
        begin = trained_until(job, AT - 1)
        assert set(job.codes()) <= {4, 5}, job.output()[-6000:]
        told(f"rank 1 of 2 hangs in phase {phase}, time-out 4 s", time.monotonic() - begin, job)
    cause = report(tmp_path)["cause"]
    assert (cause["rank"], cause["kind"], cause["phase"], cause["step"]) == (1, "hang", phase, AT)
    assert frame in (run_folder(tmp_path) / "logs" / "rank-00001.stacks").read_text()


def test_rank_that_holds_the_lock_is_ended(tmp_path: Path) -> None:
    with Job(tmp_path, 2, *arguments(*HANG), faults=f"spin 1 {AT}") as job:
        begin = trained_until(job, AT - 1)
        assert job.codes() == [4, -signal.SIGUSR2], job.output()[-6000:]
        told("rank 1 of 2 holds Python's lock, time-out 4 s", time.monotonic() - begin, job)
    cause = report(tmp_path)["cause"]
    assert (cause["rank"], cause["kind"], cause["follows"]) == (1, "hang", False)
    assert "in match" in (run_folder(tmp_path) / "logs" / "rank-00001.stacks").read_text()
    assert "one of its threads held Python's lock for" in job.output(1)


def test_suspended_ranks_continue(undisturbed: Any, tmp_path: Path) -> None:
    """As by `scontrol suspend`, for longer than the time-out."""
    with Job(tmp_path, 2, *arguments(*HANG)) as job:
        trained_until(job, 5)
        for number in (signal.SIGSTOP, signal.SIGCONT):
            for rank in range(2):
                job.signal(rank, number)
            time.sleep(7 if number == signal.SIGSTOP else 0)
        job.finish()
    assert (curve_of(tmp_path), final_bits(tmp_path)) == undisturbed, "to the bit"


def test_hanging_job_ends_on_full_disk(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "2m"):
        faults = f"full 0 {AT - 1};stop 1 {AT}"
        with Job(tmp_path / "disk", 2, *arguments(*HANG), faults=faults) as job:
            begin = trained_until(job, AT - 2)
            assert job.codes(0) == [4], job.output()[-6000:]
            told("the same on a full disk", time.monotonic() - begin, job)


@pytest.mark.parametrize(
    ("how", "words"), [("raise", "ValueError: this rank is broken"), ("memory", "can't allocate memory")]
)
def test_error_of_one_rank_is_the_cause(how: str, words: str, tmp_path: Path) -> None:
    with Job(tmp_path, 2, *arguments(), faults=f"{how} 1 {AT}") as job:
        begin = trained_until(job, AT - 1)
        assert job.codes() == [5, 1], job.output()[-6000:]
        told(f"{how} on rank 1 of 2", time.monotonic() - begin, job)
    cause, (other,) = report(tmp_path)["cause"], report(tmp_path)["others"]
    assert (cause["rank"], cause["step"], cause["exit_code"]) == (1, AT, 1)
    assert words in cause["trace"] and words.split(": ")[-1] in job.output(0)
    assert (other["rank"], other["kind"], other["follows"]) == (0, "PeerLostError", True)


def test_stop_all_ranks(undisturbed: Any, tmp_path: Path) -> None:
    with Job(tmp_path, 2, *arguments(), faults=f"hup 0 {AT};term 1 {AT + 1}") as job:
        begin = trained_until(job, AT - 1)
        assert job.codes() == [3, 3], job.output()[-6000:]
        told("SIGHUP to one, SIGTERM to another", time.monotonic() - begin, job)
    (stopped,) = events(tmp_path, "stopped")
    assert AT < stopped["step"] <= AT + 3
    assert started_again(tmp_path, undisturbed) == stopped["step"]


def test_failed_rendezvous(tmp_path: Path) -> None:
    """A port in use, a rank that never comes, and one that was told of another world."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        with Job(tmp_path / "port", 2, *arguments(), ranks=[0], MASTER_PORT=port) as job:
            assert job.codes() == [2] and f"port {port} is in use" in job.output(), job.output()[-6000:]
    begin = time.monotonic()
    with (
        Job(tmp_path / "never", 3, *arguments("--timeout", "3"), ranks=[0, 2]) as job,
        Job(tmp_path / "sizes", 2, *arguments("--timeout", "3"), ranks=[0]) as two,
        Job(tmp_path / "other", 3, *arguments("--timeout", "3"), ranks=[1], MASTER_PORT=two.port) as three,
    ):
        assert job.codes() == [2, 2] and two.codes() == [2] and three.codes() == [2]
        told("a rank never starts, time-out 3 s", time.monotonic() - begin, job)
    assert "2 of 3 ranks came" in job.output() and "missing: 1;" in job.output()
    assert "1 of 2 ranks came" in two.output() and "missing: 1;" in two.output()
    reasons = ("for a world of 3 ranks", "lost rank 0")  # which ends the store it serves
    assert "rank 1 on" in three.output() and any(reason in three.output() for reason in reasons), three.output()


def test_passing_trouble_of_the_save_folder(tmp_path: Path) -> None:
    """EIO at the start and in the last save, on a file server that loses answers; data of a killed run before."""
    with Job(tmp_path, 1, *arguments(SAVED, steps=15), faults="kill 0 13") as job:
        assert job.codes() == [-signal.SIGKILL]
    (snapshot,) = snapshots(tmp_path)
    data = tmp_path / "saves" / "snapshot" / "data"
    (data / f"0000000013-00002.{snapshot.random}").mkdir()
    (data / f"0000000013-00002.{snapshot.random}" / ".tmp-0").write_bytes(b"half")
    with Job(tmp_path, 1, *arguments(SAVED, steps=15), faults="eio 0 14;nfs 0 0") as job:
        job.finish()
    assert job.output().count("the medium failed); trying again for up to") == 2, job.output()[-6000:]
    assert [path.name for path in data.iterdir()] == [str(snapshot)]
    (final,) = committed(LocalStorage(tmp_path / "saves"))
    assert final.step == 15 and not list(damages_of(LocalStorage(tmp_path / "saves"), final))


def test_nan_in_one_layer_is_skipped_until_max_bad_steps(tmp_path: Path) -> None:
    with Job(tmp_path, 2, *arguments(), faults="nan 1 5-6;nan 1 20-59") as job:
        assert job.codes() == [7, 7], job.output()[-6000:]
    metrics = metrics_of(tmp_path)
    counted = {line["step"]: line["inf_nan_skip_batches"] for line in metrics}
    assert (counted[4], counted[5], counted[6], counted[19], counted[30]) == (0, 1, 2, 2, 13) and max(counted) == 31
    assert all(line["loss"] is not None for line in metrics), "no weight was touched"
    assert "the last 11 updates were left out" in report(tmp_path)["cause"]["message"]
    assert "the last update was that of step 19" in report(tmp_path)["cause"]["message"]
    storage = LocalStorage(tmp_path / "saves" / "snapshot")
    assert snapshots(tmp_path) and not [str(one) for name in snapshots(tmp_path) for one in damages_of(storage, name)]


def test_no_snapshots_of_ruined_weights(undisturbed: Any, tmp_path: Path) -> None:
    with Job(tmp_path, 2, *arguments("monitor.log_every=60"), faults="ruin 1 21") as job:
        assert job.codes() == [7, 7], job.output()[-6000:]
    assert "step 31: the loss is not finite since step 21" in job.output(0), "whatever log_every is"
    assert [name.step for name in snapshots(tmp_path)] == [20, 10]
    with Job(tmp_path, 2, *arguments()) as job:
        job.finish()
    assert final_bits(tmp_path) == undisturbed[1], "to the bit"


@pytest.mark.parametrize("then", ["", ";term 0 14"])
def test_no_final_checkpoint_of_ruined_weights(then: str, tmp_path: Path) -> None:
    with Job(tmp_path, 2, *arguments(steps=20), faults=f"ruin 1 13{then}") as job:
        assert job.codes() == [7, 7], job.output()[-6000:]
    assert "rank 1: step " in job.output(0) and "holds NaN or infinity, so nothing is saved" in job.output(0)
    assert [name.step for name in snapshots(tmp_path)] == [10]
    assert not committed(LocalStorage(tmp_path / "saves"))


def test_batches_without_labels_end_run(tmp_path: Path) -> None:
    """Each rank has none in some steps, which is no reason; then no rank has."""
    faults = "unlabelled 0 2-12;unlabelled * 14;unlabelled * 20-40"
    with Job(tmp_path, 2, *arguments(), faults=faults) as job:
        assert job.codes() == [2, 2], job.output()[-6000:]
    assert "step 30: no token of the last 11 batches has a label" in report(tmp_path)["cause"]["message"]
    lines = {line["step"]: line for line in metrics_of(tmp_path)}
    assert [lines[step]["inf_nan_skip_batches"] for step in (13, 14, 19, 29)] == [0, 1, 1, 11]
    assert lines[13]["lr"] != lines[12]["lr"] and lines[14]["lr"] == lines[13]["lr"], "lr of the next step"


def test_overflow_at_min_loss_scale_ends_run(tmp_path: Path) -> None:
    scaler = "grad_scaler={'fp16': {'initial_scale': 8, 'min_scale': 2}, 'hysteresis': 2}"
    with Job(tmp_path, 1, *arguments("model.dtype=torch.float16", scaler), faults="nan 0 12-59") as job:
        assert job.codes() == [7], job.output()[-6000:]
    assert "step 15: gradients still overflow with the smallest loss scale, 2;" in job.output(), job.output()[-2000:]


def test_flipped_bit_is_found_and_rank_named(tmp_path: Path) -> None:
    changes = ("guard.check_replicas_every=5", "--resume", "none")
    with Job(tmp_path, 3, *arguments(*changes), faults="flip 1 14") as job:
        assert job.codes() == [7, 7, 7], job.output()[-6000:]
    named = "step 14: ranks that must hold the same numbers do not: weights of rank 1 differ from those of 2"
    assert named in job.output(0), job.output()


@pytest.mark.parametrize("policy", ["note", "skip", "rollback"])
def test_spike(policy: str, tmp_path: Path) -> None:
    with Job(tmp_path, 1, *arguments(f"guard.spike={policy}", "ckpt.async_upload=False"), faults="blow 0 45") as job:
        job.finish()
    (spike,) = events(tmp_path, "spike")
    assert spike["step"] == 45 and spike["norm_z"] > 12
    metrics = metrics_of(tmp_path)
    assert [line["step"] for line in metrics] == list(range(STEPS))
    skipped = {line["step"]: line["inf_nan_skip_batches"] for line in metrics}
    if policy != "rollback":
        assert (skipped[44], skipped[45], skipped[59]) == (0, policy == "skip", policy == "skip")
        return
    (back,) = events(tmp_path, "rollback")
    assert (back["step"], back["back_to"]) == (45, 40)
    assert {line["seg"] for line in metrics if line["step"] < 40} == {0}
    assert {line["seg"] for line in metrics if line["step"] >= 40} == {1}
    assert skipped[59] == 0, "what was left out is undone"
    # The seven batches before the rollback are left behind, and the curve goes on near where the snapshot stood.
    assert metrics[40]["loss"] == pytest.approx(metrics[39]["loss"], rel=0.2)


def test_rollback_precedes_spike_and_stays_in_run(tmp_path: Path) -> None:
    with Job(tmp_path, 1, *arguments()) as job:
        job.finish()
    rollback = ("guard.spike=rollback", "ckpt.async_upload=False", "--resume", "none")
    with Job(tmp_path, 1, *arguments(*rollback, every=47), faults="blow 0 46") as job:
        job.finish()
    assert "there is no checkpoint from before the spike yet" in job.output() and not events(tmp_path, "rollback")
    (tmp_path / "stop").write_text("51")  # obeyed in the step in which the spike is known
    with Job(tmp_path, 1, *arguments(*rollback, "ckpt.stop_file_path=stop", every=25), faults="blow 0 49") as job:
        assert job.codes() == [3], job.output()[-6000:]
    (back,), (stopped,) = events(tmp_path, "rollback"), events(tmp_path, "stopped")
    assert (back["step"], back["back_to"]) == (49, 25), "not to 50, which was saved after the spike"
    assert stopped["step"] == 26, "what was asked is not lost"


def test_max_rollbacks(tmp_path: Path) -> None:
    changes = ("guard.spike=rollback", "guard.max_rollbacks=2", "ckpt.async_upload=False")
    with Job(tmp_path, 1, *arguments(*changes), faults="blow! 0 45") as job:
        assert job.codes() == [7], job.output()[-6000:]
    assert [event["back_to"] for event in events(tmp_path, "rollback")] == [40, 40]
    assert "a spike again, after going back to step 40 as often as guard.max_rollbacks=2 allows" in job.output()


def test_torchrun_restarts_killed_ranks(undisturbed: Any, tmp_path: Path) -> None:
    torchrun(tmp_path, 2, 1, *arguments(SAVED), faults=f"kill 1 {AT}", patience=280)
    first, second = events(tmp_path, "start")
    assert (first["step"], second["step"]) == (0, 30)
    assert (curve_of(tmp_path), final_bits(tmp_path)) == undisturbed, "to the bit"
    lines = list(read_objects(run_folder(tmp_path) / "metrics.jsonl"))
    times = [[datetime.fromisoformat(line["time"]) for line in lines if line["seg"] == seg] for seg in (0, 1)]
    between = (times[1][0] - times[0][-1]).total_seconds()
    print(f"\n{'torchrun: from the last step to the first again':50} {between:6.1f} s")


def test_nan_on_one_tensor_parallel_rank_is_skipped(tmp_path: Path) -> None:
    with Job(tmp_path, 2, *arguments("parallel.tensor=2", steps=10), faults="nan 1 5") as job:
        job.finish()
    metrics = metrics_of(tmp_path)
    assert [line["inf_nan_skip_batches"] for line in metrics] == [0] * 5 + [1] * 5
    assert all(line["loss"] is not None for line in metrics), "no weight was touched"


def test_hanging_rank_among_waiting_ranks_is_named(tmp_path: Path) -> None:
    pipeline = ("parallel.pipeline.size=2", "model.num_layers=2", "data.micro_num=2")
    with Job(tmp_path, 2, *arguments(*pipeline, *HANG), faults=f"stuck 1 {AT}") as job:
        assert job.codes() == [4, 4], job.output()[-6000:]
    cause, (other,) = report(tmp_path)["cause"], report(tmp_path)["others"]
    assert (cause["rank"], cause["kind"], cause["phase"], cause["step"]) == (1, "hang", "training", AT)
    assert (other["rank"], other["follows"]) == (0, True)
