"""Text as users have it: compressed, in several encodings and shapes, damaged; and what is said of what is left out."""

import bz2
import dataclasses
import gzip
import json
import lzma
import sys
import types
import zlib
from pathlib import Path

import numpy as np
import pytest

from internlm_lite.batch import IGNORE
from internlm_lite.cli import tokenize_text
from internlm_lite.data.encode import FolderEncoder
from internlm_lite.data.folders import find_folders
from internlm_lite.data.pack import PackedFolder, Packing
from internlm_lite.data.text import DEFAULTS, TextOptions, find_text, read_documents, sample_text
from internlm_lite.data.text_files import BadLimit, Tally
from internlm_lite.data.tokenizer import Tokenizer, train_tokenizer
from internlm_lite.errors import DataError, MissingPackageError

TEXTS = ["sentence number 0", "naïve café — 日本", 'with "quotes",\nand a line']
LINES = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
RAW = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in TEXTS)
ARRAY = json.dumps([{"text": text, "id": 1} for text in TEXTS], indent=1).encode()
TABLE = 'id,text\n1,sentence number 0\n2,naïve café — 日本\n3,"with ""quotes"",\nand a line"\n'


class Zstandard(types.ModuleType):
    """In place of the package, which the tests do without: gzip with the interface of zstandard."""

    ZstdError = zlib.error

    class ZstdDecompressor:
        def decompressobj(self):
            return zlib.decompressobj(31)


@pytest.fixture(autouse=True)
def zstandard(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", Zstandard("zstandard"))


def read(folder: Path, options: TextOptions = DEFAULTS) -> tuple[list[str], list[str]]:
    """The texts below `folder`, and what is said of the others, without the folder's own name."""
    tally = Tally(options.max_bad)
    files = find_text(folder, options, tally)
    texts = [
        f"{d.prompt}>{d.text}" if d.prompt else d.text for file in files for d in read_documents(file, options, tally)
    ]
    return texts, [line.replace(f"{folder}/", "") for line in tally.lines()]


READABLE = {
    "a.jsonl": LINES,
    "a.NDJSON": LINES,
    "a.json": LINES,
    "array.json": ARRAY,
    "one_line.json": ARRAY.replace(b"\n", b""),
    "objects.json": b"\n".join(json.dumps({"text": text}, indent=2).encode() for text in TEXTS),
    "a.csv": TABLE.encode(),
    "windows.csv": TABLE.replace("\n2", "\r\n2").encode("utf-8-sig"),
    "a.tsv": TABLE.replace("1,", "1\t").replace("2,", "2\t").replace("3,", "3\t").replace("id,", "id\t").encode(),
    "a.jsonl.gz": gzip.compress(LINES),
    "members.jsonl.gz": gzip.compress(LINES[:40]) + gzip.compress(LINES[40:]),
    "a.json.bz2": bz2.compress(ARRAY),
    "a.csv.xz": lzma.compress(TABLE.encode()),
    "a.jsonl.ZST": gzip.compress(LINES),
    "frames.jsonl.zst": gzip.compress(LINES[:40]) + gzip.compress(b"") + gzip.compress(LINES[40:]),
    "bom.jsonl": b"\xef\xbb\xbf" + LINES,
    "bom.json": b"\xef\xbb\xbf" + ARRAY,
    "utf16.jsonl": RAW.encode("utf-16"),
    "utf16_be.jsonl": b"\xfe\xff" + RAW.encode("utf-16-be"),
    "utf16_bare.jsonl": LINES.decode().encode("utf-16-le"),
    "utf16_bare.csv": (
        "id,text,ascii\n"
        + "\n".join(f'{i},"{t}",{"x" * 99}' for i, t in enumerate([TEXTS[0], TEXTS[1], TEXTS[2].replace('"', '""')]))
    ).encode("utf-16-be"),
    "utf32.json.gz": gzip.compress(ARRAY.decode().encode("utf-32")),
}


@pytest.mark.parametrize("name", READABLE)
def test_every_form_gives_the_same_texts(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(READABLE[name])
    assert read(tmp_path) == (TEXTS, [])


def test_plain_text_in_every_form(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\r\ntwo\n")
    (tmp_path / "b.md.gz").write_bytes(gzip.compress(b"three"))
    (tmp_path / "c.txt").write_bytes("vier – fünf".encode("utf-16"))
    (tmp_path / "d.log").write_bytes("\ufeffsix".encode())
    assert read(tmp_path) == (["one\ntwo\n", "three", "vier – fünf", "six"], [])


def test_other_encodings_are_counted(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "caf\xe9"}\n{"text": "\xc3\xa9t\xc3\xa9 \xff"}\n{"text": "good"}\n')
    (tmp_path / "b.txt").write_bytes("Straße – “zwölf”".encode("cp1252"))
    (tmp_path / "c.jsonl").write_bytes(b'{"text": "' + "中文的一段话，没有别的".encode("gbk") + b'"}\n')
    texts, notes = read(tmp_path)
    assert texts == ["café", "été \ufffd", "good", "Straße – “zwölf”"]
    assert notes == [
        "not UTF-8, read as Windows-1252 (Latin-1); --encoding names another: 2 (a.jsonl:1, b.txt)",
        "damaged UTF-8, damaged characters replaced by U+FFFD: 1 (a.jsonl:2)",
        "bad: neither UTF-8 nor Latin-1 (--encoding names another): 1 (c.jsonl:1)",
    ]
    named = dataclasses.replace(DEFAULTS, encoding="gbk")
    for name in ("a.jsonl", "b.txt"):
        (tmp_path / name).unlink()
    assert read(tmp_path, named) == (["中文的一段话，没有别的"], [])


def test_records_without_text_are_counted_with_their_places(tmp_path: Path) -> None:
    values = [{"text": "good"}, {"text": None}, {"text": ""}, {"text": 5}, {"other": "x"}, [1], {"text": None}]
    lines = [*map(json.dumps, values), '{"text": ', "", "[" * 100_000, '{"text": "\\ud800 lone"}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    (tmp_path / "b.csv").write_text("text,n\nfine,1\n,2\nshort\n")
    (tmp_path / "c.txt").touch()
    texts, notes = read(tmp_path)
    assert texts == ["good", "\ud800 lone", "fine"]
    assert [note[:45] for note in notes] == [
        "bad: null under 'text': 2 (a.jsonl:2, a.jsonl",
        "bad: empty 'text': 2 (a.jsonl:3, b.csv:3)",
        "bad: int under 'text': 1 (a.jsonl:4)",
        "bad: no 'text': 1 (a.jsonl:5)",
        "bad: no JSON object: 1 (a.jsonl:6)",
        "bad: damaged JSON: 2 (a.jsonl:8 Expecting val",
        "bad: rows that have not as many columns as th",
        "empty files, left out: 1 (c.txt)",
    ]
    none = dataclasses.replace(DEFAULTS, max_bad=BadLimit(count=0))
    with pytest.raises(
        DataError, match=r"1 of 2 records are bad, more than --max-bad-records 0 allows: bad: null .*:2\)"
    ):
        read(tmp_path, none)


def test_a_share_of_bad_records(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n' * 2000 + '{"text": null}\n' * 20)
    assert len(read(tmp_path)[0]) == 2000
    with (tmp_path / "a.jsonl").open("a") as file:
        file.write('{"text": null}\n')
    with pytest.raises(DataError, match="21 of 2021 records are bad, more than --max-bad-records 1% allows"):
        read(tmp_path)


def test_files_left_out_are_counted_by_suffix(tmp_path: Path) -> None:
    for name in ("a.pdf", "b.PDF", "x/c.pdf", "x/y/d.pdf", "data.gz", "code.tar.gz", "LICENSE", "x/t.txt", ".git/HEAD"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("text")
    (tmp_path / "x" / "up").symlink_to("..")
    (tmp_path / "x" / "null.txt").symlink_to("/dev/null")
    (tmp_path / "settings.json").write_text(json.dumps({"a": {"b": 1}}, indent=1))
    texts, notes = read(tmp_path)
    assert texts == [json.dumps({"a": {"b": 1}}, indent=1), "text"]
    assert sorted(notes) == [
        ".gz, left out: 2 (code.tar.gz, data.gz)",
        ".pdf, left out: 4 (a.pdf, b.PDF, x/c.pdf, ...)",
        "JSON without 'text', read as one document: 1 (settings.json)",
        "a device, left out: 1 (x/null.txt)",
        "files without a suffix, left out: 1 (LICENSE)",
        f"hidden files and folders, left out: 1 ({tmp_path})",
    ]
    plain = dataclasses.replace(DEFAULTS, plain=frozenset({".pdf"}))
    assert len(read(tmp_path, plain)[0]) == 6
    for name in ("settings.json", "x/t.txt"):
        (tmp_path / name).unlink()
    for number in range(100):
        (tmp_path / f"part.{number}").touch()
    with pytest.raises(
        DataError, match=r"holds no text, expected .*; found .*\.pdf, left out: 4.*; others, left out: 7"
    ):
        read(tmp_path)


SHAPES = {
    "Alpaca": {"instruction": "i", "input": "", "output": "o"},
    "ShareGPT": {"id": 1, "conversations": [{"from": "human", "value": "v"}]},
    "a chat of OpenAI": {"messages": [{"role": "user", "content": "c"}]},
    "preferences (DPO)": {"prompt": "p", "chosen": "c", "rejected": "r"},
    "prompt and completion": {"prompt": "p", "completion": "c"},
}


@pytest.mark.parametrize(
    "write", [json.dumps, lambda record: json.dumps([record] * 3), lambda record: json.dumps(record, indent=1)]
)
@pytest.mark.parametrize("shape", SHAPES)
def test_known_shapes_are_named(tmp_path: Path, shape: str, write) -> None:
    (tmp_path / "a.json").write_text(write(SHAPES[shape]))
    with pytest.raises(DataError) as raised:
        read(tmp_path)
    assert f"a.json:1: this looks like {shape}, found keys {next(iter(SHAPES[shape]))}" in str(raised.value)


def test_other_keys_can_be_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "p", "completion": "c"}\n')
    assert read(tmp_path, dataclasses.replace(DEFAULTS, response_key="completion"))[0] == ["p>c"]
    (tmp_path / "a.jsonl").write_text('{"body": "b"}\n')
    assert read(tmp_path, dataclasses.replace(DEFAULTS, text_key="body"))[0] == ["b"]
    with pytest.raises(DataError, match=r"a\.jsonl:1: found keys body, expected text under 'text', or under 'prompt'"):
        read(tmp_path)
    (tmp_path / "b.csv").write_text("prompt,response\np,r\n,free\n")
    (tmp_path / "a.jsonl").unlink()
    assert read(tmp_path)[0] == ["p>r", "free"]


DAMAGED = {
    "cut.jsonl.gz": (gzip.compress(LINES * 9)[:-20], "Compressed file ended before"),
    "no.jsonl.gz": (b"hello", r"Not a gzipped file"),
    "flipped.txt.gz": (
        gzip.compress(LINES)[:30] + b"\0\1\2\3" + gzip.compress(LINES)[34:],
        "while decompressing|CRC|invalid",
    ),
    "no.jsonl.xz": (b"hello", "format not supported"),
    "cut.txt.bz2": (bz2.compress(LINES)[:-9], "Compressed file ended"),
    "no.jsonl.zst": (b"hello", "correct or remove it"),
    "cut.jsonl.zst": (gzip.compress(LINES)[:-1], "ended in the middle of a frame"),
    "cut.json": (ARRAY[:-30], r"cut\.json:\d+: expected JSON, found damage"),
    "open.json": (ARRAY[:-1], r"open\.json:\d+: expected one array, found no end of it"),
    "two.json": (ARRAY + ARRAY, r"two\.json:\d+: expected one array, found no end of it, or more"),
    "deep.json": (b"[" * 10**6, r"deep\.json:1: expected JSON, found damage"),
    "quote.csv": (b'text,n\n"open,1\nx,2\n', r"quote\.csv:3: unexpected end of data"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_files_are_named(tmp_path: Path, name: str) -> None:
    content, message = DAMAGED[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as raised:
        read(tmp_path)
    assert str(tmp_path / name) in str(raised.value)


def test_zstandard_and_pyarrow_are_optional(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, package, extra in (("a.jsonl.zst", "zstandard", "zstd"), ("a.parquet", "pyarrow", "parquet")):
        monkeypatch.setitem(sys.modules, package, None)
        (tmp_path / name).write_bytes(b"")
        with pytest.raises(MissingPackageError, match=rf"pip install 'internlm_lite\[{extra}\]'"):
            read(tmp_path)
        (tmp_path / name).unlink()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    return train_tokenizer(["some words", "and others"], tmp_path_factory.mktemp("t") / "t.model", 275, threads=1)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    for name in ("code", "docs"):
        (tmp_path / "in" / name).mkdir(parents=True)
        records = [json.dumps({"text": f"{name} {i}"}) + "\n" for i in range(200)]
        (tmp_path / "in" / name / "a.jsonl").write_text("".join(records))
    return tmp_path / "in"


def _texts(folder: Path, key: str, tokenizer: Tokenizer) -> set[str]:
    found = set()
    for data in find_folders(folder, key):
        for file in data.files:
            found |= {tokenizer.decode(file.tokens(i, 0, int(n))) for i, n in enumerate(file.lengths)}
    return found


def test_holdout_is_a_property_of_the_text(tmp_path: Path, source: Path, tokenizer: Tokenizer, capsys) -> None:
    """A partition that neither the number of workers, nor the order or number of files changes."""
    line = ["encode", "--tokenizer", str(tokenizer.path), "--holdout", "20%", "--input"]
    arguments = [*line, *map(str, (source / "code", source / "docs")), "--output", str(tmp_path / "a" / "train")]
    assert tokenize_text.main([*arguments, "--workers", "1"]) == 0
    said = capsys.readouterr().out
    assert f"data.train_folder={tmp_path}/a/train data.valid_folder={tmp_path}/a/valid" in said.replace("\n", "")
    train, valid = (_texts(tmp_path / "a" / name, f"{name}_folder", tokenizer) for name in ("train", "valid"))
    assert train | valid == {f"{name} {i}" for name in ("code", "docs") for i in range(200)} and not train & valid
    assert 50 <= len(valid) <= 110
    lines = (source / "docs" / "a.jsonl").read_text().splitlines(keepends=True)
    (source / "docs" / "a.jsonl").write_text("".join(lines[:70:-1]))
    (source / "docs" / "b.jsonl").write_text("".join(lines[:71]))
    assert tokenize_text.main([*line, str(source), "--output", str(tmp_path / "b"), "--workers", "2"]) == 0
    said = capsys.readouterr().out
    assert f"in: 2 folders (code, docs) became one data folder; for one each: --input {source}/*" in said
    assert _texts(tmp_path / "b", "train_folder", tokenizer) == train
    assert _texts(tmp_path / "b_valid", "valid_folder", tokenizer) == valid


def test_odd_names_of_folders(tmp_path: Path, tokenizer: Tokenizer, capsys) -> None:
    line = f"encode --tokenizer {tokenizer.path} --output {tmp_path}/out --workers 1 --input".split()
    for name, code, shown in (("[red]", 0, "[red]"), ("x\x1b[31m", 2, "'x\\x1b[31m'")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text("text")
        (tmp_path / name / "b\x1b[31m.pdf").touch()
        assert tokenize_text.main([*line, str(tmp_path / name)]) == code
        said = capsys.readouterr()
        assert shown in said.out + said.err and "\x1b" not in said.out + said.err


def test_a_split_text_gives_its_windows_end_to_end(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Cut by characters, without bos and eos: row n of the data is window n of the text, its labels one token later."""
    text = "To be, or not to be; that is the question \u2014 \u4f60\u597d. " * 40
    (tmp_path / "book").mkdir()
    (tmp_path / "book" / "a.txt").write_text(text, encoding="utf-8")
    line = ["encode", "--tokenizer", str(tokenizer.path), "--input", str(tmp_path / "book"), "--without-bos-eos"]
    assert tokenize_text.main([*line, "--split-at", "90%", "--workers", "1", "--output", str(tmp_path / "train")]) == 0
    cut, n_windows, width = int(0.9 * len(text)), 0, 16
    for name, part in (("train", text[:cut]), ("valid", text[cut:])):
        (folder,) = find_folders(tmp_path / name, "train_folder", log=False)
        packing = Packing(row_tokens=2 * width, seq_len=width, vocab_size=tokenizer.vocab_size, seed=3)
        packed, expected = PackedFolder(folder, packing), tokenizer.encode(part)
        assert packed.tokens == len(expected)
        for row in range(packed.rows):
            tokens, labels, positions = (np.empty(2 * width, np.int64) for _ in range(3))
            borders = packed.fill(row, tokens, labels, positions)
            assert borders.tolist() == [0, width, 2 * width] and positions.tolist() == [*range(width)] * 2
            first = 2 * width * row
            assert tokens.tolist() == expected[first : first + 2 * width]
            following = expected[first + 1 : first + 2 * width + 1]
            assert labels.tolist() == following + [IGNORE] * (2 * width - len(following))
            n_windows += 2
    assert n_windows > 20
    with pytest.raises(SystemExit):
        tokenize_text.main([*line, "--split-at", "90%", "--holdout", "5%", "--output", str(tmp_path / "x")])


def test_prompts_are_not_split(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    encoder = FolderEncoder(tokenizer.path, split_at=0.5)
    with pytest.raises(DataError, match=r"a\.jsonl: found prompts and responses, expected text alone to cut it"):
        encoder.encode(tmp_path / "in", tmp_path / "out", held_out=tmp_path / "valid")


def test_a_holdout_of_nothing_leaves_nothing(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("one document")
    encoder = FolderEncoder(tokenizer.path, holdout=1e-9)
    with pytest.raises(DataError, match="leaves 1 documents to train on and 0 for validation"):
        encoder.encode(tmp_path / "in", tmp_path / "x", held_out=tmp_path / "y")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_training_says_what_it_left_out(tmp_path: Path, source: Path, capsys) -> None:
    (source / "x.pdf").touch()
    with (source / "docs" / "a.jsonl").open("a") as file:
        file.write('{"text": null}\n')
    model = tmp_path / "t.model"
    assert tokenize_text.main(["train", "--input", str(source), "--output", str(model), "--vocab-size", "280"]) == 0
    said = capsys.readouterr().out
    assert f".pdf, left out: 1 ({source}/x.pdf)" in said and f"null under 'text': 1 ({source}/docs/a.jsonl:201)" in said


def test_progress_of_training(source: Path) -> None:
    steps: list[tuple[int, int]] = []
    tally = Tally(BadLimit())
    texts = list(sample_text([source], DEFAULTS, 10**9, tally, lambda *step: steps.append(step)))
    assert len(texts) == len(steps) == 400 and sum(n for n, _ in steps) <= steps[0][1]


@pytest.mark.parametrize(
    ("option", "told"),
    [
        ("--max-bad-records -1", "found '-1', expected a share such as 5%"),
        ("--max-bad-records 200%", "found '200%', expected a share such as 5%"),
        ("--holdout five", "expected a share such as 5%"),
        ("--holdout nan", "expected a share such as 5%"),
        ("--encoding utf-9", "found 'utf-9', expected an encoding of text such as"),
        ("--encoding hex", "found 'hex', expected an encoding of text such as"),
    ],
)
def test_options_out_of_range(option: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        tokenize_text.main(f"encode --input a --output b --tokenizer c {option.replace(' ', '=')}".split())
    assert told in capsys.readouterr().err
