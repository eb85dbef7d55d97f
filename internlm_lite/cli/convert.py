"""Checkpoints to Hugging Face safetensors and back, and to the files of llama2.c.

    internlm-lite convert to-hf ckpts hf-model --dtype bfloat16 --verify
    internlm-lite convert from-hf hf-model ckpts-from-hf --verify
    internlm-lite convert to-llama2c ckpts llama2c

from-hf writes weights alone: train on with ckpt.load_model_only_folder, or give the folder to `internlm-lite generate`.
--verify computes the same logits here and in transformers; exit code 2 when they differ by more than it states.
"""

from __future__ import annotations

import argparse
import os
import re
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from internlm_lite.apps.convert.compare_logits import compare, require_transformers
from internlm_lite.apps.convert.families import FAMILIES
from internlm_lite.apps.convert.from_hf import read_hf
from internlm_lite.apps.convert.hf_config import default_family
from internlm_lite.apps.convert.llama2c import write_llama2c
from internlm_lite.apps.convert.to_hf import open_checkpoint, write_hf
from internlm_lite.checkpoint.format.catalog import Found
from internlm_lite.checkpoint.format.weight_roles import Weights, with_weights
from internlm_lite.cli.options import add_weights, new_parser, s3_settings
from internlm_lite.config.schema import Config, ModelConfig, S3Config
from internlm_lite.data.tokenizer import Tokenizer
from internlm_lite.errors import CheckpointError
from internlm_lite.generate.load_model import load_model
from internlm_lite.mesh.mesh import single_process_mesh
from internlm_lite.models.stages import WholeModel
from internlm_lite.runtime.dist_env import adopt_s3_keys
from internlm_lite.runtime.tool import add_s3_option, run_tool
from internlm_lite.units import human_bytes, human_seconds

HEARTBEAT_SECONDS = 10.0
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = new_parser("convert", __doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    to_hf = commands.add_parser("to-hf", help="a checkpoint of ours to a Hugging Face folder")
    to_llama2c = commands.add_parser("to-llama2c", help="a checkpoint of ours to model.bin and tokenizer.bin")
    for command in (to_hf, to_llama2c):
        command.add_argument("checkpoint", help="a save folder (its newest checkpoint), or one checkpoint of it")
        command.add_argument("out", type=Path, help="folder to make")
        command.add_argument("--tokenizer", help="tokenizer file or folder, or none (the config's data.tokenizer)")
        add_weights(command)
    add, dtypes = to_hf.add_argument, ["float32", "bfloat16", "float16"]
    add("--dtype", choices=dtypes, help="of the weights (as the model was trained)")
    add("--model-type", choices=FAMILIES, help="which model it becomes (the first that can express it)")
    add("--shard-size", type=size, default=size("5GB"), help="largest file of weights (5GB)")
    from_hf = commands.add_parser("from-hf", help="a Hugging Face folder to a checkpoint of ours")
    from_hf.add_argument("folder", type=Path, help="config.json, *.safetensors")
    from_hf.add_argument("out", help="save folder without checkpoints")
    for command in (to_hf, from_hf):
        command.add_argument("--verify", action="store_true", help="compare logits with transformers'")
    for command in (to_hf, to_llama2c, from_hf):
        add_s3_option(command)
    return parser.parse_args(argv)


def size(text: str) -> int:
    """'5GB' -> 5000000000"""
    found = re.fullmatch(r"([0-9.]+)\s*([KMG]I?B)?", text.strip().upper())
    n_bytes = int(float(found[1]) * _UNITS[found[2] or ""]) if found and found[1].count(".") < 2 else 0
    if n_bytes < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a size such as 5GB or 512MiB")
    return n_bytes


class Progress:
    """Prints the progress every HEARTBEAT_SECONDS."""

    def __init__(self) -> None:
        self.begin = self._last = time.monotonic()
        self._done = 0

    def __call__(self, name: str) -> None:
        self._done += 1
        if time.monotonic() - self._last >= HEARTBEAT_SECONDS:
            self._last = time.monotonic()
            print(f"{self._done} tensors, last {name}", flush=True)

    def summary(self, n_tensors: int, n_bytes: int) -> str:
        seconds = time.monotonic() - self.begin
        return f"{n_tensors} tensors, {human_bytes(n_bytes)}, {human_seconds(seconds)}"


def opened(arguments: argparse.Namespace, s3: S3Config) -> tuple[Found, Config, str, Tokenizer | None]:
    """The checkpoint, its config, its own path, and the tokenizer that goes with it. Raises CheckpointError."""
    found, config, path = open_checkpoint(arguments.checkpoint, s3)
    if layers := config.model.num_encoder_layers:
        raise CheckpointError(
            f"{path}: model.num_encoder_layers: found {layers}, expected 0: neither a family of Hugging Face that is "
            "known here nor llama2.c has an encoder; give the checkpoint itself to `internlm-lite generate`"
        )
    for reason in found.rejected:
        print(f"passed over {reason}")
    found = with_weights(found, arguments.weights)
    print(f"checkpoint {found.name} ({found.manifest.kind}, step {found.step})")
    tokenizer = arguments.tokenizer or config.data.tokenizer
    if tokenizer is None:
        print("no tokenizer copied: the config names none; give one with --tokenizer FILE")
    return found, config, path, None if tokenizer in (None, "none") else Tokenizer(Path(tokenizer))


def to_llama2c(arguments: argparse.Namespace, s3: S3Config) -> int:
    """Exit code."""
    found, config, _, tokenizer = opened(arguments, s3)
    progress = Progress()
    written, notes = write_llama2c(found, config, arguments.out, tokenizer, done=progress)
    print(f"{arguments.out}: {', '.join(written.files)}, {progress.summary(written.n_tensors, written.n_bytes)}")
    for note in notes:
        print(f"note: {note}")
    return 0


def to_hf(arguments: argparse.Namespace, s3: S3Config) -> int:
    """Exit code."""
    found, config, path, tokenizer = opened(arguments, s3)
    trained = config.model.torch_dtype_name
    progress = Progress()
    written = write_hf(
        found,
        config,
        arguments.out,
        family=arguments.model_type or default_family(config.model),
        dtype=arguments.dtype or ("float32" if trained == "float64" else trained),
        tokenizer=tokenizer,
        shard_bytes=arguments.shard_size,
        done=progress,
    )
    files = written.files[0] if len(written.files) == 1 else f"{len(written.files)} files"
    print(f"{arguments.out}: {files}, {progress.summary(written.n_tensors, written.n_bytes)}")
    return verify(path, arguments.out, s3, arguments.weights) if arguments.verify else 0


def from_hf(arguments: argparse.Namespace, s3: S3Config) -> int:
    """Exit code."""
    progress = Progress()
    taken = read_hf(arguments.folder, arguments.out, s3, done=progress)
    print(f"{arguments.out}: checkpoint {taken.name}, {progress.summary(taken.n_tensors, taken.n_bytes)}")
    for note in taken.notes:
        print(f"note: {note}")
    print(usage(taken.config, arguments.out))
    return verify(arguments.out, arguments.folder, s3) if arguments.verify else 0


def usage(config: Config, out: str) -> str:
    """Config lines for a run that starts from the converted weights."""
    model = config.model
    keys = [
        key
        for key, field in ModelConfig.model_fields.items()
        if field.is_required() or getattr(model, key) != field.default
    ]
    lines = [f"    {key}={getattr(model, key)!r}," for key in keys]
    head = ["# to train on:", f"ckpt = dict(load_model_only_folder={out!r})", "model = dict("]
    return "\n".join([*head, *lines, ")"])


def verify(checkpoint: str, folder: Path, s3: S3Config, weights: Weights = "model") -> int:
    """Exit code: 2 when the logits differ by more than the bound."""

    def load() -> WholeModel:
        return load_model(checkpoint, single_process_mesh(), "torch.float32", s3, weights=weights)[0]

    difference = compare(load, folder)
    print(f"{'verified' if difference.is_small else 'NOT THE SAME MODEL'}: {difference}")
    return 0 if difference.is_small else 2


def work(arguments: argparse.Namespace) -> int:
    """Exit code."""
    adopt_s3_keys(os.environ)
    if "verify" in arguments and arguments.verify:
        require_transformers()
    commands = {"to-hf": to_hf, "from-hf": from_hf, "to-llama2c": to_llama2c}
    return commands[arguments.command](arguments, s3_settings(arguments.s3))


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 2 bad input or different logits, 6 storage, 130 interrupted."""
    arguments = parse_arguments(argv)
    interrupted = "interrupted: a folder or checkpoint that was being written is gone"
    return run_tool(partial(work, arguments), interrupted, has_s3_option=True)
