"""The cost of metrics is measured on what a run really does. No test asserts a time."""

from __future__ import annotations

from pathlib import Path

from internlm_lite.apps.bench.metrics_cost import FOLDERS, TURN_STEPS, bench_metrics
from internlm_lite.apps.report.writer import open_report
from tests.apps.bench.test_bench import CPU, SHAPE
from tests.steps import read_metrics


def test_every_sink_gets_every_line(tmp_path: Path) -> None:
    result = bench_metrics(CPU, rounds=2, folder=tmp_path, sinks={"the report": open_report}, **SHAPE)
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(TURN_STEPS * 4))  # to open, to warm up, two rounds
    tokens = [folder[0] for folder in lines[0]["folders"].values()]
    assert len(tokens) <= FOLDERS and sum(tokens) == 60  # 4 sequences of 16 tokens, each with 15 labels
    assert (tmp_path / "log").read_text().count(" step=") == len(lines)
    assert list((tmp_path / "tensorboard").iterdir()) and (tmp_path / "report.html").is_file()
    assert result.ratio == result.told_seconds / result.quiet_seconds > 0
    assert result.share == (result.line_seconds + result.thread_seconds) / result.quiet_seconds > 0
