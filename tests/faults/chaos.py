"""A job of two ranks that something happens to every few steps, and a supervisor that starts it again each time.

Looked at after every start: it began no earlier than at the newest snapshot that was known to be complete, and those
that failed are named. At the end: curve and final tensors are those of a run that nothing happened to, bit for bit.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from internlm_lite.checkpoint.format.catalog import committed
from internlm_lite.checkpoint.storage.local import LocalStorage
from internlm_lite.monitor.jsonl import read_objects
from tests.faults.worlds import Job, arguments, damage, events_in, report, runs

RANKS = 2
EVERY = 5
"""Steps between snapshots."""
HANG_SECONDS = 10
GAP = range(8, 33)
"""Steps that a start trains until something happens: about 20."""

KINDS = {
    "kill one": 20, "kill all": 20, "kill all at the start": 10, "exit one": 5, "raise one": 10, "stop one": 8,
    "term all": 12, "damage newest": 8, "full disk": 5,
}  # fmt: skip
"""What happens, and how often of 98 times."""
EXPECTED = {
    "kill one": {5, -9}, "kill all": {5, -9}, "kill all at the start": {5, -9}, "exit one": {5, 0},
    "raise one": {5, 1}, "stop one": {4, 5, -9}, "term all": {3}, "damage newest": {5, -9}, "full disk": {5, -9},
    "nothing": {0},
}  # fmt: skip
"""Exit codes of the ranks."""


def fault(kind: str, rank: int, rng: random.Random) -> str:
    """For the driver."""
    gap, soon = rng.choice(GAP), f"{rng.uniform(0.001, 0.05):.3f}"
    return {
        "kill one": f"kill {rank} +{gap} {soon}",
        "kill all": f"kill * +{gap} {soon}",
        "damage newest": f"kill * +{gap} {soon}",
        "exit one": f"exit {rank} +{gap}",
        "raise one": f"raise {rank} +{gap}",
        "stop one": f"stop {rank} +{gap} {soon}",
        "term all": f"term * +{gap} {soon}",
        "full disk": f"full 0 +{gap};kill * +{gap + 7} {soon}",
    }.get(kind, "")


@dataclass
class Chaos:
    """What happened. A disk can be full where `folder` is one."""

    folder: Path
    steps: int
    rng: random.Random
    kinds: Sequence[str] = ()
    """What happens, in this order, and then nothing; empty: whatever comes, to the end."""
    happened: Counter[str] = field(default_factory=Counter)
    lost: list[int] = field(default_factory=list)
    """Steps that each fault cost: they were trained again."""
    damaged: set[str] = field(default_factory=set)

    def run(self, most_starts: int) -> None:
        """Start the job until it ends well."""
        for _ in range(most_starts):
            if self._ends_well():
                return
        raise AssertionError(f"not finished after {most_starts} starts: {self}")

    def _ends_well(self) -> bool:
        kind, rank = self._chosen(), self.rng.randrange(RANKS)
        complete, reached, starts = self._complete(), self._reached(), len(self._events("start"))
        more = arguments("--timeout", str(HANG_SECONDS), steps=self.steps, every=EVERY)
        with Job(self.folder, RANKS, *more, faults=fault(kind, rank, self.rng)) as job:
            if kind == "kill all at the start":
                time.sleep(self.rng.uniform(0, 1.5))
                for process in job.ranks.values():
                    process.kill()  # one that finds all steps done has ended by then
            job.await_end(*(other for other in range(RANKS) if kind != "stop one" or other != rank))
            if kind == "stop one":  # as torchrun and Slurm do with what does not end
                job.ranks[rank].kill()
            codes = job.codes()
        for start in self._events("start")[starts:]:
            assert start["step"] >= complete, f"{start}: {complete} was complete\n{job.output()[-6000:]}"
            self.lost.append(reached + 1 - start["step"])
        (self.folder / "filler").unlink(missing_ok=True)
        if self._reached() == self.steps - 1:
            return codes == [0] * RANKS
        assert set(codes) <= EXPECTED[kind], f"{kind}: {codes}\n{job.output()[-6000:]}"
        self.happened[kind] += 1
        if kind in ("kill one", "exit one", "raise one", "stop one"):
            assert report(self.folder)["cause"]["rank"] == rank, f"{kind} {rank}: {report(self.folder)}"
        if kind == "damage newest":
            self._damage()
        return False

    def _chosen(self) -> str:
        if self.kinds:
            count = self.happened.total()
            return self.kinds[count] if count < len(self.kinds) else "nothing"
        kinds = {kind: often for kind, often in KINDS.items() if kind != "full disk" or self.folder.is_mount()}
        return self.rng.choices(list(kinds), list(kinds.values()))[0]

    def _damage(self) -> None:
        """Flip a bit of the newest checkpoint, if there is another one to fall back to."""
        stores = (self.folder / "saves", self.folder / "saves" / "snapshot")
        found = [(name, store) for store in stores for name in committed(LocalStorage(store))]
        sound = sorted((name.step, str(name), store) for name, store in found if str(name) not in self.damaged)
        if len(sound) > 1:
            _, name, store = sound[-1]
            damage(store / "data" / name)
            self.damaged.add(name)

    def _events(self, kind: str) -> list[dict[str, Any]]:
        """Of all run folders: a start before the first checkpoint makes a new one."""
        return [event for run in runs(self.folder) for event in events_in(run, kind)]

    def _complete(self) -> int:
        """Steps of the newest checkpoint that the job told to be complete, and that nothing happened to."""
        names = [event["name"] for event in self._events("checkpoint_done") if event["name"] not in self.damaged]
        return max((int(name.split("-")[0]) for name in names), default=0)

    def _reached(self) -> int:
        """The last step that was ever trained."""
        lines = (line for run in runs(self.folder) for line in read_objects(run / "metrics.jsonl"))
        return max((line["step"] for line in lines), default=-1)

    def __str__(self) -> str:
        told = ", ".join(f"{count} x {kind}" for kind, count in self.happened.most_common())
        return (
            f"{self.steps} steps, {self.happened.total()} faults ({told}), {sum(self.lost)} steps trained again, at "
            f"most {max(self.lost, default=0)} after one fault, {len(self.damaged)} checkpoints damaged"
        )
