"""One section of the GPU check; results are written to disk at once, so that a killed section keeps them."""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Measurement:
    """A measurement in a process of its own."""

    name: str
    """A function of `run_sections.SECTIONS`, then its arguments: "perf:1b:eager"."""
    seconds: float
    """Time-out in seconds."""
    alone: bool
    """Whether it must run alone because it measures speed; others may run concurrently."""


@dataclass
class Check:
    """The context of a section. `smoke`: on the CPU with tiny shapes, to test that every section runs."""

    result: Path
    scratch: Path
    repository: Path
    out: Path
    """Folder for files to keep with the results."""
    smoke: bool
    found: dict[str, Any] = field(default_factory=dict)
    """Results: `line`, the summary; `notes`, lines below it; `wrong`, failures; and facts by name."""

    @property
    def device(self) -> torch.device:
        return torch.device("cpu") if self.smoke else torch.device("cuda", 0)

    def tell(self, line: str | None = None, **facts: Any) -> None:
        """Store facts and the summary line."""
        self.found.update(facts)
        if line is not None:
            self.found["line"] = line
        temporary = self.result.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.found, default=str))
        os.replace(temporary, self.result)

    def note(self, text: str) -> None:
        """Add a line below the summary."""
        self.found.setdefault("notes", []).append(text)
        self.tell()

    def wrong(self, text: str) -> None:
        """Record a failure: the section fails."""
        self.found.setdefault("wrong", []).append(text)
        self.note(f"WRONG {text}")

    def synchronize(self) -> None:
        if not self.smoke:
            torch.cuda.synchronize()

    def milliseconds(self, call: Callable[[], object], warm_up: int = 3, rounds: int = 10) -> float:
        """Median milliseconds of `rounds` calls, measured by events on the device."""
        for _ in range(warm_up):
            call()
        self.synchronize()
        return statistics.median(self._one_call(call) for _ in range(rounds))

    def _one_call(self, call: Callable[[], object]) -> float:
        if self.smoke:
            start = time.perf_counter()
            call()
            return (time.perf_counter() - start) * 1e3
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end))
