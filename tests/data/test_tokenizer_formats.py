"""Tokenizer files of other libraries: the same ids as those libraries give, recorded with the data, one clear error."""

from __future__ import annotations

import base64
import json
import sys
from pathlib import Path

import pytest
import tokenizers
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from internlm_lite.apps.convert.tokenizers import files_of
from internlm_lite.data import tiktoken_ranks
from internlm_lite.data.data_loader import open_training_data
from internlm_lite.data.documents import read_metadata
from internlm_lite.data.encode import FolderEncoder
from internlm_lite.data.tokenizer import Tokenizer, train_tokenizer
from internlm_lite.errors import DataError
from tests.data.test_tokenizer import SOURCES, data_config

END = "<|endoftext|>"
TEXTS = [
    "def f(x):\n    return x + 1234567  # It's we'll THEY'RE\n\n\n",
    "  two  spaces\t\tand tabs \r\n \n",
    "Việt Nam, Vie\u0302\u0323t, e\u0301\u00a0, \u2581 \u2581x",
    "日本語 \U0001f600 \x00\x07",
    f"a {END} b",
    "",
]
FORMATS = ("tokenizer.json", "vocab.json", "encoder.json", "small.tiktoken")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One byte-pair encoding in each form."""
    folder = tmp_path_factory.mktemp("formats")
    made = Library(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=[END], initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator((path.read_text() for path in SOURCES[:60]), trainer)
    made.save(str(folder / "tokenizer.json"))
    made.model.save(str(folder))
    (folder / "encoder.json").write_bytes((folder / "vocab.json").read_bytes())
    (folder / "vocab.bpe").write_bytes((folder / "merges.txt").read_bytes())
    characters = {character: byte for byte, character in tiktoken_bytes().items()}
    with (folder / "small.tiktoken").open("wb") as file:
        for piece, rank in sorted(made.get_vocab().items(), key=lambda item: item[1]):
            if piece != END:
                file.write(base64.b64encode(bytes(characters[char] for char in piece)) + b" %d\n" % rank)
    return folder


def tiktoken_bytes() -> dict[int, str]:
    """byte -> the character that stands for it in byte-level vocabularies (GPT-2's encoder.py)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = (byte for byte in range(256) if byte not in printable)
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}


@pytest.fixture
def published(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = len((folder / "small.tiktoken").read_bytes().splitlines())
    small = tiktoken_ranks.Published("small", tiktoken_ranks.PUBLISHED[50256].pattern, {END: 0})
    monkeypatch.setitem(tiktoken_ranks.PUBLISHED, ranks, small)


@pytest.mark.parametrize("name", FORMATS)
def test_ids_are_those_of_the_library(name: str, folder: Path, published: None) -> None:
    ours, theirs = Tokenizer(folder / name), Library.from_file(str(folder / "tokenizer.json"))
    theirs.encode_special_tokens = True
    assert (ours.vocab_size, ours.bos, ours.eos, ours.unk) == (700, None, 0, None)
    for text in TEXTS:
        ids = ours.encode(text)
        assert ids == theirs.encode(text).ids, text
        assert ours.decode(ids) == text and ours.eos not in ids, "text cannot end its own document"
    assert ours.decode([0, *ours.encode("a"), 0, 5000]) == "a"
    assert ours.piece(0) == END and ours.encode("\ud800") == ours.encode("?")


def test_a_folder_stands_for_the_tokenizer_in_it(folder: Path) -> None:
    assert Tokenizer(folder).path.name == "tokenizer.json"


def test_published_patterns_cut_as_their_tokenizers_do(folder: Path) -> None:
    """Numbers by three (Llama 3, cl100k), digit by digit (Qwen), whole (GPT-2); line breaks go with what precedes."""
    import regex  # of tiktoken

    def cut(ranks: int, text: str) -> list[str]:
        return regex.findall(tiktoken_ranks.PUBLISHED[ranks].pattern, text)

    assert cut(50256, "It's 12345 x\n\n y") == ["It", "'s", " 12345", " x", "\n\n", " y"]
    for ranks in (100256, 128000):
        assert cut(ranks, "It's 12345 x.\n\n y") == ["It", "'s", " ", "123", "45", " x", ".\n\n", " y"]
    assert cut(151643, "12 x") == ["1", "2", " x"]
    assert cut(199998, "It's camelCase 12345/\n") == ["It's", " camel", "Case", " ", "123", "45", "/\n"]


@pytest.mark.parametrize("number", tiktoken_ranks.PUBLISHED)
def test_special_tokens_come_after_the_ranks(number: int) -> None:
    one = tiktoken_ranks.PUBLISHED[number]
    assert min(one.special.values()) >= number and one.bos in (None, *one.special)


def test_starts_and_ends_of_documents(folder: Path, tmp_path: Path) -> None:
    """Start: what the post-processor adds. End and padding: by name in the files beside it, else usual names."""
    library = Library.from_file(str(folder / "tokenizer.json"))
    library.add_special_tokens(["<|begin_of_text|>", "</s>", "<pad>"])
    library.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 700)]
    )
    library.enable_truncation(4)
    library.save(str(tmp_path / "tokenizer.json"))
    found = Tokenizer(tmp_path)
    assert (found.bos, found.eos, found.pad, found.vocab_size) == (700, 701, 702, 703)
    assert len(found.encode(TEXTS[0])) > 4 and found.encode("</s>") != [701]
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"pad_token": END}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": END}, "pad_token": None}))
    found = Tokenizer(tmp_path)
    assert (found.bos, found.eos, found.pad) == (700, 0, 0)


def test_data_record_which_tokenizer_made_them(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("hello\nworld " * 300)
    FolderEncoder(folder / "tokenizer.json").encode(tmp_path / "text", tmp_path / "data" / "text")
    metadata = read_metadata(tmp_path / "data" / "text" / "text.bin")
    assert metadata is not None and metadata.tokenizer_kind == "tokenizer.json" and metadata.vocab_size == 700
    config = data_config(tmp_path / "data", tokenizer=str(folder))
    assert open_training_data(config, 704, 0, 1, 0).folders == ("text",)
    other = train_tokenizer(["some words", "and others"], tmp_path / "t.model", 275, threads=1)
    with pytest.raises(DataError, match=r"another tokenizer \(tokenizer.json, .* than .*\(sentencepiece"):
        open_training_data(data_config(tmp_path / "data", tokenizer=str(other.path)), 704, 0, 1, 0)


def test_exported_byte_for_byte(folder: Path, tmp_path: Path) -> None:
    for name in FORMATS[:2]:
        tokenizer = Tokenizer(folder / name)
        files = files_of(tokenizer, 128)
        assert files == {file: (folder / file).read_bytes() for file in tokenizer.files}
        for file, content in files.items():
            (tmp_path / file).write_bytes(content)
    import transformers

    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    assert theirs.encode(TEXTS[0]) == tokenizer.encode(TEXTS[0])


DAMAGED = {
    "tokenizer.json": (b'{"model": 1}', "no tokenizer.json of Hugging Face's form"),
    "cut.json": (b'{"version": "1.0", "trunc', "no tokenizer.json of Hugging Face's form"),
    "vocab.json": (b'{"a": 0}', "merges.txt is missing"),
    "encoder.json": (b'["a"]', "no vocabulary of byte pairs"),
    "few.tiktoken": (b"YQ== 0\nYg== 1\n", r"found 2 ranks, expected one of 50256 \(gpt2\)"),
    "bad.tiktoken": (b"YQ== 0\nYg=?= 1\n", r"line 2: found b'Yg=\?= 1', expected base64"),
    "text.model": (b"hello", "no sentencepiece model, tokenizer.json or .tiktoken"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_files_are_one_clear_error(name: str, tmp_path: Path) -> None:
    content, words = DAMAGED[name]
    (tmp_path / name).write_bytes(content)
    (tmp_path / "vocab.bpe").write_bytes(b"a b c\n")
    with pytest.raises(DataError, match=words):
        Tokenizer(tmp_path / name)


def test_neighbours_and_folders_are_looked_at(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"found none of tokenizer.json, tokenizer\.model"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(DataError, match=r"tokenizer_config.json: found no JSON"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize(("name", "package"), [("tokenizer.json", "tokenizers"), ("small.tiktoken", "tiktoken")])
def test_a_missing_package_is_one_line(name: str, package: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(DataError, match=rf"needs the package {package}: pip install"):
        Tokenizer(folder / name)


def test_merges_as_pairs_are_read(folder: Path, tmp_path: Path) -> None:
    """tokenizers 0.20 and later write merges as lists, earlier versions as one string a pair."""
    values = json.loads((folder / "tokenizer.json").read_text())
    assert tokenizers.__version__ and isinstance(values["model"]["merges"][0], list)
    values["model"]["merges"] = [" ".join(pair) for pair in values["model"]["merges"]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    assert Tokenizer(tmp_path).encode(TEXTS[0]) == Tokenizer(folder).encode(TEXTS[0])


def test_whole_pieces_come_before_merges_and_added_tokens_keep_their_ids(folder: Path, tmp_path: Path) -> None:
    """Llama 3's tokenizer.json asks for the first; an added token counts for the size of the vocabulary."""
    values = json.loads((folder / "tokenizer.json").read_text())
    values["model"]["vocab"]["qzqz"] = 700
    added = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    values["added_tokens"].append({"id": 701, "content": "<|im_end|>", **added})
    for whole in (False, True):
        values["model"]["ignore_merges"] = whole
        (tmp_path / "tokenizer.json").write_text(json.dumps(values))
        found = Tokenizer(tmp_path)
        assert (found.encode("qzqz") == [700]) == whole
        assert (found.vocab_size, found.piece(701), found.piece(0)) == (702, "<|im_end|>", END)
