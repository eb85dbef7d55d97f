"""Train on your own text. Every folder of text becomes a data folder, with loss and accuracy of its own.

    python examples/own_data.py FOLDER ...     folders of .txt, .md, .jsonl, .parquet or source files, at any depth
    python examples/own_data.py                two packages of Python's standard library as text

Files go to ./own_data/. The same by hand is in README.md, "Your own data in three steps".
"""

import sys
import sysconfig
from pathlib import Path

from internlm_lite.cli import tokenize_text, train
from internlm_lite.cli.starter import starter_folder

WORK = Path("own_data")


def run(*words: str | Path) -> None:
    """A command of `internlm-lite tokenizer`; ends this program when it fails."""
    if code := tokenize_text.main([str(word) for word in words]):
        sys.exit(code)


def main() -> None:
    library = Path(sysconfig.get_path("stdlib"))
    folders = [Path(name) for name in sys.argv[1:]] or [library / "email", library / "json"]
    tokenizer, tokens = WORK / "tokenizer.model", WORK / "tokens"
    run("train", "--input", *folders, "--output", tokenizer, "--vocab-size", "512")
    run("encode", "--input", *folders, "--output", tokens, "--tokenizer", tokenizer, "--overwrite")
    config = starter_folder() / "configs" / "tiny.py"  # write these keys into a copy of it
    changes = [f"data.train_folder={tokens}", f"data.tokenizer={tokenizer}", "VOCAB_SIZE=512", "JOB_NAME=own_data"]
    train.main(["--config", str(config), "--run-dir", str(WORK / "RUN"), *changes])  # ends the process


if __name__ == "__main__":
    main()
