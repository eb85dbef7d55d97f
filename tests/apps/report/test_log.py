"""Runs read from logs: the seed's own six lines, launchers' prefixes, colours, restarts, logs without a step."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from internlm_lite.apps.report.log_reader import LogRun, read_log
from internlm_lite.apps.report.payload import run_payload
from internlm_lite.errors import ConfigError
from tests.apps.report.small import BEGIN

SEED = (Path(__file__).parents[2] / "monitor" / "data" / "seed.log").read_text("utf-8").splitlines()


def read(folder: Path, *lines: str) -> LogRun:
    path = folder / "train.log"
    path.write_text("".join(f"{text}\n" for text in lines), encoding="utf-8")
    return read_log(path)


def moved(text: str, step: int) -> str:
    """The line as that of another step."""
    return re.sub(r" step=\d+ ", f" step={step} ", text)


def test_the_seeds_log_is_six_steps_and_its_folder_learns(tmp_path: Path) -> None:
    log = read(tmp_path, *SEED)
    payload = run_payload("r0", log.run, BEGIN)
    assert log.n_skipped == 0
    assert payload["series"]["step"] == [0, 1, 2, 3, 4, 5]
    losses = payload["series"]["folders"][".git"]["loss"]
    assert (losses[0], losses[-1]) == (11.5552, 7.0646)
    git, *others = payload["folders"]
    assert (git["name"], git["first_loss"], git["loss"], git["share"]) == (".git", 11.5552, 7.0646, 1.0)
    assert len(others) == 32
    assert all(other["loss"] is None and other["tokens"] == 0 for other in others)
    assert (payload["state"]["step"], payload["state"]["tokens"]) == (6, 393216)
    assert payload["series"]["loss"][0] == 11.54258
    ends = ("log", "ends at 2023-11-10T11:46:37.686+08:00", None)
    assert tuple(payload["state"][key] for key in ("phase", "why", "eta_seconds")) == ends


def test_prefixes_colours_and_other_lines(tmp_path: Path) -> None:
    log = read(
        tmp_path,
        "2023-11-10 11:46:02,371 INFO parallel_context.py:555 in set_device -- process rank 0 is bound to host",
        f"0: {SEED[0]}",
        f"\x1b[32m[rank0]:{SEED[1]}\x1b[0m",
        "",
        "2023-11-10T11:46:20.794+08:00 INFO [a.py, line 1, in f] - pid=1 : evaluation is near",
        SEED[2] + "\r",
    )
    assert log.run.columns.step.tolist() == [0, 1, 2]
    assert log.run.columns.scalars["fwd_bwd_time"].tolist() == [13.47, 3.7, 3.43]
    assert log.n_skipped == 3


def test_a_restart_in_a_log_is_drawn_once(tmp_path: Path) -> None:
    log = read(tmp_path, *SEED[:4], moved(SEED[5], 2), moved(SEED[5], 3))
    payload = run_payload("r0", log.run, BEGIN)
    assert payload["series"]["step"] == [0, 1, 2, 3]
    assert payload["series"]["loss"][2:] == [7.049616] * 2
    assert [(one["seg"], one["step"]) for one in payload["restarts"]] == [(1, 2)]


def test_a_line_printed_by_two_ranks_counts_once(tmp_path: Path) -> None:
    log = read(tmp_path, *[f"{rank}: {text}" for text in SEED for rank in (0, 1)])
    assert log.run.columns.n == 6
    assert log.run.columns.starts == {0: 0}


def test_a_log_without_steps_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"found no step line in the 2 lines of .*train.log; expected InternLM's"):
        read(tmp_path, "hello", "world")
    broken = SEED[0].replace(" lr=", " rate=")
    with pytest.raises(ConfigError, match=r"a step line lacks or garbles 'lr'"):
        read(tmp_path, broken)
    with pytest.raises(ConfigError, match=r"cannot read .*gone: No such file"):
        read_log(tmp_path / "gone")
    (tmp_path / "binary").write_bytes(bytes(range(256)) * 10)
    with pytest.raises(ConfigError, match="found no step line"):
        read_log(tmp_path / "binary")
