"""`internlm-lite new`: the config it writes passes a dry run, fits the memory, and says why."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from internlm_lite.apps.planner.device_file import load_device
from internlm_lite.apps.planner.propose import MOST_EPOCHS, Data, Hardware, Wish, propose
from internlm_lite.apps.planner.sizes import RULES, size_row
from internlm_lite.config.load import check_config, load_config
from tests.cli import run
from tests.corpus import write_corpus
from tests.data.corpora import random_documents, write_native

GIB = 2**30


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """5 M tokens without a record of their tokenizer: more than a global batch of the largest run here."""
    root = tmp_path_factory.mktemp("new") / "tokens"
    write_native(root / "train" / "a" / "some.bin", [np.ones(2500, dtype=np.int64)] * 2000)
    write_native(root / "valid" / "a" / "some.bin", random_documents(7, 50, 200, vocab_size=500))
    return root


def _data(folder: Path, tokens: int) -> Data:
    """The folder, as if it held so many tokens."""
    return Data(folder / "train", tokens, longest=3000, vocab_size=32_000, tokenizer=None, valid=None)


def _gpus(ranks: int) -> Hardware:
    device = load_device("h100")
    return Hardware(ranks, 79 * GIB, device.peak_tflops["bf16"] * 1e12, device)


def test_a_time_on_gpus_decides_the_size(corpus: Path) -> None:
    data = _data(corpus, 10**12)
    proposal, seconds = propose(data, _gpus(8), Wish(seconds=24 * 3600))
    assert seconds == pytest.approx(24 * 3600, rel=0.1)  # by the speed that the plan predicts, not by a guess
    spent = proposal.steps * proposal.tokens_per_step * 6 * proposal.shape.parameters
    row = size_row(RULES[0], spent, 32_000, 4096)
    assert proposal.shape.parameters == pytest.approx(row.shape.parameters, rel=0.15)
    assert proposal.seq_len == 4096  # 3000 tokens, rounded up to a power of two
    assert proposal.tokens_per_step == pytest.approx(proposal.batch_tokens, rel=0.3)


def test_a_size_is_laid_out_so_that_it_fits(corpus: Path) -> None:
    wish = Wish(parameters=13e9)
    small, _ = propose(_data(corpus, 10**13), _gpus(8), wish)
    assert small.tensor * small.pipeline > 1 or small.recomputed
    many, _ = propose(_data(corpus, 10**13), dataclasses.replace(_gpus(64), memory=139 * GIB), wish)
    assert (many.tensor, many.pipeline) == (1, 1)
    assert many.steps * many.tokens_per_step == pytest.approx(20 * many.shape.parameters, rel=0.02)


def test_few_data_are_not_repeated_more_often_than_is_worth_it(corpus: Path) -> None:
    data = _data(corpus, 10**7)
    proposal, seconds = propose(data, _gpus(8), Wish(seconds=24 * 3600))
    assert proposal.steps * proposal.tokens_per_step == pytest.approx(MOST_EPOCHS * data.tokens, rel=0.02)
    assert seconds < 3600 and "more data" in proposal.reasons["steps"]
    assert proposal.shape.parameters < 10**7


def test_more_time_than_few_data_need_gives_the_smallest_shape(corpus: Path) -> None:
    """The rule has none for so little compute; before, more time was asked for."""
    data = dataclasses.replace(_data(corpus, 20_000), vocab_size=1024)
    proposal, _ = propose(data, Hardware(1, 8 * GIB, 5e10), Wish(seconds=3600))
    assert proposal.shape.parameters < 300_000
    assert proposal.steps * proposal.tokens_per_step == pytest.approx(MOST_EPOCHS * data.tokens, rel=0.1)


def test_the_written_config_passes_a_dry_run(tmp_path: Path) -> None:
    root = write_corpus(tmp_path / "text", documents=200)
    wish = ("--data", str(root), "--vocab-size", "96", "--params", "1M", "--device", "cpu")
    written = run("tools/new.py", *wish, "--output", "configs/mine.py", folder=tmp_path)
    assert written.code == 0, written.output
    for name in ("shape", "steps", "lr", "batch", "seq_len", "layout"):
        assert f"  {name}: " in written.output
    loaded = load_config(tmp_path / "configs" / "mine.py")
    check_config(loaded, 1)
    assert loaded.config.JOB_NAME == "mine" and not loaded.notes
    shown = run("train.py", "--config", "configs/mine.py", "--dry-run", folder=tmp_path)
    assert shown.code == 0, shown.output
    short = load_config(tmp_path / "configs" / "mine.py", ["STEPS=5"])  # a first try of a few steps
    check_config(short, 1)
    assert short.config.lr_scheduler.warmup_steps == 1
    again = run("tools/new.py", *wish, "--output", "configs/mine.py", folder=tmp_path)
    assert again.code == 2 and "expected a new file" in again.output


WRONG = {
    "no time and no size": ([], "expected --hours, --params, or both"),
    "no folder": (["--data", "nowhere", "--hours", "1"], "nowhere is missing"),
    "no vocabulary": (["--hours", "1"], "expected --tokenizer FILE"),
    "no time for any shape": (
        ["--hours", "1e-9", "--vocab-size", "500", "--device", "cpu"],
        "--hours: 0.0 s on this hardware: found",
    ),
    "no time for two steps": (
        ["--hours", "1e-9", "--params", "1M", "--vocab-size", "500", "--device", "cpu"],
        "expected at least 2 steps; give more --hours",
    ),
    "no number": (["--hours", "soon"], "expected a number > 0"),
    "no size": (["--params", "3 million"], "expected parameters, such as 124M"),
    "too large": (["--params", "9000B", "--vocab-size", "500", "--device", "h100"], "in no layout"),
    "no validation data": (["--hours", "1", "--vocab-size", "500", "--valid", "nope"], "data.valid_folder: nope is"),
    "one step": (["--params", "1M", "--hours", "1e-9", "--vocab-size", "500"], "expected at least 2 steps"),
    "a name that no config may have": (
        ["--params", "1M", "--vocab-size", "500", "--device", "cpu", "--output", "..py"],
        "JOB_NAME: found '.'",
    ),
    "no device": (["--hours", "1", "--vocab-size", "500", "--device", "h1000"], "--device h1000"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_wishes_are_answered_in_a_sentence(case: str, corpus: Path, tmp_path: Path) -> None:
    arguments, expected = WRONG[case]
    ended = run("tools/new.py", "--data", str(corpus), "--output", "x.py", *arguments, folder=tmp_path)
    assert ended.code != 0 and expected in ended.output and "Traceback" not in ended.output
    assert not list(tmp_path.glob("*.py"))
