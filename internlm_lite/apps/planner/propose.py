"""A config for a data folder, given hardware and a wanted time or size: what is chosen, and why.

time * speed of the hardware -> FLOPs -> shape and tokens (sizes.py) -> layout that fits the memory -> time of a step
                                ^---------------- once more with the speed that the plan predicts ----------------'
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from internlm_lite.apps.planner.device_file import DeviceFile
from internlm_lite.apps.planner.plan import Questions, make_plan
from internlm_lite.apps.planner.sizes import RULES, Shape, nearest_shape, size_row
from internlm_lite.config.schema import Config
from internlm_lite.data.folders import find_folders
from internlm_lite.data.tokenizer import Tokenizer
from internlm_lite.data.vocabulary import PADDING
from internlm_lite.errors import ConfigError
from internlm_lite.units import human_bytes, human_count, human_seconds, round_up

MOST_EPOCHS = 4
"""Passes over the data up to which repeated tokens are nearly as good as new ones (arXiv:2305.16264)."""
TOKENS_PER_PARAMETER = 20
"""Where a size is wanted and no time (arXiv:2203.15556)."""
_FEWEST_STEPS = 2
"""One of warm-up and one of decay."""
_HIGHEST_LR = 5e-3
"""Of AdamW. The rule was fitted on 60 M parameters and more, and rises without end below."""
_FEWEST_STEPS = 2
"""The schedule has a warm-up and a decay."""
_LONGEST_ROW = 32_768
"""Tokens of a packed row beyond which a step gains nothing."""
_USABLE = 0.92
"""Share of the memory that a plan may fill: contexts of CUDA and NCCL, and fragments, take the rest."""
_FIRST_MFU = 0.4
"""Share of the peak that a step reaches, until the plan predicts it."""


@dataclass(frozen=True)
class Hardware:
    ranks: int
    memory: int
    """Bytes of one rank."""
    peak: float
    """FLOP/s of one rank, of large matrix products."""
    device: DeviceFile | None = None
    """None: a CPU."""


@dataclass(frozen=True)
class Data:
    """Tokenised training data."""

    folder: Path
    tokens: int
    longest: int
    """Tokens of the longest document."""
    vocab_size: int
    """Rows of embedding and head: the tokenizer's ids, padded."""
    tokenizer: Path | None
    valid: Path | None


@dataclass(frozen=True)
class Wish:
    """What a user asks for: a time, a size, or both."""

    seconds: float | None = None
    parameters: float | None = None
    seq_len: int | None = None


@dataclass(frozen=True)
class Proposal:
    data: Data
    hardware: Hardware
    shape: Shape
    seq_len: int
    lr: float
    batch_tokens: int
    """Wanted tokens of a global batch; the layout comes near."""
    tokens: int
    """Tokens of the whole run, likewise."""
    reasons: Mapping[str, str]
    """Name of a value -> why it was chosen."""
    tensor: int = 1
    pipeline: int = 1
    recomputed: bool | str = False
    micro_bsz: int = 1

    @property
    def data_parallel(self) -> int:
        return self.hardware.ranks // self.tensor // self.pipeline

    @property
    def micro_num(self) -> int:
        per_micro_batch = self.micro_bsz * self.seq_len * self.data_parallel
        return max(self.pipeline, round(self.batch_tokens / per_micro_batch), 1)

    @property
    def tokens_per_step(self) -> int:
        return self.micro_num * self.micro_bsz * self.seq_len * self.data_parallel

    @property
    def steps(self) -> int:
        return max(1, round(self.tokens / self.tokens_per_step))

    @property
    def init_std(self) -> float:
        """sqrt(2 / (5 * hidden_size)), "small init" (arXiv:1910.05895)."""
        return round(math.sqrt(2 / (5 * self.shape.hidden_size)), 4)

    @cached_property
    def config(self) -> Config:
        """The config that the written file becomes, without folders to save to."""
        return Config.model_validate(self.sections())

    def sections(self) -> dict[str, Any]:
        """The sections that decide about memory and time."""
        shape, steps = self.shape, self.steps
        return {
            "data": {
                "seq_len": self.seq_len,
                "micro_num": self.micro_num,
                "micro_bsz": self.micro_bsz,
                "total_steps": steps,
                "train_folder": str(self.data.folder),
            },
            "model": {
                "vocab_size": shape.vocab_size,
                "hidden_size": shape.hidden_size,
                "num_layers": shape.num_layers,
                "num_attention_heads": shape.num_attention_heads,
                "num_kv_attention_heads": shape.num_kv_attention_heads,
                "multiple_of": min(256, shape.hidden_size),
                "tie_word_embeddings": shape.tie_word_embeddings,
                "no_bias": True,
                "init_std": self.init_std,
                "dtype": "torch.float32" if self.hardware.device is None else "torch.bfloat16",
                "checkpoint": self.recomputed,
            },
            "parallel": {
                "tensor": self.tensor,
                "sequence_parallel": self.tensor > 1,
                "pipeline": {"size": self.pipeline},
            },
            "adam": {"lr": self.lr},
            "lr_scheduler": {"total_steps": steps},
        }


def measured(folder: Path, valid: Path | None, tokenizer: Path | None, vocab_size: int | None = None) -> Data:
    """What is in the data. `vocab_size`: ids of the tokenizer, where nothing else says it. Raises DataError, also for
    validation data that cannot be read, and ConfigError where nothing says it."""
    if valid is None and (folder / "train").is_dir() and (folder / "valid").is_dir():
        folder, valid = folder / "train", folder / "valid"
    files = [file for found in find_folders(folder, "train_folder") for file in found.files]
    if valid is not None:
        find_folders(valid, "valid_folder", log=False)
    sizes = [file.metadata.vocab_size for file in files if file.metadata is not None]
    if tokenizer is not None:
        sizes.append(Tokenizer(tokenizer).vocab_size)
    sizes += [] if vocab_size is None else [vocab_size]
    if not sizes:
        raise ConfigError(
            f"{folder}: its files do not say how large the vocabulary is, as they were not made by tools/tokenizer.py; "
            "expected --tokenizer FILE, the tokenizer they were made with, or --vocab-size"
        )
    return Data(
        folder=folder,
        tokens=sum(int(file.lengths.sum()) for file in files),
        longest=max(int(file.lengths.max()) for file in files),
        vocab_size=round_up(max(sizes), PADDING),
        tokenizer=tokenizer,
        valid=valid,
    )


def propose(data: Data, hardware: Hardware, wish: Wish) -> tuple[Proposal, float]:
    """A proposal, and the seconds that its run takes by the plan. Raises ConfigError if no layout fits the memory."""
    guess = _FIRST_MFU * hardware.peak * hardware.ranks
    proposal, seconds = _fitted(_sized(data, hardware, wish, guess), wish)
    if hardware.device is not None and wish.seconds is not None:
        tokens = proposal.steps * proposal.tokens_per_step
        reached = tokens * proposal.shape.flops_per_token("parameters", 0) / seconds
        proposal, seconds = _fitted(_sized(data, hardware, wish, reached), wish)
    if proposal.steps < _FEWEST_STEPS:
        raise ConfigError(
            f"found {human_count(proposal.tokens)} tokens to train on, {proposal.steps} step of "
            f"{proposal.tokens_per_step}, expected at least {_FEWEST_STEPS} steps; give more --hours, a smaller "
            "--seq-len, or more data"
        )
    return proposal, seconds


def _sized(data: Data, hardware: Hardware, wish: Wish, speed: float) -> Proposal:
    """Shape, tokens, batch and learning rate. `speed`: FLOP/s of all ranks together in a step."""
    seq_len = wish.seq_len or _seq_len(data, hardware)
    compute = None if wish.seconds is None else wish.seconds * speed
    rule, chinchilla = RULES[0], RULES[0].name
    if wish.parameters is not None:
        shape = nearest_shape(lambda one: one.parameters, wish.parameters, data.vocab_size)
        per_token = shape.flops_per_token("parameters", seq_len)
        tokens = TOKENS_PER_PARAMETER * shape.parameters if compute is None else round(compute / per_token)
        why = f"nearest to the {human_count(wish.parameters)} parameters wanted, in usual proportions"
    else:
        assert compute is not None, "a time or a size is wanted"
        try:
            row = wanted = size_row(rule, compute, data.vocab_size, seq_len)
        except ConfigError as error:
            raise ConfigError(
                f"--hours: {human_seconds(compute / speed)} on this hardware: {error}; or name a size with --params"
            ) from error
        with suppress(ConfigError):  # the smallest shape of the rule: its tokens are cut below
            while row.tokens > MOST_EPOCHS * data.tokens and row.compute > compute / 1e6:
                row = size_row(rule, row.compute * 0.9, data.vocab_size, seq_len)
        shape, tokens = row.shape, wanted.tokens
        why = f"best for {row.compute:.2g} FLOPs by the rule {chinchilla} (tools/plan.py sizes)"
    reasons = {"shape": f"{human_count(shape.parameters)} parameters: {why}"}
    most = MOST_EPOCHS * data.tokens
    reasons["steps"] = f"{human_count(tokens)} tokens, {tokens / data.tokens:.2g} passes over the data"
    if tokens > most:
        reasons["steps"] = (
            f"{MOST_EPOCHS} passes over {human_count(data.tokens)} tokens, beyond which repeating them gains little "
            f"(arXiv:2305.16264); {human_count(tokens)} were wanted: more data would use them"
        )
        tokens = most
    spent = tokens * shape.flops_per_token("parameters", seq_len)
    lr = min(_HIGHEST_LR, float(f"{rule.lr(spent, shape.non_embedding, tokens):.2g}"))
    reasons["lr"] = "1.79 N^-0.713 D^0.307, at most 5e-3 (Step Law, arXiv:2503.04715, fitted on larger models)"
    reasons["batch"] = "about 0.58 D^0.571 tokens (Step Law)"
    reasons["seq_len"] = f"the longest document has {data.longest} tokens" if wish.seq_len is None else "as wanted"
    batch = max(seq_len, round(min(rule.batch(spent, tokens), data.tokens / 2)))
    return Proposal(data, hardware, shape, seq_len, lr, batch, tokens, reasons)


def _seq_len(data: Data, hardware: Hardware) -> int:
    """A power of two that holds the longest document, within what is usual on such hardware."""
    most = 256 if hardware.device is None else 4096
    return min(most, max(64, 1 << (data.longest - 1).bit_length()))


def _fitted(sized: Proposal, wish: Wish) -> tuple[Proposal, float]:
    """The fastest layout among the simplest that fit, and the seconds of the run."""
    for layout in _layouts(sized):
        fitting = [found for recomputed in (False, "selective", True) if (found := _fill(layout, recomputed))]
        if fitting:
            proposal, per_token = min(fitting, key=lambda found: found[1])
            if proposal.steps < _FEWEST_STEPS:
                raise ConfigError(
                    f"found {human_count(proposal.tokens)} tokens for {proposal.steps} step of "
                    f"{proposal.tokens_per_step}, expected at least {_FEWEST_STEPS} steps; give more --hours or data, "
                    "or a smaller --params or --seq-len"
                )
            return proposal, per_token * proposal.steps * proposal.tokens_per_step
    hardware = sized.hardware
    raise ConfigError(
        f"{human_count(sized.shape.parameters)} parameters fit {hardware.ranks} ranks of "
        f"{human_bytes(hardware.memory)} in no layout; expected a smaller model or less time, or more GPUs: "
        "change --params, --hours or --gpus"
    )


def _layouts(sized: Proposal) -> Iterator[Proposal]:
    """Without pipeline first, and with as few tensor-parallel ranks as possible."""
    shape, ranks = sized.shape, sized.hardware.ranks
    node = 1 if sized.hardware.device is None else sized.hardware.device.gpus_per_node
    for pipeline in (1, 2, 4, 8, 16):
        for tensor in (1, 2, 4, 8):
            divides = ranks % (tensor * pipeline) == 0 and shape.num_layers % pipeline == 0
            heads = shape.num_attention_heads % tensor == 0 and shape.num_kv_attention_heads % tensor == 0
            if divides and heads and tensor <= node:
                yield replace(sized, tensor=tensor, pipeline=pipeline)


def _fill(layout: Proposal, recomputed: bool | str) -> tuple[Proposal, float] | None:
    """(the layout with the largest useful micro-batch, seconds per token); None if not even one row fits."""
    hardware, seq_len = layout.hardware, layout.seq_len
    layout = replace(layout, recomputed=recomputed, micro_bsz=1)
    device = "cpu" if hardware.device is None else "cuda"
    questions = Questions(memory=int(_USABLE * hardware.memory))
    fits = make_plan(layout.config, hardware.ranks, None, device, questions).largest_batch
    assert fits is not None, "the plan was asked"
    rows = max(1, round(layout.batch_tokens / seq_len / layout.data_parallel / layout.pipeline))
    most = min(fits.micro_bsz, rows, max(1, _LONGEST_ROW // seq_len))
    if most < 1:
        return None
    filled = replace(layout, micro_bsz=1 << (most.bit_length() - 1))
    tflops = _FIRST_MFU * hardware.peak / 1e12 if hardware.device is None else None
    plan = make_plan(filled.config, hardware.ranks, tflops, device, Questions(timed=hardware.device))
    seconds = plan.seconds_per_step if plan.clock is None else plan.clock.seconds_per_step
    assert seconds is not None, "a speed was given"
    peak = max(rank.bytes.peak for rank in plan.ranks)
    reasons = {
        **filled.reasons,
        "layout": f"{human_bytes(peak)} of {human_bytes(hardware.memory)} on the fullest rank; a step takes "
        f"{human_seconds(seconds)} by the plan",
    }
    return replace(filled, reasons=reasons), seconds / filled.tokens_per_step
