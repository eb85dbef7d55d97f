"""A tiny run on tokenised text with a tokenizer, for the tests of evaluations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from internlm_lite.config.schema import Config
from internlm_lite.data.encode import FolderEncoder
from internlm_lite.data.tokenizer import train_tokenizer
from tests.train.runs import tiny

VOCAB = 320
WORDS = ["red", "green", "blue", "small", "large", "quick", "brown", "happy", "quiet", "little", "seven", "eleven"]


def texts(first: int, count: int) -> list[str]:
    """Texts of sentences that end with different words; one has characters of several bytes."""
    found = []
    for n in range(first, first + count):
        sentences = [
            f"The {WORDS[(n * 5 + k) % 12]} dog of house {n % 7} saw the {WORDS[(n + 3 * k) % 12]}" for k in range(6)
        ]
        found.append(". ".join(sentences) + ("。é€" if n % 3 == 0 else "."))
    return found


def write_data(folder: Path) -> Path:
    """folder/train/text, folder/valid/text and folder/small.model."""
    for name, first, count in (("train", 0, 60), ("valid", 100, 14)):
        source = folder / f"{name}_text" / "text"
        source.mkdir(parents=True)
        for number, text in enumerate(texts(first, count)):
            (source / f"{number:03}.txt").write_text(text, "utf-8")
    train_tokenizer(texts(0, 300), folder / "small.model", VOCAB, 1)
    for name in ("train", "valid"):
        FolderEncoder(folder / "small.model").encode(folder / f"{name}_text" / "text", folder / name / "text")
    return folder


def config_for(folder: Path, **sections: Any) -> Config:
    """Layers of `tests.train.runs.tiny`; documents are shorter than a row."""
    data = {
        "train_folder": str(folder / "train"),
        "valid_folder": str(folder / "valid"),
        "tokenizer": str(folder / "small.model"),
        "seq_len": 128,
        "micro_bsz": 1,
        "micro_num": 2,
        "total_steps": 4,
        **sections.pop("data", {}),
    }
    model = {"vocab_size": VOCAB + 8, **sections.pop("model", {})}
    return tiny(folder, data=data, model=model, lr_scheduler={"total_steps": 4}, **sections)
