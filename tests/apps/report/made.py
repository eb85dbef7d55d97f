"""Run folders with made-up numbers, as training writes them: metrics.jsonl, events.jsonl, samples.jsonl, config, env.

The curves are smooth decays with seeded noise, so that a page drawn from them looks like one of a real run.
"""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import numpy as np

from internlm_lite.apps.report.live_runs import LiveRuns
from internlm_lite.apps.report.page import write_report
from internlm_lite.apps.report.payload import make_payload
from internlm_lite.apps.report.run import RunReader
from internlm_lite.apps.report.server import Dashboard

STEPS = 300
START = datetime(2026, 11, 21, 10, 0, tzinfo=timezone.utc)
STEP_SECONDS = 1.5
SIX = ("code", "docs", "web", "books", "maths", "dialogue")
ELEVEN = (*SIX, "papers", "law", "wiki", "forum", "news")
MANY = tuple(f"{name}_{part}" for part in ("a", "b", "c") for name in ELEVEN)
HOSTILE = (
    "</script><img src=x onerror=alert(1)>",
    "<b>bold</b>",
    "constructor",
    "__proto__",
    "a\"b'c&d,e=f#g",
    "中文 数据",
)
PROMPTS = ("def fibonacci(n):", "The library is")


def time_of(step: int) -> str:
    return (START + timedelta(seconds=STEP_SECONDS * (step + 1))).isoformat(timespec="milliseconds")


def write_lines(path: Path, values: Iterable[dict[str, Any]], mode: str = "a") -> None:
    with path.open(mode, encoding="utf-8") as file:
        file.writelines(json.dumps(value, ensure_ascii=False) + "\n" for value in values)


def step_line(
    step: int, folders: Sequence[str], random: np.random.Generator, seg: int = 0, offset: float = 0.0
) -> dict[str, Any]:
    """One object of metrics.jsonl. `offset` is added to every loss."""
    decay = math.exp(-step / 250)
    noise = random.normal(0, 0.05, len(folders) + 1)
    figures: dict[str, list[Any]] = {}
    for index, name in enumerate(folders):
        loss = 1.6 + 0.22 * (index % 7) + (7.5 - 0.2 * index % 2) * decay + noise[index] + offset
        tokens = int(16384 / (index + 2) * (1 + noise[index])) if (step + index) % 41 else 0
        figures[name] = [tokens, round(loss, 4) if tokens else None, round(0.62 * (1 - decay), 4) if tokens else 0.0]
    total = sum(value[0] for value in figures.values()) or 1
    loss = sum(value[0] * (value[1] or 0) for value in figures.values()) / total
    speed = 11800 + 400 * noise[-1] - (4000 if step % 97 == 60 else 0)
    return {
        "seg": seg, "time": time_of(step), "step": step, "loss": round(loss, 5), "tflops": round(speed / 62, 2),
        "lr": 3e-4 * min(1, (step + 1) / 40) * (0.55 + 0.45 * math.cos(step / 400)),
        "loss_scale": 65536.0 / (2 if step >= 150 else 1),
        "grad_norm": {"0_default": 1.2 + 6 * decay + noise[-1], "1_fp32": 0.0},
        "micro_num": 4, "num_consumed_tokens": 65536 * (step + 1), "inf_nan_skip_batches": int(step >= 150),
        "num_samples_in_batch": 18, "largest_length": 2048, "largest_batch": 6, "smallest_batch": 3, "adam_beta2": 0.95,
        "fwd_bwd_time": round(1.3 + 0.02 * noise[-1], 3), "acc": round(0.62 * (1 - decay), 4),
        "perplexity": round(math.exp(loss), 4), "loss_from_metric": round(loss, 5), "mfu": round(speed / 62 / 312, 4),
        "eta_seconds": STEP_SECONDS * max(0, 999 - step), "pack_fill": 0.987, "memory_bytes": 61 * 2**30 + step * 2**20,
        "tgs": round(speed, 2), "last_tgs_1": round(speed, 2), "tgs_all": 11700.0, "tgs_avg": 11720.0,
        "tgs_sma": round(11800 + 40 * noise[-1], 2), "last_tgs_10": 0, "last_tgs_50": 0, "folders": figures,
    }  # fmt: skip


def step_lines(
    steps: Iterable[int], folders: Sequence[str] = SIX, seg: int = 0, offset: float = 0.0
) -> list[dict[str, Any]]:
    random = np.random.default_rng(len(folders) + 100 * seg)
    return [step_line(step, folders, random, seg, offset) for step in steps]


def events(steps: int, folders: Sequence[str], end: str | None = "done") -> list[dict[str, Any]]:
    """What happened in a run of that many steps, with an evaluation and a checkpoint every tenth of it."""
    every = max(1, steps // 10)
    found: list[dict[str, Any]] = [
        {"time": START.isoformat(), "seg": 0, "event": "start", "step": 0, "total_steps": steps if end else 1000,
         "log_every": 1, "world_size": 8, "folders": list(folders), "folder_tokens": dict.fromkeys(folders, 500_000)}
    ]  # fmt: skip
    for step in range(every - 1, steps, every):
        decay = math.exp(-step / 250)
        scores = {name: [4096, round(1.75 + 0.22 * (i % 7) + 7.4 * decay, 4), 0.6] for i, name in enumerate(folders)}
        mean = sum(value[1] for value in scores.values()) / max(1, len(scores))
        kind = "milestone" if (step + 1) % (2 * every) == 0 else "snapshot"
        name = f"{step + 1}" if kind == "milestone" else f"snapshot_{(step // every) % 2}"
        found += [
            {"time": time_of(step), "seg": 0, "event": "evaluation", "step": step, "loss": mean, "acc": 0.6,
             "folders": scores},
            {"time": time_of(step), "seg": 0, "event": "checkpoint", "step": step, "saved": kind, "name": name,
             "waited": False, "stall_seconds": 0.41},
            {"time": time_of(step + 3), "seg": 0, "event": "checkpoint_done", "name": name, "saved": kind},
        ]  # fmt: skip
    if end:
        found.append({"time": time_of(steps), "seg": 0, "event": end, "step": steps})
    return found


ALERTS = [
    {"event": "alert", "rule": "tgs_down", "step": 61, "text": "7,800 tokens/GPU/s, 33 % below the average of 11,700"},
    {"event": "alert_over", "rule": "tgs_down", "step": 66},
    {"event": "alarm", "what": "checkpoint failed", "checkpoint": "66", "why": "no space left on the storage"},
]


def make_run(
    folder: Path, steps: int = 300, folders: Sequence[str] = SIX, end: str | None = "done", offset: float = 0.0
) -> Path:
    """A whole run folder with everything in it. `end` None: it still trains. Returns `folder`."""
    folder.mkdir(parents=True)
    write_lines(folder / "metrics.jsonl", step_lines(range(steps), folders, offset=offset))
    alerts = [{"time": time_of(61), "seg": 0, **alert} for alert in ALERTS] if steps > 100 else []
    happened = sorted(events(steps, folders, end) + alerts, key=lambda event: event["time"])
    write_lines(folder / "events.jsonl", happened)
    write_lines(folder / "samples.jsonl", samples(steps))
    write_config(folder, lr=3e-4 + offset)
    return folder


def samples(steps: int) -> list[dict[str, Any]]:
    texts = ("e e e the the e", "the list of the list is the value", "a collection of modules that programs can use.")
    every = max(1, steps // 5)
    return [
        {
            "step": step,
            "time": time_of(step),
            "prompt": prompt,
            "text": f" {texts[min(2, 3 * step // steps)]}\n    (step {step})",
        }
        for step in range(every, steps + 1, every)
        for prompt in PROMPTS
    ]


def write_config(folder: Path, lr: float) -> None:
    rows = [
        {"key": "data.seq_len", "value": 2048, "origin": "configs/demo.py:12"},
        {"key": "data.train_folder", "value": "tokens/train", "origin": "configs/demo.py:13"},
        {"key": "adam.lr", "value": lr, "origin": "command line"},
        {"key": "parallel.zero1", "value": -1, "origin": None},
        {"key": "model.num_layers", "value": 32, "origin": "configs/demo.py:31"},
    ]
    (folder / "config.origins.json").write_text(json.dumps(rows), encoding="utf-8")
    facts = {
        "host": "node-1",
        "device": "NVIDIA A100-SXM4-80GB",
        "world_size": 8,
        "command": ["train.py", "--config", "demo.py"],
        "packages": {"torch": "2.13.0", "numpy": "2.3.0"},
    }
    (folder / "env.json").write_text(json.dumps(facts), encoding="utf-8")


def make_long_run(folder: Path, steps: int = 50_000, folders: Sequence[str] = MANY) -> Path:
    """A long run of many folders, quickly: lines of a short one over and over, each with its own step and time."""
    folder.mkdir(parents=True)
    blocks = [json.dumps(line)[1:] for line in step_lines(range(500), folders)]
    ends = [block[block.index('"loss"') :] for block in blocks]
    with (folder / "metrics.jsonl").open("w", encoding="utf-8") as file:
        for step in range(steps):
            file.write(f'{{"seg":0,"time":"{time_of(step)}","step":{step},{ends[step * 500 // steps]}\n')
    write_lines(folder / "events.jsonl", events(steps, folders))
    return folder


def report(*folders: Path, now: datetime | None = None) -> Path:
    """report.html over those run folders, in the first, as it is written now or at another time."""
    readers = [
        (f"r{index}", RunReader(folder, f"demo/{folder.name}").read_all()) for index, folder in enumerate(folders)
    ]
    path = folders[0] / f"report{len(folders)}.html"
    write_report(make_payload(readers, live=False, now=now), path)
    return path


@contextmanager
def dashboard(*folders: Path) -> Iterator[str]:
    """The address of a server over those folders."""
    watch = LiveRuns(folders)
    with Dashboard(watch, 0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield server.address
        finally:
            server.shutdown()
            thread.join(10)
            watch.close()
