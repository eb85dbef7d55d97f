"""train.py as users start it: several processes, exit codes, a failing rank, samples from the checkpoint."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from internlm_lite.monitor.jsonl import read_objects
from tests import cli
from tests.corpus import write_corpus
from tests.ports import free_port
from tests.steps import read_metrics
from tests.train.runs import curve

CONFIG = """
JOB_NAME = "launch"
MICRO_NUM = 4
data = dict(seq_len=32, micro_bsz=2, micro_num=MICRO_NUM, total_steps=4, train_folder="corpus")
lr_scheduler = dict(total_steps=20)
model = dict(num_attention_heads=2, hidden_size=16, num_layers=1, vocab_size=96, multiple_of=16, dtype="torch.float64")
hybrid_zero_optimizer = dict(reduce_bucket_size=2000)
ckpt = dict(enable_save_ckpt=True, save_ckpt_folder="local:saves", oss_snapshot_freq=2)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_corpus(tmp_path / "corpus")
    (tmp_path / "config.py").write_text(CONFIG)
    return tmp_path


def start_ranks(folder: Path, size: int, *arguments: str, common: dict[str, str] | None = None) -> list:
    """What torchrun starts: one process per rank with its environment."""
    common = common or {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(size)}
    common |= {"LOCAL_WORLD_SIZE": str(size)}
    ranks = []
    for rank in range(size):
        log = folder / f"rank-{rank}.log"
        environment = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        args = ("--config", "config.py", "--device", "cpu", *arguments)
        ranks.append((cli.start("train.py", *args, folder=folder, log=log, environment=environment), log))
    return ranks


def metrics_of(folder: Path) -> list[dict]:
    return read_metrics(folder / "RUN" / "launch" / "latest" / "metrics.jsonl")


def test_ranks_give_the_curve_of_one_process(folder: Path):
    single = cli.run("train.py", "--config", "config.py", "--resume", "none", folder=folder)
    assert single.code == 0, single.output
    expected = curve(metrics_of(folder))
    ranks = start_ranks(folder, 2, "--resume", "none", "MICRO_NUM=2")
    ended = [cli.ended(*rank) for rank in ranks]
    assert [one.code for one in ended] == [0, 0], ended
    assert "step=3" in ended[0].output
    assert "data parallel size: 2" in ended[0].output
    assert "step=" not in ended[1].output, "other ranks are quiet"
    for ours, theirs in zip(curve(metrics_of(folder)), expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-10)


def test_torchrun_itself(folder: Path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master-port={free_port()}"]
    command += [str(cli.ROOT / "train.py"), "--config", "config.py", "--device", "cpu", "MICRO_NUM=2"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(metrics_of(folder)) == 4


def test_a_killed_rank_ends_the_job_with_its_peers_code(folder: Path):
    last = "lr_scheduler.total_steps=100000"
    ranks = start_ranks(folder, 2, "MICRO_NUM=2", "data.total_steps=100000", last)
    victim, log = ranks[1][0], ranks[0][1]
    deadline = time.monotonic() + 60
    while "step=5" not in (log.read_text() if log.exists() else "") or not any(folder.glob("saves/**/commits/*.json")):
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)
    os.kill(victim.pid, signal.SIGKILL)
    survivor = cli.ended(*ranks[0], timeout_seconds=60)
    assert survivor.code == 5, survivor.output
    assert "PeerLostError" in survivor.output
    assert "Traceback" not in survivor.output
    resumed = [cli.ended(*rank) for rank in start_ranks(folder, 2, "MICRO_NUM=2", "data.total_steps=12", last)]
    assert [one.code for one in resumed] == [0, 0], resumed
    assert "LOAD PLAN" in resumed[0].output or "loaded checkpoint" in resumed[0].output


def test_torchruns_start_again_goes_on_whatever_resume_says(folder: Path):
    """As when a machine joins: no agent counts a restart then."""

    def torchrun(agent: str, steps: int, *more: str) -> str:
        error_file = f"/tmp/torchelastic/{agent}/attempt_0/0/error.json"
        common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "1"}
        return started(steps, *more, **common, TORCHELASTIC_RUN_ID="none", TORCHELASTIC_ERROR_FILE=error_file)

    def slurm(job: str, restarts: int, steps: int) -> str:
        task = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "1", "SLURM_STEP_NODELIST": "localhost"}
        return started(steps, **task, SLURM_JOB_ID=job, SLURM_STEP_ID="0", SLURM_RESTART_COUNT=str(restarts))

    def started(steps: int, *more: str, **environment: str) -> str:
        arguments = ("--config", "config.py", "--device", "cpu", "--resume", "none", f"data.total_steps={steps}", *more)
        log = folder / "output.log"
        own = {"RANK": "0", "LOCAL_RANK": "0"} if "WORLD_SIZE" in environment else {}
        done = cli.ended(
            cli.start("train.py", *arguments, folder=folder, log=log, environment={**own, **environment}), log
        )
        assert done.code == 0, done.output
        return (folder / "RUN" / "launch" / "latest").resolve().name

    first = torchrun("none_a", 4)
    assert torchrun("none_c", 1, "ckpt.save_ckpt_folder=local:other") != first
    assert torchrun("none_a", 6) == first, "whatever else was started meanwhile"
    assert [line["seg"] for line in metrics_of(folder)] == [0] * 4 + [1] * 2
    assert torchrun("none_b", 2) != first, "another launch trains anew"
    assert [line["step"] for line in metrics_of(folder)] == [0, 1]
    second = slurm("6", 1, 4)
    assert [line["step"] for line in metrics_of(folder)] == [0, 1, 2, 3], (
        "it was put back before it had written anything"
    )
    assert slurm("6", 2, 6) == second and slurm("7", 0, 2) != second


def test_what_is_wrong_on_all_ranks_is_said_once(folder: Path):
    ended = [cli.ended(*rank) for rank in start_ranks(folder, 3, "data.train_folder=absent")]
    assert [one.code for one in ended] == [2, 2, 2], ended
    assert [one.output.count("DataError: data.train_folder: absent is missing") for one in ended] == [1, 0, 0], ended
    assert not any("failed first" in one.output for one in ended), ended


def test_one_rank_prints_the_config_and_needs_no_other(folder: Path):
    arguments = ("--print-config", "origin", "MICRO_NUM=2")
    first, second = (cli.ended(*rank) for rank in start_ranks(folder, 2, *arguments))
    assert (first.code, second) == (0, cli.Ended(0, "")), first.output
    assert "config.py:4" in first.output
    assert not (folder / "RUN").exists()


def test_samples_and_generate_from_the_checkpoint(folder: Path):
    text = folder / "text" / "licences"
    text.mkdir(parents=True)
    (text / "a.txt").write_text((cli.ROOT / "LICENSE").read_text() * 3)
    arguments = ["--input", str(text), "--output", str(folder / "small.model"), "--vocab-size", "448"]
    made = cli.run("tools/tokenizer.py", "train", *arguments, folder=folder)
    assert made.code == 0, made.output
    arguments = ["--input", str(text), "--output", str(folder / "tokens"), "--tokenizer", str(folder / "small.model")]
    arguments += ["--workers", "1"]  # this process may not start others
    made = cli.run("tools/tokenizer.py", "encode", *arguments, folder=folder)
    assert made.code == 0, made.output
    changes = ["data.train_folder=tokens", "model.vocab_size=448", "data.tokenizer=small.model"]
    changes += ["monitor.sample_prompts=['The License']", "monitor.sample_tokens=8", "model.dtype=torch.float32"]
    trained = cli.run("train.py", "--config", "config.py", *changes, folder=folder)
    assert trained.code == 0, trained.output
    samples = list(read_objects(folder / "RUN" / "launch" / "latest" / "samples.jsonl"))
    assert [sample["prompt"] for sample in samples] == ["The License"]
    arguments = ["--checkpoint", "saves", "--prompt", "The License", "--prompt", "2", "--max-new-tokens", "8"]
    first = cli.run("tools/generate.py", *arguments, folder=folder)
    assert first.code == 0, first.output
    assert first.output.startswith("The License")
    assert cli.run("tools/generate.py", *arguments, folder=folder) == first
    missing = cli.run("tools/generate.py", "--checkpoint", "nowhere", "--prompt", "x", folder=folder)
    assert missing.code == 2
    assert "Traceback" not in missing.output
