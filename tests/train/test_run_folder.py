"""One run, one folder: kills and restarts, a second job on the same save folder, ends of every kind."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from internlm_lite.checkpoint.storage.local import LocalStorage
from internlm_lite.checkpoint.storage.run_lock import Lease
from internlm_lite.config.schema import Config
from internlm_lite.mesh.mesh import single_process_mesh
from internlm_lite.monitor.jsonl import read_objects
from internlm_lite.train.changes import LastRun
from internlm_lite.train.checkpoints import Checkpoints
from tests import cli
from tests.corpus import FOLDERS, write_corpus
from tests.steps import read_metrics
from tests.train.runs import curve, run_training, tiny
from tests.train.test_launch import start_ranks

CONFIG = """
JOB_NAME = "launch"
MICRO_NUM = 4
STEPS = 4
data = dict(seq_len=32, micro_bsz=2, micro_num=MICRO_NUM, total_steps=STEPS, train_folder="corpus")
lr_scheduler = dict(total_steps=20)
model = dict(num_attention_heads=2, hidden_size=16, num_layers=1, vocab_size=96, multiple_of=16, dtype="torch.float64")
hybrid_zero_optimizer = dict(reduce_bucket_size=2000)
ckpt = dict(enable_save_ckpt=True, save_ckpt_folder="local:saves", oss_snapshot_freq=2, async_upload=False)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_corpus(tmp_path / "corpus")
    (tmp_path / "config.py").write_text(CONFIG)
    return tmp_path


def trained(folder: Path, *arguments: str) -> cli.Ended:
    return cli.run("train.py", "--config", "config.py", "--device", "cpu", *arguments, folder=folder)


def runs_in(folder: Path) -> list[Path]:
    return sorted((folder / "RUN" / "launch").glob("20*"))


def events_of(run: Path, *kinds: str) -> list[dict[str, Any]]:
    return [event for event in read_objects(run / "events.jsonl") if event["event"] in kinds]


def digests(folder: Path) -> dict[str, str]:
    """Every file and link below `folder`."""
    found = {}
    for path in folder.rglob("*"):
        if path.is_symlink():
            found[str(path)] = os.readlink(path)
        elif path.is_file():
            found[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def test_snapshots_of_another_run_are_not_gone_on_from(folder: Path):
    same = "ckpt.snapshot_ckpt_folder=local:snapshots"
    assert trained(folder, same).code == 0
    before = digests(folder / "snapshots")
    refused = trained(folder, same, "ckpt.save_ckpt_folder=local:other")
    assert refused.code == 2 and "Traceback" not in refused.output, refused.output
    assert (
        "holds snapshots of the run that saves to local:saves, this one saves to ckpt.save_ckpt_folder=local:other"
        in (refused.output)
    )
    assert digests(folder / "snapshots") == before
    spelt = trained(
        folder, "ckpt.snapshot_ckpt_folder=local:./snapshots/", "ckpt.save_ckpt_folder=local:saves/", "STEPS=5"
    )
    assert spelt.code == 0 and len(runs_in(folder)) == 1, spelt.output
    quiet = trained(folder, same, "ckpt.save_ckpt_folder=local:other", "ckpt.enable_save_ckpt=False")
    assert quiet.code == 2 and "holds snapshots of the run that saves to local:saves" in quiet.output, quiet.output
    (folder / "saves").rename(folder / "other")
    (folder / "snapshots").rename(folder / "moved")
    moved = trained(folder, "ckpt.snapshot_ckpt_folder=local:moved", "ckpt.save_ckpt_folder=local:other", "STEPS=6")
    assert moved.code == 0 and "loaded checkpoint 0000000005" in moved.output, moved.output


def test_a_folder_to_begin_from_that_is_passed_over_is_told(folder: Path):
    assert trained(folder).code == 0
    again = trained(folder, "STEPS=6", "ckpt.load_model_only_folder=local:absent")
    assert again.code == 0, again.output
    assert "ckpt.load_model_only_folder=local:absent is not loaded: this run goes on from checkpoint 0000000004" in (
        again.output
    )
    assert "is not loaded" not in trained(folder, "STEPS=8", "ckpt.load_model_only_folder=local:absent").output


def test_a_killed_run_goes_on_in_its_folder(folder: Path):
    log = folder / "killed.log"
    arguments = ("--config", "config.py", "--device", "cpu", "STEPS=100000")
    victim = cli.start("train.py", *arguments, folder=folder, log=log)
    deadline = time.monotonic() + 60
    while "step=9 " not in (log.read_text() if log.exists() else ""):
        assert victim.is_alive() and time.monotonic() < deadline, log.read_text()
        time.sleep(0.01)
    os.kill(victim.pid, signal.SIGKILL)
    victim.join(10)
    (run,) = runs_in(folder)
    reached = max(step["step"] for step in read_metrics(run / "metrics.jsonl"))
    assert reached >= 9
    last = f"STEPS={reached + 4}"
    before = digests(folder / "RUN")

    # Another job that was started by mistake, while one of this folder lives: nothing is touched.
    other = Lease(LocalStorage(folder / "saves"), renew_seconds=0.05)
    other.acquire()
    refused = trained(folder, last)
    other.release()
    assert refused.code == 6 and "in use by" in refused.output
    assert digests(folder / "RUN") == before

    resumed = trained(folder, last)
    assert resumed.code == 0, resumed.output
    assert runs_in(folder) == [run]
    start = events_of(run, "start")
    assert [event["seg"] for event in start] == [0, 1]
    assert start[1]["restarted_from"].startswith(f"{start[1]['step']:010d}-") and "restarted_from" not in start[0]
    assert start[1]["step"] in (reached - 1, reached, reached + 1) and start[1]["step"] % 2 == 0
    steps = read_metrics(run / "metrics.jsonl")
    assert [step["step"] for step in steps] == list(range(reached + 4))
    assert [step["seg"] for step in steps] == [0] * start[1]["step"] + [1] * (reached + 4 - start[1]["step"])
    whole = trained(folder, last, "ckpt.enable_save_ckpt=False", "ckpt.auto_resume=False", "JOB_NAME=whole")
    assert whole.code == 0, whole.output
    assert curve(steps) == curve(read_metrics(folder / "RUN" / "whole" / "latest" / "metrics.jsonl"))
    text = (run / "logs" / "rank-00000.log").read_text()
    assert "step=0 " in text and f"step={reached + 3} " in text
    assert yaml.safe_load((run / "config.resolved.0.yaml").read_text())["data"]["total_steps"] == 100000
    assert yaml.safe_load((run / "config.resolved.yaml").read_text())["data"]["total_steps"] == reached + 4
    origins = {row["key"]: row for row in json.loads((run / "config.origins.json").read_text())}
    assert origins["data.total_steps"]["value"] == reached + 4
    assert origins["ckpt.oss_snapshot_freq"]["origin"] == "config.py:9"
    assert (run / "env.0.json").exists() and not (run / "config.0").exists(), "the config file is the same"


def test_a_finished_run_is_left_alone_until_there_is_more_to_do(folder: Path):
    assert trained(folder).code == 0
    (run,) = runs_in(folder)
    assert [event["event"] for event in read_objects(run / "events.jsonl")][-1] == "done"
    before, around = digests(run), digests(folder / "RUN")
    again = trained(folder)
    assert again.code == 0 and "nothing to do: the checkpoint stands at step 4 of 4" in again.output
    assert digests(folder / "RUN") == around

    anew = trained(folder, "--resume", "none")
    assert anew.code == 0 and len(runs_in(folder)) == 2
    (new,) = set(runs_in(folder)) - {run}
    from_path = trained(folder, "--resume", "saves", "STEPS=6", "ckpt.enable_save_ckpt=False")
    assert from_path.code == 0 and len(runs_in(folder)) == 3, "an explicit path is another run's checkpoint"
    more = trained(folder, "STEPS=6")
    assert more.code == 0, more.output
    assert len(runs_in(folder)) == 3
    assert [step["seg"] for step in read_metrics(new / "metrics.jsonl")] == [0, 0, 0, 0, 1, 1]
    assert (folder / "RUN" / "launch" / "latest").resolve() == new.resolve()
    assert digests(run) == before


def test_finished_run_with_a_damaged_checkpoint_trains_again(folder: Path):
    assert trained(folder).code == 0
    (shard,) = (folder / "saves" / "data").glob("*/rank-00000.safetensors")
    content = bytearray(shard.read_bytes())
    content[3000:3004] = b"\xff\xff\xff\xff"
    shard.write_bytes(content)
    again = trained(folder)
    assert again.code == 0, again.output
    (run,) = runs_in(folder)
    assert [step["seg"] for step in read_metrics(run / "metrics.jsonl")] == [0, 0, 1, 1]
    assert [event["seg"] for event in events_of(run, "done")] == [0, 1]
    assert (run / "env.0.json").exists() and "damaged" in (run / "logs" / "rank-00000.log").read_text()


def test_ranks_agree_on_the_folder(folder: Path):
    for steps in (4, 8):
        ended = [cli.ended(*rank) for rank in start_ranks(folder, 2, "MICRO_NUM=2", f"STEPS={steps}")]
        assert [one.code for one in ended] == [0, 0], ended
    (run,) = runs_in(folder)
    assert [step["seg"] for step in read_metrics(run / "metrics.jsonl")] == [0] * 4 + [1] * 4
    for rank in range(2):
        text = (run / "logs" / f"rank-{rank:05d}.log").read_text()
        assert text.count("Number of elements on ranks") == 2
    first, second = events_of(run, "start")
    assert {**first, "time": "", "seg": 1, "step": 4, "total_steps": 8} | {
        "restarted_from": second["restarted_from"]
    } == {**second, "time": ""}
    assert (first["world_size"], first["log_every"], first["folders"]) == (2, 1, sorted(FOLDERS))
    documents = {name: (folder / "corpus" / name / "part.bin").stat().st_size // 2 for name in FOLDERS}
    assert first["folder_tokens"] == documents


def test_a_run_that_fails_says_why(folder: Path):
    assert trained(folder).code == 0
    diverged = trained(folder, "STEPS=60", "adam.lr=1e30", "lr_scheduler.warmup_ratio=0")
    assert diverged.code == 7, diverged.output
    (run,) = runs_in(folder)
    (failed,) = events_of(run, "failed")
    assert failed["why"].startswith("NumericsError: ") and (failed["rank"], failed["seg"]) == (0, 1)


def test_a_failed_start_leaves_no_trace_in_the_good_run(folder: Path):
    assert trained(folder).code == 0
    (run,) = runs_in(folder)
    before = digests(folder / "RUN")
    (folder / "corpus").rename(folder / "moved")
    missing = trained(folder, "STEPS=60")
    assert missing.code == 2 and "Traceback" not in missing.output
    assert before.items() <= digests(folder / "RUN").items(), "latest, too"
    _, left = runs_in(folder)
    assert left.name.endswith("-failed") and f"everything about it is in RUN/launch/{left.name}" in missing.output
    (failed,) = events_of(left, "failed")
    assert failed["why"].startswith("DataError: ") and "corpus" in failed["why"]
    assert json.loads((left / "FAILED.json").read_text())["cause"]["kind"] == "DataError"
    assert "DataError" in (left / "logs" / "rank-00000.log").read_text() and (left / "config" / "config.py").exists()
    (folder / "moved").rename(folder / "corpus")
    assert trained(folder, "STEPS=6").code == 0 and runs_in(folder) == [run, left]


def saving_to(saves: Path, **ckpt: Any) -> Config:
    folders = {"save_ckpt_folder": f"local:{saves}", "snapshot_ckpt_folder": f"local:{saves}/snapshot"}
    return tiny(None, ckpt={"enable_save_ckpt": True, "async_upload": False, "oss_snapshot_freq": 3, **folders, **ckpt})


def last_run(config: Config) -> LastRun | None:
    checkpoints = Checkpoints(config, single_process_mesh())
    found = checkpoints.last_run()
    checkpoints.close(wait=True)
    return found


def test_a_checkpoint_tells_which_run_wrote_it(tmp_path: Path):
    saves = tmp_path / "saves"
    config = saving_to(saves)
    assert last_run(config) is None
    run_training(single_process_mesh(), config, tmp_path / "2026-01-02_03-04-05")
    assert last_run(config) == LastRun("2026-01-02_03-04-05", 8, 4 * 2 * 32, config.data.model_dump())
    saves.rename(tmp_path / "copy")
    assert last_run(saving_to(tmp_path / "copy")) is None, "the run that wrote it may be alive, with folders of its own"
    (tmp_path / "copy").rename(saves)
    for manifest in (saves / "data").glob("*/manifest.json"):
        manifest.write_bytes(manifest.read_bytes()[:-9])
    older = last_run(config)
    assert older is not None and older.step == 6, "the newest snapshot, since the final one is damaged"
    for commit in saves.rglob("commits/*.json"):
        commit.write_text("{}")
    assert last_run(config) is None
    assert last_run(saving_to(saves, enable_save_ckpt=False)) is None


def test_there_is_an_evaluation_at_the_end(tmp_path: Path):
    corpus = write_corpus(tmp_path / "corpus")
    data = {"valid_every": 3, "valid_folder": str(corpus), "valid_batches": 1}
    run_training(single_process_mesh(), tiny(corpus, data=data), tmp_path / "run")
    found = events_of(tmp_path / "run", "evaluating", "evaluation")
    assert [(event["event"], event["step"]) for event in found] == [
        (kind, step) for step in (2, 5, 7) for kind in ("evaluating", "evaluation")
    ]
    assert all(sorted(event["folders"]) == sorted(FOLDERS) for event in found[1::2])
    assert all(tokens > 0 for event in found[1::2] for tokens, _, _ in event["folders"].values())


def test_global_batch_is_kept_with_other_rank_counts(folder: Path):
    """Two ranks, then one, then two again, all with the same command line: the curve of two ranks."""
    for size, steps in ((2, 4), (1, 8), (2, 12)):
        ended = [cli.ended(*rank) for rank in start_ranks(folder, size, "MICRO_NUM=2", f"STEPS={steps}")]
        assert [one.code for one in ended] == [0] * size, ended
        assert ("data.micro_num=4 instead of 2: with 1 data-parallel ranks now" in ended[0].output) == (size == 1)
    (run,) = runs_in(folder)
    changed = curve(read_metrics(run / "metrics.jsonl"))
    whole = [
        cli.ended(*rank)
        for rank in start_ranks(folder, 2, "MICRO_NUM=2", "STEPS=12", "ckpt.save_ckpt_folder=local:whole")
    ]
    assert [one.code for one in whole] == [0, 0], whole
    unchanged = curve(read_metrics(runs_in(folder)[-1] / "metrics.jsonl"))
    assert len(changed) == 12 and changed == [pytest.approx(point, rel=1e-12) for point in unchanged]
