"""A run that is killed again and again, in the middle of its saves, ends with the bytes of the run that never stopped.

Every kill is a SIGKILL of real processes of train.py: one rank dies at a drawn call of its writer thread or between two
steps, the others soon after. Then the run is started again, and killed again.
"""

from __future__ import annotations

import json
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from internlm_lite.checkpoint.format.manifest import Manifest, unseal
from internlm_lite.checkpoint.save.saver import Saver
from internlm_lite.monitor.jsonl import read_objects
from internlm_lite.train.trainer import Trainer
from tests import cli
from tests.corpus import write_corpus
from tests.ports import free_port
from tests.world import fork_context

KILLS = int(os.environ.get("KILLS", "5"))
"""Of each run: `KILLS=50 pytest tests/train/test_exactness.py` looks further."""
STEPS = 4 * KILLS + 4
"""A kill comes at the second save of a process at the latest, so this many steps are never all done before the last."""

CONFIG = f"""
JOB_NAME = "exact"
MICRO_NUM = 4
DTYPE = "torch.float32"
PARALLEL = dict()
data = dict(
    seq_len=32, micro_bsz=2, micro_num=MICRO_NUM, total_steps={STEPS}, train_folder="../corpus", skip_batches="2,7",
    rampup_batch_size=f"{{MICRO_NUM // 2}} {{MICRO_NUM // 2}} 3",
)
model = dict(
    num_attention_heads=4, num_kv_attention_heads=2, hidden_size=32, num_layers=2, vocab_size=96, multiple_of=16,
    dtype=DTYPE, tie_word_embeddings=True, embed_split_hidden=False,
)
parallel = PARALLEL
adam = dict(lr=1e-2)
lr_scheduler = dict(total_steps={STEPS}, warmup_ratio=0.25, eta_min=1e-4)
grad_scaler = dict(fp16=dict(initial_scale=256.0, growth_interval=2))
hybrid_zero_optimizer = dict(reduce_bucket_size=3000, clip_grad_norm=0.5)
ckpt = dict(enable_save_ckpt=True, save_ckpt_folder="local:saves", oss_snapshot_freq=2)
"""

FIGURES = ("loss", "grad_norm", "lr", "loss_scale", "folders", "acc", "perplexity", "loss_from_metric", "micro_num")
FIGURES += ("num_consumed_tokens", "inf_nan_skip_batches", "adam_beta2")

RUNS = {
    "one process, fp16": (1, ("DTYPE='torch.float16'",)),
    "one process, fp32": (1, ()),
    "2 ranks, ZeRO, bf16": (2, ("MICRO_NUM=2", "DTYPE='torch.bfloat16'")),
    "2 ranks, pipeline": (2, ("PARALLEL={'pipeline': {'size': 2}}",)),
    "4 ranks, tensor and data parallel": (4, ("MICRO_NUM=2", "PARALLEL={'tensor': 2, 'sequence_parallel': True}")),
}


@dataclass(frozen=True)
class Point:
    """Where a process dies."""

    save: int
    """In its save of this number, from 0."""
    call: int | None
    """Right before the writer's call of this number to fsync, rename or link; None: the main thread, wherever the
    writer is then."""
    steps: int
    """Steps, less than two, that the main thread does after that save; then it dies, or waits for the writer to die."""

    @staticmethod
    def drawn(rng: random.Random, rank: int) -> Point:
        calls = 12 if rank == 0 else 6  # three for each of: file, vote, and on rank 0 manifest, commit
        return Point(rng.randrange(2), rng.choice([None, *range(calls)]), rng.randrange(2))


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _doomed(point: Point | None, *arguments: Any) -> None:
    """`train.py` in this process, until `point`. No save is skipped, as if the storage kept pace."""
    saves, calls, steps = -1, 0, 0
    save, step = Saver.save, Trainer.step

    def begun(self: Saver, *args: Any, **options: Any) -> Any:
        nonlocal saves, calls, steps
        if self._running is not None:
            self._running.exception()
        saves, calls, steps = saves + 1, 0, 0
        return save(self, *args, **options)

    def stepped(*args: Any, **hooks: Any) -> Any:
        nonlocal steps
        if point is not None and saves == point.save:
            if steps == point.steps:
                _die() if point.call is None else time.sleep(60)
            steps += 1
        return step(*args, **hooks)

    def counted(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            nonlocal calls
            if point is not None and saves == point.save and threading.current_thread().name.startswith("checkpoint"):
                if calls == point.call:
                    _die()
                calls += 1
            return original(*args, **options)

        return call

    Saver.save, Trainer.step = begun, stepped  # type: ignore[method-assign]
    os.fsync, os.rename, os.link = counted(os.fsync), counted(os.rename), counted(os.link)
    cli._main(*arguments)


def start(folder: Path, size: int, changes: tuple[str, ...], points: dict[int, Point]) -> list[tuple[Any, Path]]:
    """A job of `size` ranks; those in `points` die there."""
    port, ranks = str(free_port()), []
    for rank in range(size):
        environment = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)} if size > 1 else {}
        environment |= {"LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment["OMP_NUM_THREADS"] = "1"
        arguments = ("--config", "config.py", "--device", "cpu", *changes)
        log = folder / f"rank-{rank}.log"
        target = (points.get(rank), str(cli.ROOT / "train.py"), arguments, str(log), str(folder), environment)
        process = fork_context.Process(target=_doomed, args=target, daemon=True)
        process.start()
        ranks.append((process, log))
    return ranks


def kill(folder: Path, size: int, changes: tuple[str, ...], rng: random.Random) -> Point:
    """Start the job, let a drawn rank die at a drawn point, then all others."""
    victim = rng.randrange(size)
    point = Point.drawn(rng, victim)
    ranks = start(folder, size, changes, {victim: point})
    process, log = ranks[victim]
    process.join(60)
    for other, _ in ranks:
        other.kill()
        other.join(10)
    assert process.exitcode == -signal.SIGKILL, f"rank {victim} at {point}: {process.exitcode}\n{log.read_text()}"
    return point


def finish(folder: Path, size: int, changes: tuple[str, ...]) -> None:
    for rank in start(folder, size, changes, {}):
        ended = cli.ended(*rank)
        assert ended.code == 0, ended.output


def newest_commit(folder: Path) -> int:
    """Step of the newest checkpoint on the disk; 0 without one."""
    return max((int(commit.name.split("-")[0]) for commit in folder.glob("saves/**/commits/*.json")), default=0)


def last_start(folder: Path) -> int:
    """The step at which the last process began."""
    events = [event for event in read_objects(folder / "RUN/exact/latest/events.jsonl") if event["event"] == "start"]
    return int(events[-1]["step"])


def figures(folder: Path) -> list[dict[str, Any]]:
    """Every step that any process of the run printed."""
    found = []
    for file in sorted(folder.glob("RUN/exact/2*/metrics.jsonl")):
        found += [{key: step[key] for key in ("step", *FIGURES)} for step in read_objects(file)]
    return found


def final(folder: Path) -> tuple[dict[str, str], dict[str, Any]]:
    """sha256 of every rank's file of the final checkpoint (weights, moments, random states), and the rest of it."""
    (manifest,) = (folder / "saves" / "data").glob(f"{STEPS:010d}-*/manifest.json")
    found = unseal(Manifest, manifest.read_bytes(), str(manifest))
    found.state["reporter"].pop("speed")  # clock times
    found.state.pop("run_folder")  # a time, too
    return {name: file.sha256 for name, file in found.files.items()}, found.state


@pytest.mark.parametrize("name", RUNS)
def test_a_run_killed_in_its_saves_ends_with_the_same_bytes(name: str, tmp_path: Path) -> None:
    size, changes = RUNS[name]
    write_corpus(tmp_path / "corpus")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
        (folder / "config.py").write_text(CONFIG)
    finish(whole, size, (*changes, "ckpt.oss_snapshot_freq=0"))
    expected = {step["step"]: step for step in figures(whole)}
    assert sorted(expected) == list(range(STEPS))

    rng, committed = random.Random(name), 0
    for _ in range(KILLS):
        point = kill(killed, size, changes, rng)
        assert last_start(killed) == committed, point
        committed = newest_commit(killed)
    finish(killed, size, changes)
    assert last_start(killed) == committed > 0
    printed = figures(killed)
    assert {step["step"] for step in printed} == set(expected)
    for step in printed:
        assert step == expected[step["step"]]
    assert final(killed) == final(whole)
    assert json.dumps(final(killed)[1]) == json.dumps(final(whole)[1])
