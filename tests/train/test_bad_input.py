"""What a user can get wrong before the first step: one clear message, the right exit code, nothing lost."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from internlm_lite.data.megatron import writing
from tests import cli
from tests.corpus import write_corpus

CONFIG = """
JOB_NAME = "bad_input"
FOLDER = "corpus"
VOCAB = 96
data = dict(seq_len=32, micro_bsz=2, micro_num=2, total_steps=2, train_folder=FOLDER)
model = dict(num_attention_heads=2, hidden_size=16, num_layers=1, vocab_size=VOCAB, dtype="torch.float32")
ckpt = dict(enable_save_ckpt=True, save_ckpt_folder="local:saves")
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_corpus(tmp_path / "corpus")
    (tmp_path / "config.py").write_text(CONFIG)
    return tmp_path


def train(folder: Path, *arguments: str) -> cli.Ended:
    return cli.run("train.py", "--config", "config.py", "--device", "cpu", *arguments, folder=folder)


def truncate(folder: Path) -> None:
    path = folder / "corpus" / "docs" / "part.bin"
    path.write_bytes(path.read_bytes()[:-100])


def point_past_the_end(folder: Path) -> None:
    path = folder / "corpus" / "docs" / "part.idx"
    content = bytearray(path.read_bytes())
    (sequences,) = struct.unpack_from("<Q", content, 18)
    struct.pack_into("<q", content, 34 + 4 * sequences + 8 * (sequences - 1), 1 << 40)
    path.write_bytes(content)


def outside_the_vocabulary(folder: Path) -> None:
    (folder / "corpus" / "odd").mkdir()
    with writing(folder / "corpus" / "odd" / "part.bin", np.dtype(np.uint16)) as out:
        for _ in range(50):
            out.add(np.full(64, 96, np.uint16))


def block_the_saves(folder: Path) -> None:
    (folder / "saves").write_text("a file stands where the folder should be")


def remove_everything(folder: Path) -> None:
    for path in (folder / "corpus").rglob("part.*"):
        path.unlink()


def unprintable_name(folder: Path) -> None:
    (folder / "corpus" / "docs").rename(folder / "corpus" / "do\ncs")


def nothing(folder: Path) -> None:
    """The files are right; the command line is not."""


@pytest.mark.parametrize(
    ("damage", "arguments", "code", "words"),
    [
        (nothing, ["FOLDER=nowhere"], 2, ["nowhere", "train_folder"]),
        (remove_everything, [], 2, ["corpus", ".bin"]),
        (truncate, [], 2, ["part.bin", "truncated"]),
        (point_past_the_end, [], 2, ["part.idx", "points to byte"]),
        (unprintable_name, [], 2, ["do\\ncs", "rename"]),
        (outside_the_vocabulary, [], 2, ["odd/part.bin", "96"]),
        (nothing, ["data.min_length=55", "data.micro_num=2048"], 2, ["micro_num", "tokens"]),
        (nothing, ["data.tokenizer='none.model'"], 2, ["none.model"]),
        (block_the_saves, [], 6, ["saves"]),
        (nothing, ["parallel.tensor=2"], 2, ["parallel.tensor", "found 1 process,"]),
        (nothing, ["--resume", "nothing/here"], 2, ["nothing/here"]),
        (nothing, ["modle.hidden_size=8"], 2, ["modle", "model"]),
    ],
)
def test_bad_input(damage: Callable[[Path], None], arguments: list[str], code: int, words: list[str], folder: Path):
    damage(folder)
    before = {path: path.read_bytes() for path in folder.rglob("*.*") if path.is_file()}
    ended = train(folder, *arguments)
    assert ended.code == code, ended.output
    assert "Traceback" not in ended.output
    assert all(word in ended.output for word in words), ended.output
    assert all(path.read_bytes() == content for path, content in before.items())


def test_resume_with_another_model_shape_keeps_the_checkpoint(folder: Path):
    assert train(folder).code == 0
    commits = list((folder / "saves" / "commits").iterdir())
    ended = train(folder, "model.hidden_size=32")
    assert ended.code == 2, ended.output
    assert "Traceback" not in ended.output
    assert "hidden_size" in ended.output
    assert list((folder / "saves" / "commits").iterdir()) == commits


def test_a_good_run_writes_what_it_promises(folder: Path):
    ended = train(folder, "data.valid_every=1", "data.valid_folder='corpus'")
    assert ended.code == 0, ended.output
    assert "tgs/last_tgs_1=" in ended.output
    assert "loss/books=" in ended.output
    run = folder / "RUN" / "bad_input" / "latest"
    for name in ("config/config.py", "config.resolved.yaml", "env.json", "metrics.jsonl", "events.jsonl"):
        assert (run / name).stat().st_size > 0, name
    assert (run / "logs" / "rank-00000.log").read_text().count("INFO") > 3
    assert '"event":"evaluation"' in (run / "events.jsonl").read_text()
