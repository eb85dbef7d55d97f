"""Whole jobs for the fault table: every rank a process, started as by hand, and what is there to be seen afterwards."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from safetensors import safe_open

from internlm_lite.checkpoint.format.catalog import committed, inspect
from internlm_lite.checkpoint.format.manifest import Name
from internlm_lite.checkpoint.storage.local import LocalStorage
from internlm_lite.monitor.jsonl import read_objects
from tests import cli
from tests.ports import free_port
from tests.steps import read_metrics
from tests.train.runs import curve

STEPS = 60
EVERY = 10
"""Steps between snapshots."""
PATIENCE = 90.0
"""Seconds after which a job that should have ended fails the test: many times of what it takes."""


def arguments(*more: str, steps: int = STEPS, every: int = EVERY) -> tuple[str, ...]:
    """Of train.py: the tiny model, with snapshots."""
    return (
        *("--config", str(cli.ROOT / "configs/tiny.py"), "--device", "cpu", f"TOTAL_STEPS={steps}"),
        *("SEQ_LEN=32", "data.micro_num=1", "model.num_layers=1", "model.hidden_size=32", "VOCAB_SIZE=256"),
        *(
            "monitor.tensorboard=False",
            "ckpt.enable_save_ckpt=True",
            "ckpt.save_ckpt_folder=local:saves",
            f"ckpt.oss_snapshot_freq={every}",
        ),
        *more,
    )


class Job:
    """A context manager: whatever is left of the ranks at its end is killed."""

    def __init__(
        self, folder: Path, size: int, *more: str, faults: str = "", ranks: Sequence[int] | None = None, **common: str
    ) -> None:
        """`size` ranks, or those of them named in `ranks`, working in `folder`. `common`: environment of all."""
        folder.mkdir(exist_ok=True, parents=True)
        self.folder, self.size = folder, size
        self._common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(size)}
        self._common |= {"LOCAL_WORLD_SIZE": str(size), "OMP_NUM_THREADS": "1", "FAULTS": faults, **common}
        self.port = self._common["MASTER_PORT"]
        self._more = more
        self.ranks: dict[int, Any] = {}
        self.start(*(range(size) if ranks is None else ranks))

    def start(self, *ranks: int) -> None:
        for rank in ranks:
            environment = {**self._common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            self.ranks[rank] = cli.start(
                "tests/faults/driver.py", *self._more, folder=self.folder, log=self._log(rank), environment=environment
            )

    def _log(self, rank: int) -> Path:
        return self.folder / f"rank-{rank}.log"

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.ranks.values():
            if process.is_alive():
                process.kill()
            process.join(10)

    def signal(self, rank: int, number: signal.Signals) -> None:
        pid = self.ranks[rank].pid
        assert pid is not None
        os.kill(pid, number)

    def await_end(self, *ranks: int, patience: float = PATIENCE) -> None:
        """Until these ranks (none named: all) have ended."""
        deadline = time.monotonic() + patience
        for rank in ranks or self.ranks:
            self.ranks[rank].join(max(0.0, deadline - time.monotonic()))
            assert not self.ranks[rank].is_alive(), f"rank {rank} still runs\n{self.output()[-6000:]}"

    def codes(self, *ranks: int, patience: float = PATIENCE) -> list[int]:
        """Exit codes of these ranks (none named: all) once they have ended."""
        self.await_end(*ranks, patience=patience)
        return [self.ranks[rank].exitcode for rank in ranks or self.ranks]

    def output(self, rank: int | None = None) -> str:
        ranks = self.ranks if rank is None else [rank]
        return "\n".join(self._log(one).read_text() for one in ranks if self._log(one).exists())

    def finish(self) -> None:
        """Wait for the end; every rank must have done all steps."""
        assert self.codes() == [0] * len(self.ranks), self.output()[-6000:]


def torchrun(folder: Path, size: int, restarts: int, *more: str, faults: str, patience: float) -> None:
    """The job of `size` ranks under torchrun, which starts it again up to `restarts` times; it must end well."""
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={size}", f"--max-restarts={restarts}"]
    command += [f"--master-port={free_port()}", str(cli.ROOT / "tests/faults/driver.py"), *more]
    environment = {**os.environ, "PYTHONPATH": str(cli.ROOT), "FAULTS": faults, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=patience, env=environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def run_folder(folder: Path) -> Path:
    return (folder / "RUN" / "tiny" / "latest").resolve()


def report(folder: Path) -> dict[str, Any]:
    """FAILED.json."""
    found: dict[str, Any] = json.loads((run_folder(folder) / "FAILED.json").read_text())
    return found


def runs(folder: Path) -> list[Path]:
    """All run folders, the oldest first."""
    return sorted((folder / "RUN" / "tiny").glob("20*"))


def events_in(run: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in read_objects(run / "events.jsonl") if event["event"] == kind]


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    """Of the newest run."""
    return events_in(run_folder(folder), kind)


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    """The step objects of the newest run; a run that has just begun has none."""
    return read_metrics(run_folder(folder) / "metrics.jsonl")


def curve_of(folder: Path) -> list[tuple[float, float]]:
    return curve(metrics_of(folder))


def snapshots(folder: Path) -> list[Name]:
    """The newest first."""
    return committed(LocalStorage(folder / "saves" / "snapshot"))


def final_bits(folder: Path) -> dict[str, str]:
    """sha256 of every tensor of the final checkpoint: weights and moments. Nothing draws from the random generators."""
    storage = LocalStorage(folder / "saves")
    newest = inspect(storage, committed(storage)[0])
    assert newest.manifest.kind == "final"
    found = {}
    for file in newest.manifest.files:
        with safe_open(folder / "saves" / newest.folder / file, "pt") as opened:
            keys = [key for key in opened.keys() if not key.startswith("rank_state/")]  # noqa: SIM118 (no mapping)
            found |= {f"{file} {key}": sha256(opened.get_tensor(key).numpy().tobytes()).hexdigest() for key in keys}
    return found


def damage(checkpoint: Path) -> None:
    """Flip a bit in the second half of rank 0's file."""
    file = checkpoint / "rank-00000.safetensors"
    with file.open("r+b") as opened:
        opened.seek(file.stat().st_size * 3 // 4)
        byte = opened.read(1)
        opened.seek(-1, os.SEEK_CUR)
        opened.write(bytes([byte[0] ^ 4]))
