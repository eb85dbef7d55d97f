"""Pairs that a tiny encoder-decoder learns in seconds: numbers in German words, and the same in English."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from internlm_lite.config.schema import Config
from internlm_lite.data.encode import FolderEncoder
from internlm_lite.data.text import TextOptions
from internlm_lite.data.word_vocabulary import train_words
from tests.train.runs import tiny

GERMAN = ["null", "eins", "zwei", "drei", "vier", "fünf", "sechs", "sieben", "acht", "neun"]
ENGLISH = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
STEPS = 90
"""Enough to learn them."""


def number(rng: random.Random) -> list[int]:
    return [rng.randrange(10) for _ in range(rng.randint(1, 5))]


def words(digits: list[int], language: list[str]) -> str:
    return " ".join(language[digit] for digit in digits)


def write_numbers(folder: Path) -> Path:
    """folder/{train,test}/numbers/*.{de,en}, folder/{de,en}.json, folder/tokens."""
    rng = random.Random(5)
    for part, count in (("train", 400), ("test", 21)):
        numbers = [number(rng) for _ in range(count)]
        (folder / part / "numbers").mkdir(parents=True)
        for side, language in (("de", GERMAN), ("en", ENGLISH)):
            text = "".join(f"{words(digits, language)}\n" for digits in numbers)
            (folder / part / "numbers" / f"a.{side}").write_text(text, "utf-8")
    for side, language in (("de", GERMAN), ("en", ENGLISH)):
        train_words(language, folder / f"{side}.json", "plain", 1, None)
    encoder = FolderEncoder(
        folder / "en.json", 1, TextOptions(sides=("de", "en")), source_tokenizer_path=folder / "de.json"
    )
    encoder.encode(folder / "train" / "numbers", folder / "tokens" / "numbers")
    return folder


def numbers_config(folder: Path, **sections: dict[str, Any]) -> Config:
    data = {
        "train_folder": str(folder / "tokens"),
        "seq_len": 8,
        "source_seq_len": 8,
        "micro_bsz": 48,
        "micro_num": 1,
        "total_steps": STEPS,
        "tokenizer": str(folder / "en.json"),
        "source_tokenizer": str(folder / "de.json"),
        **sections.pop("data", {}),
    }
    model = {
        "num_encoder_layers": 1,
        "num_attention_heads": 4,
        "num_kv_attention_heads": 4,
        "vocab_size": 14,
        "hidden_size": 64,
        "mlp_ratio": 4,
        "mlp_type": "relu",
        "norm_type": "layernorm",
        "position": "sinusoidal",
        "embed_scale": 8.0,
        "init_std": 0.08,
        "dtype": "torch.float32",
        **sections.pop("model", {}),
    }
    rates = {"lr_scheduler": {"total_steps": STEPS, "warmup_ratio": 0.1}, "adam": {"lr": 5e-3}}
    return tiny(folder, data=data, model=model, beta2_scheduler={"init_beta2": 0.98}, **rates, **sections)
