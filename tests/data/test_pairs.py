"""Pairs of a source and a target: from text to rows, against the same written with lists of tokens."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from internlm_lite.batch import IGNORE, Batch, PassStep, Position
from internlm_lite.cli import pair_corpus, tokenize_text
from internlm_lite.config.schema import Config, LrSchedulerConfig
from internlm_lite.data.data_loader import TrainingData, open_training_data, open_validation_data
from internlm_lite.data.demand import with_total_steps
from internlm_lite.data.folders import Folder
from internlm_lite.data.pair_corpus import part_of
from internlm_lite.data.pairs import PackedPairs, PairPacking
from internlm_lite.data.tokenizer import Tokenizer
from internlm_lite.errors import DataError, InternLMError
from internlm_lite.optim.lr_schedule import learning_rate
from tests.data.corpora import Documents, data_config, write_native

BEGIN, END = 0, 1


class Listed:
    """Documents of a list."""

    metadata = None

    def __init__(self, documents: Documents, name: str = "x.bin") -> None:
        self.path, self._documents = Path(name), documents
        self.lengths = np.array([len(tokens) for tokens in documents])

    def tokens(self, document: int, start: int, stop: int) -> np.ndarray:
        return np.array(self._documents[document][start:stop])

    def digest(self) -> str:
        return str(self._documents)


def marked(seed: int, count: int, longest: int) -> list[list[int]]:
    rng = np.random.RandomState(seed)
    return [[BEGIN, *rng.randint(4, 100, rng.randint(0, longest - 1)).tolist(), END] for _ in range(count)]


def packed(targets: Documents, sources: Documents, **changes: object) -> PackedPairs:
    given = {"row_tokens": 20, "seq_len": 10, "source_row_tokens": 24, "source_seq_len": 12, "vocab_size": 100}
    packing = PairPacking(**{**given, "source_vocab_size": 100, "seed": 3, **changes})
    return PackedPairs(Folder("x", (Listed(targets),), sources=(Listed(sources, "x.source.bin"),)), packing)


def fill(rows: PackedPairs, row: int) -> tuple[list[list[int]], list[list[int]]]:
    """(tokens, labels, positions, borders) of targets, (tokens, positions, borders) of sources."""
    tokens, labels, positions = (np.full(rows.row_tokens, -7) for _ in range(3))
    source, places = (np.full(rows.source_row_tokens, -7) for _ in range(2))
    borders = rows.fill(row, tokens, labels, positions)
    source_borders = rows.fill_source(row, source, places)
    arrays = [tokens, labels, positions, borders], [source, places, source_borders]
    return tuple([array.tolist() for array in side] for side in arrays)  # type: ignore[return-value]


@settings(max_examples=40, deadline=None)
@given(
    count=st.integers(1, 25),
    sizes=st.tuples(st.integers(2, 12), st.integers(1, 4), st.integers(2, 12)),
    row_pairs=st.none() | st.integers(1, 5),
    seed=st.integers(0, 99),
)
def test_every_pair_is_whole_in_one_row(count, sizes, row_pairs, seed):
    length, micro_bsz, source_length = sizes
    targets, sources = marked(seed, count, length + 1), marked(seed + 100, count, source_length)
    changes = {"row_tokens": micro_bsz * length, "seq_len": length, "row_pairs": row_pairs}
    changes |= {"source_row_tokens": micro_bsz * source_length, "source_seq_len": source_length}
    rows = packed(targets, sources, **changes)
    found, fullest = [], []
    for row in range(rows.rows):
        (tokens, labels, positions, borders), (source, places, source_borders) = fill(rows, row)
        assert len(borders) == len(source_borders) and borders[-1] == len(tokens) and source_borders[-1] == len(source)
        pairs = len(rows.passages(row))
        fullest.append(pairs)
        assert pairs <= (row_pairs or count) and max(np.diff(borders)) <= length
        for at in range(len(borders) - 1):
            begin, end, first, last = *borders[at : at + 2], *source_borders[at : at + 2]
            assert positions[begin:end] == list(range(end - begin)) and places[first:last] == list(range(last - first))
            if at < pairs:
                found.append(([*tokens[begin:end], labels[end - 1]], source[first:last]))
                assert labels[begin : end - 1] == tokens[begin + 1 : end]
            else:
                assert set(labels[begin:end]) <= {IGNORE}
    assert sorted(found) == sorted(zip(targets, sources, strict=True))
    order = [document for row in range(rows.rows) for document in [one.document for one in rows.passages(row)]]
    assert rows.rows_with(order[-1]) == [rows.rows - 1]
    for row, pairs in enumerate(fullest[:-1]):  # the first pair of the next row has no room in this one
        chosen = order[sum(fullest[:row]) :][: pairs + 1]
        sums = [sum(len(side[one]) for one in chosen) for side in (targets, sources)]
        over = sums[0] - len(chosen) > micro_bsz * length or sums[1] > micro_bsz * source_length
        assert over or pairs == row_pairs


def test_rows_without_pairs_are_filling():
    rows = packed(marked(1, 4, 8), marked(2, 4, 8)).with_empty_rows(2)
    (tokens, labels, _, borders), (source, _, source_borders) = fill(rows, rows.rows - 1)
    assert set(tokens) == set(source) == {0} and set(labels) == {IGNORE}
    assert borders == [0, 10, 20] and source_borders == [0, 12, 24]
    assert rows.passages(rows.rows - 1) == [] and fill(rows, rows.rows + 5) == fill(rows, rows.rows - 1)


def test_long_sides_are_refused_or_keep_their_end_mark():
    targets = [[BEGIN, 5, END], [BEGIN, *range(10, 22), END]]
    sources = [[BEGIN, *range(30, 43), END], [BEGIN, 7, END]]
    words = r"document 1 \(line 2 of its text, if none was left out\) has 13 tokens, expected at most data.seq_len = 10"
    with pytest.raises(DataError, match=words):
        packed(targets, sources)
    with pytest.raises(DataError, match=r"x\.source\.bin: document 0 \(line 1 .* 15 tokens, .* data.source_seq_len"):
        packed(targets[:1], sources[:1])
    rows = packed(targets, sources, truncate=True)
    assert rows.cut == 2
    (tokens, labels, _, _), (source, _, _) = fill(rows, 0)
    at = tokens.index(10) - 1
    assert tokens[at : at + 10] == [BEGIN, *range(10, 19)] and labels[at : at + 10] == [*range(10, 19), END]
    at = source.index(30) - 1
    assert source[at : at + 12] == [BEGIN, *range(30, 40), END]


@pytest.mark.parametrize(("targets", "sources"), [([[0, 1], [0]], [[5], [6]]), ([[0, 1], [0, 1]], [[5], []])])
def test_a_side_without_tokens_is_located(targets, sources):
    """Tokenised by others."""
    with pytest.raises(
        DataError, match=r"x(\.source)?\.bin: document 1 has [01] tokens, expected at least [12], as 1 of"
    ):
        packed(targets, sources)


def test_ids_outside_the_vocabulary_are_located():
    with pytest.raises(DataError, match=r"x\.bin: document 0, token 1: found id 100, .* model.vocab_size = 100"):
        fill(packed([[BEGIN, 100, END]], [[BEGIN, END]]), 0)
    with pytest.raises(DataError, match=r"x\.source\.bin: document 0, token 0: found id -1, .* model.source_vocab"):
        fill(packed([[BEGIN, END]], [[-1, END]]), 0)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    for name, count, seed in (("help", 53, 1), ("news", 24, 2)):
        write_native(folder / name / "a.bin", marked(seed, count, 11))
        write_native(folder / name / "a.source.bin", marked(seed + 10, count, 9))
    return folder


def opened(root: Path | None, rank: int = 0, size: int = 1, **changes: object) -> TrainingData:
    config = data_config(root, **{"seq_len": 10, "source_seq_len": 12, "micro_num": 4, "row_pairs": 3, **changes})
    return open_training_data(config, (100, 100), rank, size, 5)


def steps(data: TrainingData, count: int, position: Position = Position()) -> list[Batch]:
    batches = []
    for _ in range(count):
        batches.append(data.build(position))
        position = batches[-1].after
    return batches


def contents(batch: Batch) -> list[tuple]:
    """Of each row: its tokens, labels and borders, and those of its sources."""
    assert batch.source is not None and batch.source.cu_seqlens.shape == batch.cu_seqlens.shape
    tensors = (batch.tokens, batch.labels, batch.positions, batch.source.tokens, batch.source.positions)
    borders = zip(batch.cu_seqlens_host, batch.source.cu_seqlens_host, strict=True)
    return [(*(tensor[row].tolist() for tensor in tensors), *both) for row, both in enumerate(borders)]


def test_an_epoch_has_every_pair_once_in_any_number_of_ranks(root):
    alone = [contents(batch) for batch in steps(opened(root), 9)]
    a_pass = sum(folder.rows for folder in opened(root).packed)
    assert a_pass % 4 == 0 and a_pass // 4 > 6
    for size in (2, 4):
        ranks = [steps(opened(root, rank, size, micro_num=4 // size), 9) for rank in range(size)]
        for step, batches in enumerate(zip(*ranks, strict=True)):
            rows = [row for of_ranks in zip(*map(contents, batches), strict=True) for row in of_ranks]
            assert rows == alone[step]
    epoch = steps(opened(root), a_pass // 4)
    labels = torch.cat([batch.labels[batch.labels != IGNORE] for batch in epoch])
    every = [token for seed, count in ((1, 53), (2, 24)) for target in marked(seed, count, 11) for token in target[1:]]
    assert sorted(labels.tolist()) == sorted(every)
    assert opened(root).epoch(epoch[-1].after) == 1


def test_a_resume_is_exact_and_the_columns_count_passes(root):
    whole = steps(opened(root), 20)
    again = steps(opened(root), 12, whole[7].after)
    assert [contents(batch) for batch in again] == [contents(batch) for batch in whole[8:]]
    size = sum(folder.rows for folder in opened(root).packed) // 4
    expected = [PassStep(step // size, 4 * (step % size + 1), step % size + 1) for step in range(20)]
    assert [batch.stats.in_pass for batch in whole] == expected
    assert opened(root, weights={"help": 1.0, "news": 2.0}).build(Position()).stats.in_pass is None


def test_a_pass_of_the_annotated_transformer(tmp_path):
    """29,000 pairs by 32 are 907 micro-batches, by 10 of which 91 updates."""
    for name in ("a.bin", "a.source.bin"):
        write_native(tmp_path / "multi30k" / name, [[BEGIN, 5, END]] * 29_000)
    data, one = (opened(tmp_path, micro_bsz=32, micro_num=micro_num, row_pairs=32) for micro_num in (10, 1))
    assert data.phases.at(()).mix.epoch_rows == 910 and one.packed[0].rows == 907
    assert data.build(Position(90, 900)).stats.in_pass == PassStep(0, 910, 91)
    model = {"vocab_size": 100, "num_encoder_layers": 1, "hidden_size": 8, "num_layers": 1, "num_attention_heads": 1}
    values = {"seq_len": 10, "micro_num": 10, "epochs": 8, "valid_every": "epoch", "train_folder": str(tmp_path)}
    config = Config.model_validate(
        {"data": values, "model": model, "lr_scheduler": {}, "ckpt": {"checkpoint_every": "epoch"}}
    )
    known = with_total_steps(config, data)
    assert (known.data.total_steps, known.data.valid_steps, known.ckpt.checkpoint_steps) == (8 * 91, 91, 91)


def test_sources_are_found_beside_their_targets(root, tmp_path):
    write_native(tmp_path / "help" / "a.bin", [[BEGIN, END]] * 3)
    with pytest.raises(DataError, match=r"a\.bin: found no a\.source\.bin beside it"):
        opened(tmp_path)
    write_native(tmp_path / "help" / "a.source.bin", [[BEGIN, END]] * 2)
    with pytest.raises(DataError, match=r"a\.source\.bin: found 2 documents, expected 3, one for each of a\.bin"):
        opened(tmp_path)
    decoder = open_training_data(data_config(root), 100, 0, 1, 5)
    assert [folder.documents for folder in decoder.packed] == [53, 24], "a decoder reads the targets alone"


def test_validation_reads_all_pairs(root):
    config = data_config(root, valid_folder=str(root), seq_len=10, source_seq_len=12, row_pairs=3, valid_batches=99)
    ranks = [list(open_validation_data(config, (100, 100), rank, 2, 5).batches()) for rank in range(2)]
    assert len(ranks[0]) == len(ranks[1])
    found = sum(int((batch.labels != IGNORE).sum()) for batches in ranks for batch in batches)
    assert found == sum(len(target) - 1 for seed, count in ((1, 53), (2, 24)) for target in marked(seed, count, 11))


def test_the_copy_task():
    data = opened(None, seq_len=9, source_seq_len=10, micro_bsz=80, row_pairs=80)
    batch = data.build(Position())
    assert batch.source is not None and batch.tokens.shape == (4, 720) and batch.source.tokens.shape == (4, 800)
    source = batch.source.tokens.view(-1, 10)
    assert torch.equal(batch.tokens.view(-1, 9), source[:, :-1])
    assert torch.equal(batch.labels.view(-1, 9), source[:, 1:])
    assert set(source[:, 0].tolist()) == {1} and len({tuple(row) for row in source.tolist()}) == 320
    assert sorted(set(source[:, 1:].flatten().tolist())) == list(range(1, 100))


TEXTS = {
    "de": ["Ein Mann schläft.", "Drei Hunde.", "Ein Haus, rot."],
    "en": ["A man sleeps.", "Three dogs.", "A (red) house."],
}


def write_lines(folder: Path, de: list[str], en: list[str], name: str = "a") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for language, lines in (("de", de), ("en", en)):
        (folder / f"{name}.{language}").write_text("".join(f"{line}\n" for line in lines), "utf-8")
    return folder


def tool(*words: object) -> int:
    return tokenize_text.main([*map(str, words), "--workers", "1"])


def test_from_two_files_to_tokens(tmp_path, capsys):
    folder = write_lines(tmp_path / "text" / "help", TEXTS["de"], TEXTS["en"])
    records = [{"de": "Ein Hund.", "en": "A dog."}, {"de": " ", "en": "Lost."}, {"de": "Rot.", "en": "Red."}]
    (folder / "b.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    for side in ("de", "en"):
        words = ("--side", side, "--words", "--rules", "plain", "--output", tmp_path / f"{side}.json")
        assert tool("train", "--input", folder, *words) == 0
    given = ("--pair", "de", "en", "--source-tokenizer", tmp_path / "de.json", "--tokenizer", tmp_path / "en.json")
    assert tool("encode", "--input", folder, "--output", tmp_path / "train", *given) == 0
    assert "bad: empty 'de': 1" in (said := capsys.readouterr().out) and "b.jsonl:2" in said
    de, en = (Tokenizer(tmp_path / f"{side}.json") for side in ("de", "en"))
    config = data_config(
        tmp_path / "train", seq_len=8, micro_bsz=9, micro_num=1, tokenizer=str(en.path), source_tokenizer=str(de.path)
    )
    batch = open_training_data(config, (en.vocab_size, de.vocab_size), 0, 1, 5).build(Position())
    assert batch.source is not None
    borders, source = batch.cu_seqlens_host[0], batch.source
    ends = source.cu_seqlens_host[0]
    found = {
        de.decode(source.tokens[0, ends[i] : ends[i + 1]].tolist()): en.decode(
            batch.labels[0, borders[i] : borders[i + 1]].tolist()
        )
        for i in range(5)
    }
    assert found == {**dict(zip(TEXTS["de"], TEXTS["en"], strict=True)), "Ein Hund.": "A dog.", "Rot.": "Red."}
    assert int(source.tokens[0, 0]) == de.bos and int(source.tokens[0, ends[1] - 1]) == de.eos


@pytest.mark.parametrize(
    ("de", "en", "message"),
    [
        (["eins", "zwei", "drei"], ["one", "two"], r"a\.de:3: found no line 3 in .*a\.en, which ends before it"),
        (["eins"], ["one", "two"], r"a\.en:2: found no line 2 in .*a\.de"),
        (["eins", "", "drei"], ["one", "two", "three"], r"bad: empty 'de': 1 \(.*a\.de:2\)"),
        (["eins", "zwei"], ["one", " \t"], r"bad: empty 'en': 1 \(.*a\.de:2\)"),
    ],
)
def test_bad_pairs_are_told_with_their_line(tmp_path, capsys, de, en, message):
    folder = write_lines(tmp_path / "help", de, en)
    write_lines(tmp_path / "words", ["eins zwei drei"], ["one two three"])
    assert tool("train", "--input", tmp_path / "words", "--side", "en", "--words", "--output", tmp_path / "w.json") == 0
    given = ("--pair", "de", "en", "--tokenizer", tmp_path / "w.json", "--max-bad-records", "0")
    assert tool("encode", "--input", folder, "--output", tmp_path / "train", *given) == 2
    said = capsys.readouterr().err
    assert len(said.strip().splitlines()) == 1 and not (tmp_path / "train" / "help").exists()
    assert re.search(message, said), said


def test_a_side_alone_is_refused(tmp_path, capsys):
    folder = write_lines(tmp_path / "help", ["eins"], ["one"])
    assert tool("train", "--input", folder, "--side", "en", "--words", "--output", tmp_path / "w.json") == 0
    given = ("--output", tmp_path / "train", "--pair", "de", "en", "--tokenizer", tmp_path / "w.json")
    for missing, name in (("de", "a.en"), ("en", "a.de")):
        alone = write_lines(tmp_path / missing, ["eins"], ["one"])
        (alone / f"a.{missing}").unlink()
        assert tool("encode", "--input", alone, *given) == 2
        assert f"{name}: found no a.{missing} beside it" in capsys.readouterr().err
    (tmp_path / "keys").mkdir()
    (tmp_path / "keys" / "a.jsonl").write_text('{"german": "eins", "english": "one"}\n')
    assert tool("encode", "--input", tmp_path / "keys", *given) == 2
    assert "found keys german, english, expected 'de' and 'en'" in capsys.readouterr().err


def test_sides_that_are_not_the_text_are_told(tmp_path, capsys):
    folder = write_lines(tmp_path / "help", ["eins zwei"], ["one two"])
    words = ("train", "--input", folder, "--words", "--rules", "plain", "--output", tmp_path / "w.json")
    assert tool(*words, "--side", "fr") == 2
    assert "holds no text of 'fr', expected files with .fr at their end" in capsys.readouterr().err
    assert tool(*words, "--side", "de") == 0
    given = ("encode", "--input", folder, "--output", tmp_path / "train", "--tokenizer", tmp_path / "w.json")
    assert tool(*given, "--pair", "de", "en") == 0  # 4 tokens, of which 2 are marks
    said = capsys.readouterr().out
    assert said.count("w.json: 50.0% of the tokens are of unknown text") == 1
    with pytest.raises(SystemExit):
        tool(*given, "--pair", "de", "de")
    assert "--pair: found 'de' twice" in capsys.readouterr().err


def test_words_in_the_order_of_their_frequency(tmp_path):
    folder = write_lines(tmp_path / "help", ["b a b c", "c b a-b a-b d <s>"], ["", ""])
    path = tmp_path / "de.json"
    words = ("train", "--input", folder, "--side", "de", "--words", "--rules", "plain", "--output", path)
    assert tool(*words, "--min-freq", "2") == 0
    made = Tokenizer(path)
    pieces = [made.piece(token) for token in range(made.vocab_size)]
    assert pieces == ["<s>", "</s>", "<blank>", "<unk>", "b", "a-b", "c"]
    assert (made.bos, made.eos, made.pad, made.unk) == (0, 1, 2, 3)
    assert made.encode("b  x c") == [4, 3, 6] and made.decode([0, 4, 3, 6, 1, 2]) == "b <unk> c"
    assert tool(*words, "--vocab-size", "5") == 0 and Tokenizer(path).vocab_size == 5
    for damage in ('{"word_rules": "plain", "pieces": ["a"]}', '{"word_rules": "plain"', '{"word_rules": 3}'):
        path.write_text(damage)
        with pytest.raises(DataError, match=r"make it again with tools/tokenizer.py train --words"):
            Tokenizer(path)
    path.write_text('{"word_rules": "spacy:xy", "pieces": ["<s>", "</s>", "<blank>", "<unk>"]}')
    with pytest.raises(InternLMError, match=r"pip install 'internlm_lite\[spacy\]'|give another language"):
        Tokenizer(path)


def test_noam_by_update_and_by_micro_batch():
    """The annotated transformer's rates, which counts micro-batches; 10 of them are an update."""

    def rate(k: int) -> float:
        return 512**-0.5 * min(k**-0.5, k * 3000**-1.5)

    every = LrSchedulerConfig(kind="noam", noam_width=512, warmup_steps=3000)
    known = {1: 2.689572e-07, 2: 5.379144e-07, 3000: 8.068715e-04, 7256: 5.188196e-04}
    assert {k: learning_rate(k - 1, 1.0, every) for k in known} == pytest.approx(known, rel=1e-6)
    tenth = LrSchedulerConfig(kind="noam", noam_width=512, warmup_steps=300)
    rates = [learning_rate(update, 10**-0.5, tenth) for update in range(800)]
    assert rates == pytest.approx([rate(10 * (update + 1)) for update in range(800)], rel=1e-12)


def test_the_corpus_of_manuals(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("internlm_lite.data.pair_corpus.FEWEST_PAIRS", 40)
    help_pages = tmp_path / "packages/usr/share/libreoffice/help"
    for language, folder, word in (("de", "de", "Seite"), ("en", "en-US", "page")):
        page = "".join(f"<li><p>The <b>{word}</b>&nbsp;number {number} says more.</p></li>" for number in range(99))
        (help_pages / folder / "text").mkdir(parents=True)
        (help_pages / folder / "text" / "a.html").write_text(f"<script>x < y</script><h1>{word}</h1>{page}{page}")
        (help_pages / folder / "text" / "b.html").write_text("<p>" * (1 + (language == "en")) + "Another text of it")
    out, packages = tmp_path / "corpus", tmp_path / "packages"
    assert pair_corpus.main(["--output", str(out), "--packages", str(packages)]) == 0
    both = {
        language: {part: (out / part / f"help/help.{language}").read_text().splitlines() for part in ("train", "valid")}
        for language in ("de", "en")
    }
    assert [line.replace("Seite", "page") for line in both["de"]["train"]] == both["en"]["train"]
    assert all(part_of(line) == part for part, lines in both["de"].items() for line in lines)
    assert sum(len((path).read_text().splitlines()) for path in out.rglob("*.de")) == 99
    assert pair_corpus.main(["--output", str(out), "--packages", str(packages)]) == 2
    (packages / "usr").rename(tmp_path / "elsewhere")
    assert pair_corpus.main(["--output", str(tmp_path / "none"), "--packages", str(packages)]) == 2
    said = capsys.readouterr().err
    assert "exists already" in said and "found too few pairs of de and en" in said and "libreoffice-help-en-us" in said
