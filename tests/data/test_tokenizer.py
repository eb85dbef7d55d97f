"""Training a tokenizer, tokenising folders of text, and the checks between tokenizer, data and model."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from internlm_lite.batch import IGNORE, Position
from internlm_lite.data.data_loader import open_training_data, open_validation_data
from internlm_lite.data.documents import read_metadata
from internlm_lite.data.encode import FolderEncoder
from internlm_lite.data.folders import open_documents
from internlm_lite.data.text import DEFAULTS, find_text, read_documents, sample_text
from internlm_lite.data.text_files import BadLimit, Tally
from internlm_lite.data.tokenizer import Tokenizer, train_tokenizer
from internlm_lite.errors import DataError
from tests.data.corpora import data_config

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "internlm_lite").rglob("*.py"))
VOCAB_SIZE = 500


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    texts = (path.read_text() for path in SOURCES)
    return train_tokenizer(texts, tmp_path_factory.mktemp("tokenizer") / "t.model", VOCAB_SIZE, threads=1)


def _source(folder: Path) -> Path:
    """Text of every kind: a tree of files and JSON lines."""
    (folder / "sub").mkdir(parents=True)
    (folder / "a.py").write_text("def f(x):\n    return x  # \u00e9\n")
    (folder / "sub" / "b.md").write_text("# Title\n\n  text ")
    (folder / "sub" / "c.bin").write_bytes(b"\x00\x01")
    (folder / "d.jsonl").write_text("".join(json.dumps({"text": f"line {i} " * 20}) + "\n" for i in range(40)))
    return folder


def _decoded(bin_path: Path, tokenizer: Tokenizer) -> list[str]:
    documents = open_documents(bin_path)
    found = []
    for i, length in enumerate(documents.lengths.tolist()):
        tokens = documents.tokens(i, 0, length).tolist()
        assert (tokens[0], tokens[-1]) == (tokenizer.bos, tokenizer.eos)
        found.append(tokenizer.decode(tokens))
    return found


@pytest.mark.parametrize(
    "text", ["", " x", "  a\n\n\t b \r\n", "\u2581 \u2581x", "\x00", "日本語 \U0001f600", "e\u0301\u00a0", "<s>"]
)
def test_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(max_examples=200, deadline=None)
@given(text=st.text())
def test_round_trip_of_any_text(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_round_trip_of_sources_and_special_tokens(tokenizer):
    assert (tokenizer.vocab_size, tokenizer.bos, tokenizer.eos) == (VOCAB_SIZE, 1, 2)
    for path in SOURCES[:20]:
        text = path.read_text()
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert len(ids) < len(text) / 1.5


def test_padding_ids_have_no_text(tokenizer):
    ids = tokenizer.encode("ab")
    assert tokenizer.decode([VOCAB_SIZE, *ids, 511]) == "ab"


@pytest.mark.parametrize("workers", [1, 2])
def test_encode_folder(tmp_path, tokenizer, workers):
    reported = []
    target = tmp_path / "out" / "mine"
    source = _source(tmp_path / "in")
    encoder = FolderEncoder(tokenizer.path, workers=workers, progress=lambda n_bytes, _: reported.append(n_bytes))
    metadata = encoder.encode(source, target).metadata
    texts = [source.joinpath("a.py").read_text(), *(f"line {i} " * 20 for i in range(40)), "# Title\n\n  text "]
    assert _decoded(target / "mine.bin", tokenizer) == texts
    assert sorted(path.name for path in target.iterdir()) == ["mine.bin", "mine.idx", "mine.meta.json"]
    assert [path.name for path in target.parent.iterdir()] == ["mine"]
    documents = open_documents(target / "mine.bin")
    assert documents.metadata == metadata == read_metadata(target / "mine.bin")
    assert (metadata.documents, metadata.tokens) == (42, int(documents.lengths.sum()))
    assert (metadata.longest, metadata.vocab_size) == (int(documents.lengths.max()), VOCAB_SIZE)
    assert metadata.text_bytes == sum(reported) == sum(len(text.encode()) for text in texts)
    assert metadata.tokenizer_sha256 == tokenizer.sha256


def test_prompts(tmp_path, tokenizer):
    source = tmp_path / "in"
    source.mkdir()
    records = [{"prompt": "Q: two and two?\n", "response": "A: four"}, {"prompt": "", "response": "free"}]
    (source / "x.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    FolderEncoder(tokenizer.path, workers=1).encode(source, tmp_path / "out" / "sft")
    documents = open_documents(tmp_path / "out" / "sft" / "sft.bin")
    tokens = documents.tokens(0, 0, int(documents.lengths[0]))
    prompt = 1 + len(tokenizer.encode(records[0]["prompt"]))
    assert tokens.dtype == np.int16 and (tokens[:prompt] < 0).all() and (tokens[prompt:] > 0).all()
    assert tokenizer.decode(tokens[prompt:]) == "A: four"
    config = data_config(tmp_path / "out", seq_len=4, micro_bsz=1, micro_num=1)
    batch = open_training_data(config, VOCAB_SIZE, 0, 1, 0).build(Position())
    assert set(batch.labels.flatten().tolist()) - {IGNORE} <= set(tokens[prompt:].tolist()) | set(
        tokenizer.encode("free")
    )


@pytest.mark.parametrize(("workers", "line"), [(1, '{"text": null}'), (2, '{"text": ')])
def test_too_many_bad_records_leave_nothing(tmp_path, tokenizer, workers, line):
    source = _source(tmp_path / "in")
    source.joinpath("z.jsonl").write_text("\n".join(['{"text": "good"}', *[line] * 11]))
    with pytest.raises(DataError, match=r"11 of 53 records are bad, .*z\.jsonl:2.*z\.jsonl:4.*\.\.\.\); correct them"):
        FolderEncoder(tokenizer.path, workers=workers).encode(source, tmp_path / "out" / "x")
    assert list((tmp_path / "out").iterdir()) == []
    options = dataclasses.replace(DEFAULTS, max_bad=BadLimit(count=11))
    made = FolderEncoder(tokenizer.path, workers, options).encode(source, tmp_path / "out" / "x")
    assert made.metadata.documents == 43 and any(": 11 (" in note for note in made.notes)


@pytest.mark.parametrize("name", ["z.txt", "z.jsonl"])
def test_unreadable_file(tmp_path, tokenizer, name):
    source = _source(tmp_path / "in")
    source.joinpath(name).symlink_to(tmp_path / "gone")
    expected = rf"{re.escape(name)}: No such file or directory; correct or remove it"
    with pytest.raises(DataError, match=expected):
        FolderEncoder(tokenizer.path, workers=1).encode(source, tmp_path / "out" / "x")
    with pytest.raises(DataError, match=expected):
        next(sample_text([source], DEFAULTS, 1000, Tally(BadLimit()), lambda *_: None))
    assert not (tmp_path / "out").exists()


def test_vanished_file(tmp_path):
    tally = Tally(BadLimit())
    (file,) = find_text(_source(tmp_path / "in") / "sub", DEFAULTS, tally)
    file.path.unlink()
    with pytest.raises(DataError, match=r"b\.md: No such file or directory; correct or remove it"):
        list(read_documents(file, DEFAULTS, tally))


def test_existing_output(tmp_path, tokenizer):
    source, target = _source(tmp_path / "in"), tmp_path / "out" / "x"
    FolderEncoder(tokenizer.path, workers=1).encode(source, target)
    with pytest.raises(DataError, match=r"exists already; .* --overwrite"):
        FolderEncoder(tokenizer.path, workers=1).encode(source, target)
    source.joinpath("d.jsonl").unlink()
    (target.parent / ".x.partial").mkdir()
    (target.parent / ".x.partial" / "x.bin").write_bytes(b"left by a killed run")
    assert FolderEncoder(tokenizer.path, workers=1).encode(source, target, overwrite=True).metadata.documents == 2
    assert [path.name for path in target.parent.iterdir()] == ["x"]


def test_old_tokens_are_restored_after_error(tmp_path, tokenizer, monkeypatch):
    source, target = _source(tmp_path / "in"), tmp_path / "out" / "x"
    FolderEncoder(tokenizer.path, workers=1).encode(source, target)
    rename = Path.rename

    def interrupted(path: Path, to: Path) -> Path:
        if path.name == ".x.partial":
            raise KeyboardInterrupt
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        FolderEncoder(tokenizer.path, workers=1).encode(source, target, overwrite=True)
    monkeypatch.undo()
    assert [path.name for path in target.parent.iterdir()] == ["x"]
    target.rename(target.with_name(".x.replaced"))  # as a killed run leaves it
    with pytest.raises(DataError, match="exists already"):
        FolderEncoder(tokenizer.path, workers=1).encode(source, target)
    assert open_documents(target / "x.bin").metadata == read_metadata(target / "x.bin")


def test_missing_and_empty_sources(tmp_path, tokenizer):
    with pytest.raises(DataError, match="nowhere is missing, expected a folder with text"):
        FolderEncoder(tokenizer.path, workers=1).encode(tmp_path / "nowhere", tmp_path / "x")
    with pytest.raises(DataError, match="holds no text"):
        FolderEncoder(tokenizer.path, workers=1).encode(tmp_path, tmp_path / "x")


def test_a_vocabulary_that_does_not_fit_the_text(tmp_path):
    """The message has the least or the largest size, and that size can be trained."""
    text = "".join(map(chr, range(0x4E00, 0x4E00 + 400)))
    for size, bound in ((300, "at least"), (100_000, "at most")):
        with pytest.raises(DataError, match=f"could not train a vocabulary of {size}: expected {bound}") as refused:
            train_tokenizer([text], tmp_path / "t.model", size, threads=1)
        message = str(refused.value)
        assert "INTERNAL" not in message and "--vocab-size" in message
        train_tokenizer([text], tmp_path / "t.model", int(message.split(bound)[1].split()[0].strip(",")), threads=1)


@pytest.fixture(scope="module")
def tokenised(tmp_path_factory, tokenizer) -> Path:
    root = tmp_path_factory.mktemp("data")
    FolderEncoder(tokenizer.path, workers=1).encode(_source(root / "in"), root / "out" / "mine")
    return root / "out"


def test_vocabularies_must_agree(tokenised, tokenizer, tmp_path, caplog):
    config = data_config(tokenised, tokenizer=str(tokenizer.path), valid_folder=str(tokenised))
    for fits in (VOCAB_SIZE, 512, 640, 103_168):
        assert open_training_data(config, fits, 0, 1, 0).folders == ("mine",)
        open_training_data(config, fits, 1, 2, 0)
        open_validation_data(config, fits, 0, 1, 0)
    assert [record.getMessage()[:60] for record in caplog.records] == [
        f"model.vocab_size={more}: {tokenizer.path}"[:60] for more in (640, 103_168)
    ]
    for fewer in (400, 499):
        with pytest.raises(DataError, match=rf"t\.model has a vocabulary of 500, but model.vocab_size is {fewer}"):
            open_training_data(config, fewer, 0, 1, 0)
        with pytest.raises(DataError, match=rf"mine\.bin: its tokenizer has a vocabulary of 500, but .* {fewer}"):
            open_training_data(data_config(tokenised), fewer, 0, 1, 0)
    texts = (path.read_text() for path in SOURCES[:-1])
    another = train_tokenizer(texts, tmp_path / "another.model", VOCAB_SIZE, threads=1)
    with pytest.raises(DataError, match=r"mine\.bin was tokenised with another tokenizer"):
        open_training_data(data_config(tokenised, tokenizer=str(another.path)), VOCAB_SIZE, 0, 1, 0)


def test_invalid_tokenizer_files(tmp_path):
    with pytest.raises(DataError, match="nowhere is missing, expected a sentencepiece model"):
        Tokenizer(tmp_path / "nowhere")
    (tmp_path / "x.model").write_bytes(b"hello")
    with pytest.raises(DataError, match="found no sentencepiece model"):
        Tokenizer(tmp_path / "x.model")


def _run(*arguments: str | Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "tools/tokenizer.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)


def test_command_line(tmp_path):
    model = tmp_path / "t.model"
    done = _run("train", "--input", ROOT / "internlm_lite", "--output", model, "--vocab-size", "400")
    assert done.returncode == 0 and "400 pieces" in done.stdout, done.stderr
    source = _source(tmp_path / "corpus")
    encode = ("encode", "--input", source, "--output", tmp_path / "out", "--tokenizer", model, "--workers", "2")
    done = _run(*encode)
    assert done.returncode == 0 and "corpus" in done.stdout and "bytes/token" in done.stdout, done.stderr
    done = _run(*encode)
    assert done.returncode == 2 and "DataError" in done.stderr and "Traceback" not in done.stderr
