"""Show a run where you like: a sink of your own, which writes step, loss and speed to a CSV file.

    python examples/own_sink.py

A sink gets every step line, evaluation, event and sample on rank 0. Its methods must be quick: hand slow work, such as
a request to a server, to a thread. A sink that raises is reported once and switched off; training goes on.
"""

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from internlm_lite.cli import train
from internlm_lite.cli.starter import starter_folder
from internlm_lite.config.schema import Config
from internlm_lite.monitor.record import Sink, StepRecord


class CsvFile(Sink):
    def __init__(self, path: Path) -> None:
        self._file = path.open("a", newline="")
        self._rows = csv.writer(self._file)

    def step(self, record: StepRecord) -> None:
        self._rows.writerow([record.step, record.loss, record.speed.tgs])

    def event(self, kind: str, facts: Mapping[str, Any]) -> None:
        self._rows.writerow([facts.get("step"), kind])

    def close(self) -> None:
        self._file.close()


def open_csv(folder: Path, config: Config) -> Sink | None:
    """Called on rank 0 with the run folder. None: this run needs no such file."""
    return CsvFile(folder / "loss.csv")


def main() -> None:
    config = str(starter_folder() / "configs" / "tiny.py")
    train.main(["--config", config, "JOB_NAME=own_sink"], sinks={"loss.csv": open_csv})  # ends the process


if __name__ == "__main__":
    main()
