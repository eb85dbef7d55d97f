"""Runs read from logs: the seed's own six lines, launchers' prefixes, colours, restarts, logs without a step."""

from __future__ import annotations

import re
import time
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


DASHES = "2023-07-10 10:00:{step:02d},250\tINFO train.py:323 in record_current_batch_training_metrics -- "
UNISCALE = "2023-09-05T10:00:{step:02d}.250+0800 INFO [pipeline.py, line 413, in record] - pid=6794 : "
TGS = "tgs (tokens/gpu/second)=10.5"
AVERAGES = "tgs/last_tgs_1=1 tgs/tgs_all=2 tgs/tgs_avg=3 tgs/tgs_SMA=4 tgs/last_tgs_10=0 tgs/last_tgs_50=0"
REST = "micro_num=4 num_consumed_tokens=1000 inf_nan_skip_batches=0 num_samples_in_batch=9 largest_length=64"
ACC = "acc=0.1 perplexity=50.5 acc/en=0.1 acc/cn=0.0 tokens/en=900 tokens/cn=0"
LOSSES = "loss_from_metric=4.0 loss/en=4.5 loss/cn=nan"
FORMATS = {
    "2023-07 without tflops": DASHES + "step={step},loss={loss},tgs (tokens per gpu per second)=10.5,lr=1e-05,"
    "loss_scale=65536.0,grad_norm=2.5,micro_num=4,num_consumed_tokens=1000,fwd_bwd_time=3.57",
    "2023-07 commas": DASHES + f"tflops=1.5,step={{step}},loss={{loss}},{TGS},lr=1e-05,grad_norm=2.5",
    "2023-08 accuracies": DASHES + f"tflops=1.5 step={{step}} loss={{loss}} {TGS} grad_norm=2.5 {REST} {ACC} ",
    "2023-09 uniscale": UNISCALE + f"tflops=1.5 step={{step}} loss={{loss}} {TGS} lr=4.0000000000000003e-07 "
    f"grad_norm={{{{'0_default': 2.5}}}} {REST} {ACC} {LOSSES} ",
    "2024 averages": DASHES + f"tflops=1.5 step={{step}} loss={{loss}} {TGS} {AVERAGES} "
    f"grad_norm={{{{'0_default': 2.5, '1_fp32': 0.0}}}} {REST} adam_beta2=0.95 fwd_bwd_time=4.03 {ACC} {LOSSES} ",
    "2024-08 experts": DASHES + f"tflops=1.5 step={{step}} loss={{loss}} real_tgs=9.5 {TGS} {AVERAGES} "
    "grad_norm={{'0_default': 2.5, '1_fp32': inf, '2_moe_ep_size_4': 0.13}} moe_loss=3.29 "
    f"{REST} adam_beta2=0.95 fwd_bwd_time=8.99 bwd_time=5.91 BPB=0.7 {ACC} {LOSSES} ",
    "no time, cut short": f"INFO [metrics.py, line 341, in f] - pid=293 : step={{step}} loss={{loss}} {TGS} tgs/la",
    "commas and spaces": "step={step}, loss={loss}, tgs (tokens/gpu/second)=10.5, grad_norm=2.5",
    "colons": "[rank0]: step: {step}, loss: {loss}, tgs: 10.5, grad_norm: 2.5",
    "order": "loss={loss} tgs (tokens/gpu/second)=10.5 grad_norm=2.5 step={step}",
}


@pytest.mark.parametrize("name", FORMATS)
def test_the_formats_of_all_years(tmp_path: Path, name: str) -> None:
    log = read(tmp_path, *[FORMATS[name].format(step=step, loss=9.5 - step) for step in range(3)])
    payload = run_payload("r0", log.run, BEGIN)
    drawn = payload["series"]
    assert (log.n_skipped, drawn["step"], drawn["loss"]) == (0, [0, 1, 2], [9.5, 8.5, 7.5])
    assert "colons" in name or drawn["tgs"] == [10.5] * 3
    assert "cut" in name or drawn["grad_norm/0_default"] == [2.5] * 3
    assert ACC not in FORMATS[name] or [folder["name"] for folder in payload["folders"]] == ["en", "cn"]
    assert LOSSES not in FORMATS[name] or drawn["folders"]["en"]["loss"] == [4.5] * 3
    times = drawn["time"]
    assert times == [None] * 3 if not FORMATS[name].startswith("2023") else times[2] - times[0] == 2.0
    assert payload["state"]["why"].startswith("ends at 2023-") or times == [None] * 3


def test_a_log_without_steps_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"found no step line in the 2 lines of .*train.log; expected lines with st"):
        read(tmp_path, "hello", "world")
    with pytest.raises(ConfigError, match=r"found no step line in the 1 lines of .*train.log"):
        read(tmp_path, SEED[0].replace(" loss=", " cost="))
    with pytest.raises(ConfigError, match=r"cannot read .*gone: No such file"):
        read_log(tmp_path / "gone")
    (tmp_path / "binary").write_bytes(bytes(range(256)) * 10)
    with pytest.raises(ConfigError, match="found no step line"):
        read_log(tmp_path / "binary")


def test_no_line_takes_long(tmp_path: Path) -> None:
    hostile = [
        f"step=0 {part * (200_000 // len(part))}"
        for part in ("loss/", "a", " ", "a ", "{", "acc/a=", "1=", "tgs (", "a={")
    ]
    begin = time.process_time()
    with pytest.raises(ConfigError, match="found no step line"):
        read(tmp_path, *hostile)
    assert time.process_time() - begin < 20
