"""The messages in docs/trouble.md are those that the program prints."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import numpy as np
import pytest

from internlm_lite.data.megatron import writing
from internlm_lite.data.tokenizer import train_tokenizer
from tests import cli
from tests.cli import ROOT
from tests.corpus import write_corpus

ROWS = re.findall(r"^\| `([^`]+)` \|", (ROOT / "docs/trouble.md").read_text(encoding="utf-8"), re.MULTILINE)
PROVOKED = {
    "--config=none.py": ["cannot read the config file"],
    "model.hidden_sise=8 SEQ_LENN=8": [
        "unknown key; nearest known key:",
        "the config file has no variable of this name",
    ],
    "parallel.tensor=2 ckpt.enable_save_ckpt=True": [
        "one copy of the model takes … processes; found …, expected a multiple of",
        "found True without ckpt.save_ckpt_folder",
    ],
    "--dry-run --world-size=6 parallel.zero1=4": ["expected a divisor of the data parallel size"],
    "data.train_folder=nowhere": ["expected a folder of tokenised data"],
    "data.train_folder=empty": ["holds no tokenised data"],
    "VOCAB_SIZE=256 data.tokenizer=tokenizer.model": ["has a vocabulary of …, but … is …; expected at least"],
    "data.train_folder=prompts": ["found no label in its … documents"],
    "data.train_folder=corpus data.min_length=61": [
        "is not used: its … documents of at least min_length",
        "fills one row of micro_bsz * seq_len",
    ],
    "data.train_folder=corpus data.micro_num=100": [
        "the training data fill … rows of micro_bsz * seq_len tokens, expected at least"
    ],
    "--device=cuda": ["no GPU is visible on host … to torch"],
    "--resume=nowhere": ["holds no checkpoint; expected a save folder, or one checkpoint of it"],
}
"""Arguments -> what they bring about: the mistakes that are made first."""


@pytest.fixture(scope="module")
def said() -> str:
    """All string literals of the package, one a line; what an f-string fills in is left out."""
    lines = []
    for file in [*ROOT.glob("internlm_lite/**/*.py"), *ROOT.glob("tools/*.py")]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "{}" for part in node.values]
                lines.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                lines.append(node.value)
    return "\n".join(lines)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    here = tmp_path_factory.mktemp("trouble")
    write_corpus(here / "corpus")
    (here / "empty").mkdir()
    (here / "prompts" / "en").mkdir(parents=True)
    with writing(here / "prompts" / "en" / "a.bin", np.dtype(np.int16)) as out:
        for _ in range(40):
            out.add(np.full(60, -5))
    train_tokenizer(["some words", "and others"], here / "tokenizer.model", 275, threads=1)
    return here


def test_there_are_rows() -> None:
    assert len(ROWS) > 20


@pytest.mark.parametrize("message", ROWS)
def test_the_program_says_so(message: str, said: str) -> None:
    for words in message.split("…"):
        assert words.strip(" :()") in said, f"docs/trouble.md: nothing says {words.strip()!r}"


@pytest.mark.parametrize("arguments", PROVOKED)
def test_a_users_mistake_is_answered_with_it(arguments: str, folder: Path) -> None:
    log = folder / "output.log"
    command = ["--config", str(ROOT / "configs/tiny.py"), *arguments.split()]
    hidden = {"CUDA_VISIBLE_DEVICES": ""}
    ended = cli.ended(cli.start("train.py", *command, folder=folder, log=log, environment=hidden), log)
    assert ended.code == 2 and "Traceback" not in ended.output, ended.output
    for message in PROVOKED[arguments]:
        assert message in ROWS
        assert all(words in ended.output for words in message.split("…")), ended.output
