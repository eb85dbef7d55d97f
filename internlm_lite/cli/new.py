"""Write a config for your data, hardware, and a wanted time or size; says what it chose and why.

internlm-lite new --data tokens --tokenizer tokenizer.model --gpus 8 --device h100 --hours 12 --output configs/mine.py
internlm-lite new --data tokens --tokenizer tokenizer.model --params 30M --output configs/mine.py

--data is a folder of tokenised data (tools/tokenizer.py encode), or one with the sub-folders train and valid.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from internlm_lite.apps.planner.config_text import config_text
from internlm_lite.apps.planner.device_file import device_of, load_device
from internlm_lite.apps.planner.propose import Hardware, Wish, measured, propose
from internlm_lite.cli.options import check_at_least, new_parser
from internlm_lite.config.load import check_config, load_config
from internlm_lite.errors import ConfigError
from internlm_lite.runtime.tool import run_tool
from internlm_lite.units import human_seconds, memory_bytes, positive_number


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = new_parser("new", __doc__)
    add = parser.add_argument
    add("--data", type=Path, required=True, metavar="FOLDER", help="tokenised training data")
    add("--valid", type=Path, metavar="FOLDER", help="tokenised validation data")
    add("--tokenizer", type=Path, metavar="FILE", help="what they were tokenised with")
    add("--vocab-size", type=int, metavar="V", help="ids of the tokenizer, where no file says it")
    add("--hours", type=positive_number, metavar="H", help="time that the run may take")
    add(
        "--params",
        type=_count,
        metavar="N",
        help="size of the model, such as 124M or 1.3B; without --hours: 20 tokens each",
    )
    add("--gpus", type=int, default=1, metavar="N", help="ranks (1)")
    add("--device", default="auto", metavar="NAME", help="cpu, a GPU as of --dry-run, or auto: what is here")
    add("--memory", type=memory_bytes, metavar="SIZE", help="memory of one rank, such as 80GB (default: the device's)")
    add("--seq-len", type=int, metavar="T", help="tokens of a row (default: the longest document, up to 4096)")
    add(
        "--output",
        type=Path,
        required=True,
        metavar="FILE",
        help="the config to write; one that is there is not replaced",
    )
    arguments = parser.parse_args(argv)
    if arguments.hours is None and arguments.params is None:
        parser.error("expected --hours, --params, or both")
    check_at_least(parser, arguments, gpus=1, seq_len=8, vocab_size=2)
    return arguments


def _count(text: str) -> float:
    """'124M' -> 124e6. Raises ArgumentTypeError."""
    factor = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}.get(text[-1:].upper(), 1)
    try:
        number = float(text.rstrip("KMBTkmbt")) * factor
    except ValueError:
        number = 0
    if not 1e4 <= number <= 1e13:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected parameters, such as 124M or 1.3B")
    return number


def work(arguments: argparse.Namespace) -> int:
    """Exit code."""
    if arguments.output.exists():
        raise ConfigError(f"--output {arguments.output} exists; expected a new file: remove it, or choose another name")
    wish = Wish(
        seconds=None if arguments.hours is None else arguments.hours * 3600,
        parameters=arguments.params,
        seq_len=arguments.seq_len,
    )
    data = measured(arguments.data, arguments.valid, arguments.tokenizer, arguments.vocab_size)
    proposal, seconds = propose(data, _hardware(arguments), wish)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    try:
        arguments.output.write_text(config_text(proposal, arguments.output.stem), "utf-8")
        check_config(load_config(arguments.output), arguments.gpus)
    except BaseException:
        with suppress(OSError):
            arguments.output.unlink()  # it would be in the way of the next try
        raise
    print(f"wrote {arguments.output}: about {human_seconds(seconds)} on {arguments.gpus} rank(s)")
    print(*(f"  {name}: {reason}" for name, reason in proposal.reasons.items()), sep="\n")
    print(f"next: python train.py --config {arguments.output} --dry-run --world-size {arguments.gpus}")
    return 0


def _hardware(arguments: argparse.Namespace) -> Hardware:
    """What --device names, or what is here. Raises ConfigError."""
    import torch

    name, memory = arguments.device, arguments.memory
    on_gpu = torch.cuda.is_available() and name == "auto"
    if name == "cpu" or (name == "auto" and not on_gpu):
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return Hardware(arguments.gpus, memory or total // 2 // arguments.gpus, _cpu_peak() / arguments.gpus)
    if on_gpu:
        found, memory = torch.cuda.get_device_name(), memory or torch.cuda.get_device_properties(0).total_memory
        device = device_of(found)
        if device is None:
            raise ConfigError(f"--device auto: found {found}, of which nothing is known; expected --device FILE.json")
    else:
        device = load_device(name)
    memory = memory or (None if device.memory_gib is None else int(device.memory_gib * 2**30))
    if memory is None:
        raise ConfigError(f"--device {name}: its file does not say memory_gib; expected --memory SIZE, such as 80GB")
    return Hardware(arguments.gpus, memory, device.peak_tflops["bf16"] * 1e12, device)


def _cpu_peak(seconds: float = 0.3, size: int = 1024) -> float:
    """FLOP/s of fp32 matrix products on all cores of this machine, measured."""
    import torch

    left = right = torch.ones(size, size)
    torch.mm(left, right)
    start, done = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        torch.mm(left, right)
        done += 1
    return done * 2 * size**3 / (time.perf_counter() - start)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 written, else that of the error."""
    return run_tool(lambda: work(parse_arguments(argv)))
