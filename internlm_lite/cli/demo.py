"""From nothing to a trained decoder, on text found on this machine. `make demo` runs it.

    demo/text/{train,valid}/<folder>      real text, folder by folder
    demo/tokenizer.model                  sentencepiece, trained on it
    demo/tokens/{train,valid}/<folder>    the text as tokens
    demo/RUN, demo/ckpts                  train --config configs/demo.py: logs and checkpoints
    demo/training-2/{RUN,ckpts}           of a training with other arguments, another config or corpus, and so on

A stage is skipped when nothing it depends on has changed; an interrupted training resumes where it stopped. Arguments
that are not listed below are passed to train, such as `make demo DEMO_ARGS="STEPS=50"`. Only --fresh removes a
training.
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import itertools
import json
import math
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from importlib.metadata import distributions
from pathlib import Path

from internlm_lite.apps.report.history import samples, validation
from internlm_lite.apps.report.run import RunReader
from internlm_lite.cli.options import new_parser
from internlm_lite.cli.starter import checkout, starter_folder, working_folder
from internlm_lite.config.load import load_config
from internlm_lite.data.corpus import build_corpus, machine_folders
from internlm_lite.runtime.tool import run_tool
from internlm_lite.units import human_bytes, human_seconds

CONFIG = starter_folder() / "configs" / "demo.py"
FOLDER_BYTES = 8_000_000
LAST_STEPS = 20


class Stage:
    """A step of the demo. Its key, a hash of everything it depends on, is stored in a file next to its output."""

    def __init__(self, folder: Path, name: str, *depends_on: object) -> None:
        self.stamp = folder / f"{name}.key"
        self.key = hashlib.sha256(json.dumps([name, *depends_on]).encode()).hexdigest()

    @property
    def is_current(self) -> bool:
        return self.stamp.is_file() and self.stamp.read_text() == self.key

    def record(self) -> None:
        self.stamp.parent.mkdir(parents=True, exist_ok=True)
        self.stamp.write_text(self.key)


def run_command(*command: str | Path) -> None:
    """Run `internlm-lite COMMAND` with this interpreter; a failure ends this process with the same exit code."""
    with subprocess.Popen([sys.executable, "-m", "internlm_lite", *map(str, command)], cwd=checkout()) as child:
        try:
            code = child.wait()
        except KeyboardInterrupt:  # the child also gets SIGINT; subprocess.run would kill it while it saves
            child.wait()
            raise
    if code:
        sys.exit(code if code > 0 else 1)


def make_text(folder: Path) -> None:
    """Collect the corpus and print its size."""
    shutil.rmtree(folder / "text", ignore_errors=True)
    sizes = build_corpus(folder / "text", machine_folders(), FOLDER_BYTES)
    for name, size in sizes.items():
        held_out = human_bytes(size.valid_bytes)
        print(f"  {name:<6} {human_bytes(size.total_bytes):>10} in {size.documents} documents, {held_out} held out")
    print(f"  total  {human_bytes(sum(size.total_bytes for size in sizes.values())):>10}", flush=True)


def make_tokens(folder: Path, vocab_size: int) -> None:
    """Train the tokenizer on the training text only; encode both parts with it."""
    model = folder / "tokenizer.model"
    text = {part: sorted((folder / "text" / part).iterdir()) for part in ("train", "valid")}
    shutil.rmtree(folder / "tokens", ignore_errors=True)
    run_command("tokenizer", "train", "--input", *text["train"], "--output", model, "--vocab-size", str(vocab_size))
    for part, folders in text.items():
        output = folder / "tokens" / part
        run_command("tokenizer", "encode", "--input", *folders, "--output", output, "--tokenizer", model)


def stage_of_training(folder: Path, *depends_on: object) -> Stage:
    """The training that depends on just this, else one in a new folder: those of others are left alone."""
    homes = itertools.chain([folder], (folder / f"training-{number}" for number in itertools.count(2)))
    stages = (Stage(home, "training", *depends_on) for home in homes)
    return next(stage for stage in stages if stage.is_current or not (stage.stamp.parent / "ckpts").exists())


def train(folder: Path, arguments: Sequence[str], started: Stage) -> None:
    """Train, or resume a training that was interrupted."""
    started.record()
    home = started.stamp.parent
    saves = f"ckpt.save_ckpt_folder=local:{home / 'ckpts'}"
    run_command("train", "--config", CONFIG, "--run-dir", home / "RUN", f"DEMO_FOLDER={folder}", saves, *arguments)


def report(folder: Path, vocab_size: int) -> None:
    """Print the samples, the first and last losses, and where to find the rest."""
    run_folder = (folder / "RUN" / "demo" / "latest").resolve()
    reader = RunReader(run_folder, "demo").read_all()
    drawn = samples(reader.samples, reader.events)
    for sample in (one for one in drawn if one["step"] == drawn[-1]["step"]):
        print(f"\n--- prompt {sample['prompt']!r}\n{sample['prompt']}{sample['text']}")
    losses = reader.columns.scalars["loss"].tolist()
    end, uniform = statistics.mean(losses[-LAST_STEPS:]), math.log(vocab_size)
    print(
        f"\ntraining loss: {losses[0]:.3f} at the first step, {end:.3f} over the last {LAST_STEPS}, which is", end=" "
    )
    print(f"{end / uniform:.0%} of guessing evenly, ln({vocab_size}) = {uniform:.3f}")
    evaluations = validation(reader.events)
    for name, (_, loss, accuracy) in (evaluations[-1]["folders"] if evaluations else {}).items():
        print(f"  held-out text of {name:<6} loss {loss:.3f}, next token right {accuracy:.0%}")
    print(f"run folder: {run_folder}")
    command = f"{sys.executable} -m internlm_lite"  # internlm-lite may not be on the user's PATH
    print(f"report:     {run_folder / 'report.html'}   live: {command} dashboard {run_folder}")
    print(f"more text:  {command} generate --checkpoint {folder / 'ckpts'} --prompt 'import '")


def installed() -> list[str]:
    """Name and version of every installed package: the corpus is made from their files."""
    return sorted(f"{found.name}=={found.version}" for found in distributions())


def parse_arguments(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = new_parser("demo", __doc__)
    parser.add_argument("--folder", type=Path, default=working_folder() / "demo", help="where everything goes (demo)")
    parser.add_argument("--fresh", action="store_true", help="remove this training's checkpoints and start from step 0")
    return parser.parse_known_args(argv)


def work(arguments: argparse.Namespace, for_train: Sequence[str]) -> int:
    """Exit code."""
    folder, start = arguments.folder.resolve(), time.monotonic()
    vocab_size = load_config(CONFIG).config.model.vocab_size
    data_code = [file.read_text("utf-8") for file in sorted(Path(inspect.getfile(build_corpus)).parent.glob("*.py"))]
    text = Stage(folder, "text", data_code, FOLDER_BYTES, sys.version, installed())
    tokens = Stage(folder, "tokens", text.key, vocab_size)
    started = stage_of_training(folder, tokens.key, CONFIG.read_text("utf-8"), for_train)
    home = started.stamp.parent
    trained = Stage(home, "trained", started.key)
    if arguments.fresh:
        trained.stamp.unlink(missing_ok=True)
        shutil.rmtree(home / "ckpts", ignore_errors=True)
    if home != folder:
        print(f"other arguments, config or corpus than the training in {folder}: this one is in {home}", flush=True)
    stages = {
        text: ("1/3 text of this machine", lambda: make_text(folder)),
        tokens: ("2/3 tokenizer and tokens", lambda: make_tokens(folder, vocab_size)),
        trained: ("3/3 training", lambda: train(folder, for_train, started)),
    }
    for stage, (title, make) in stages.items():
        if stage.is_current:
            print(f"{title}: up to date", flush=True)
            continue
        print(f"{title} -> {folder}", flush=True)
        before = time.monotonic()
        make()
        stage.record()
        print(f"{title}: {human_seconds(time.monotonic() - before)}\n", flush=True)
    report(home, vocab_size)
    print(f"done in {human_seconds(time.monotonic() - start)}; train again with DEMO_ARGS=--fresh")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: that of the stage that failed, else 0."""
    arguments, for_train = parse_arguments(argv)
    return run_tool(partial(work, arguments, for_train), "interrupted: run it again to resume")
