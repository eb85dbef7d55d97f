"""What an encoder-decoder is refused with, before any process group exists."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.config.test_bad_configs import GOOD, WORLD, problems

MODEL = "num_layers=4, num_encoder_layers=2"
ASKED = "data['tokenizer'] = 'a.model'; evaluation = dict(every=2"
CASES = [
    ("", "", None),
    ("tie_source_embeddings=True", "", None),
    ("source_vocab_size=300", "data['source_seq_len'] = 96", None),
    (
        "",
        "parallel['context'] = 2",
        "parallel.context.size: found 2 with model.num_encoder_layers 2, expected 1: context",
    ),
    (
        "source_vocab_size=300, tie_source_embeddings=True",
        "",
        "found True with vocabularies of 300 and 512, expected eq",
    ),
    ("source_vocab_size=301, embed_split_hidden=False", "", "found 301, expected a multiple of parallel.tensor 2"),
    ("", "data['source_seq_len'] = 7; parallel['sequence_parallel'] = True", "found True with source rows of 7 tokens"),
    (
        "position='learned', max_position_embeddings=128",
        "data['source_seq_len'] = 129",
        "at least data.source_seq_len 129",
    ),
    ("", "parallel['pipeline'] = 8", "model.num_layers: found 6 of both sides, expected at least"),
    ("", "data['tokenizer'] = 'a.model'; monitor = dict(sample_prompts=['a'])", None),
    ("", f"{ASKED}, tasks=['pairs'], pairs_folder='text', pairs_sides=['de', 'en'])", None),
    ("", f"{ASKED}, tasks=['x'])", "evaluation.tasks: found 'x' with model.num_encoder_layers 2, expected \"pairs\""),
    (
        "",
        f"{ASKED}, tasks=['pairs'], pairs_sides=['de'])",
        "found None and ['de'], expected a folder and the two sides",
    ),
    ("", "evaluation = dict(beams=4)", 'evaluation.beams: found 4 without the task "pairs", which alone reads it'),
    ("", "loss = dict(pad_id=2)", "loss.pad_id: found 2 with loss.label_smoothing 0"),
    ("", "loss = dict(pad_id=512, label_smoothing=0.1)", "loss.pad_id: found 512 with model.vocab_size 512"),
]


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(("keys", "line", "found"), CASES, ids=[f"{keys} {line}" for keys, line, _ in CASES])
def test_an_encoder_that_cannot_be(keys: str, line: str, found: str | None) -> None:
    world = 16 if "pipeline" in line else WORLD
    told = problems(GOOD.replace("num_layers=4", f"{MODEL}, {keys}".rstrip(", ")) + line + "\n", world)
    assert len(told) == (found is not None), told
    assert found is None or found in told[0]


@pytest.mark.parametrize("key", ["source_vocab_size=300", "tie_source_embeddings=True"])
def test_keys_of_an_encoder_without_one(key: str) -> None:
    (told,) = problems(GOOD.replace("num_layers=4", f"num_layers=4, {key}"))
    assert "with model.num_encoder_layers 0, a decoder alone; remove it" in told


def test_pairs_of_a_decoder_alone() -> None:
    (told,) = problems(GOOD + f"{ASKED}, tasks=['pairs'], pairs_folder='text', pairs_sides=['de', 'en'])\n")
    assert 'evaluation.tasks: found "pairs" with model.num_encoder_layers 0: a decoder alone has no sources' in told
