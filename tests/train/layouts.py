"""The space of layouts, and a fixed list of them that covers every pair of option values that can stand together.

An option is anything that may change how a step is computed, and some that change the model itself (`MODEL`): a layout
is compared with one process that trains the same model on the same global batches.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from functools import cache
from itertools import combinations, product
from pathlib import Path
from typing import Any

import numpy as np

from internlm_lite.config.cross import cross_problems
from internlm_lite.config.schema import Config
from internlm_lite.mesh.mesh import Sizes, sizes_of
from tests.torches import HAS_ZBV
from tests.train.runs import tiny

MAX_RANKS = 8
MAX_LAYERS = 17
STEPS = 5
LIMIT = 1e-10
"""Relative, of an fp64 figure against the one of a single process."""


Keys = tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Layout:
    """Values of all options. The defaults are one process."""

    dp: int = 1
    tp: int = 1
    pp: int = 1
    cp: int = 1
    exchange: str = "gather"
    schedule: str | None = None
    chunks: int = 1
    zero1: int = -1
    zero_stage: int = 1
    reshard: bool = True
    """Free weights after the forward pass, in stage 3."""
    rows: int = 4
    """Packed rows of a global batch: micro_num = rows / dp."""
    tied: bool = False
    split_hidden: bool = True
    sp: bool = False
    early_receive: bool = True
    micro_bsz: int = 1
    """A row holds 32 * micro_bsz tokens, cut out of the documents: another value means other batches."""
    checkpoint: float = 0
    parallel_output: bool = True
    overlap_grad: bool = True
    overlap_param: bool = True
    bucket: int = 1 << 29
    bias: bool | str = True
    """"qkv": on queries, keys and values alone."""
    qk_norm: bool | str = False
    head_dim: int | None = None
    rope: str | None = None
    """rope_type of the scaling."""
    post_norm: bool = False
    smoothing: float = 0
    embed_scale: float = 1
    fp32_norm: bool = False
    fp8: bool = False
    layers: int = 5
    keys: Keys = ()
    """(config key, value) of further sections and keys."""

    @property
    def world(self) -> int:
        return self.dp * self.cp * self.tp * self.pp

    @property
    def sizes(self) -> Sizes:
        return sizes_of(self.world, self.tp, self.pp, self.zero1, self.cp)

    @property
    def same_model(self) -> Layout:
        """One process that trains the same model on the same batches: the reference."""
        return replace(Layout(), **{name: getattr(self, name) for name in MODEL})

    def __str__(self) -> str:
        """What is not as in one process by default."""
        changed = [(f.name, getattr(self, f.name)) for f in fields(self) if getattr(self, f.name) != f.default]
        return " ".join(f"{name}={value}" for name, value in changed) or "one process"


MODEL = (
    *("rows", "micro_bsz", "tied", "bias", "qk_norm", "head_dim", "rope", "post_norm", "smoothing", "embed_scale"),
    *("fp32_norm", "fp8", "layers", "keys"),
)
"""Options that change the model or the batches. The others must not change a figure."""

BOUND: dict[str, tuple[Any, ...]] = {
    "dp": (1, 2, 3, 4, 8),
    "tp": (1, 2, 4),
    "pp": (1, 2, 3, 4, 8),
    "schedule": (None, "1f1b", "interleaved", *["zbv"] * HAS_ZBV),
    "chunks": (1, 2, 3),
    "zero1": (-1, 1, 2),
    "rows": (4, 6, 8),
    "tied": (False, True),
    "split_hidden": (True, False),
    "early_receive": (True, False) if HAS_ZBV else (True,),
}
"""Options that rule each other out."""

FREE: dict[str, tuple[Any, ...]] = {
    "sp": (False, True),
    "micro_bsz": (1, 2),
    "checkpoint": (0, 0.5, 1),
    "parallel_output": (True, False),
    "overlap_grad": (True, False),
    "overlap_param": (True, False),
    "bucket": (1 << 29, 1500),
    "bias": (True, False, "qkv"),
    "qk_norm": (False, "head"),
    "head_dim": (None, 6),
    "rope": (None, "linear", "llama3", "yarn"),
    "post_norm": (False, True),
    "smoothing": (0, 0.1),
    "embed_scale": (1, 0.5),
    "fp32_norm": (False, True),
}
"""Options that stand with every value of every other option."""

OPTIONS = {**BOUND, **FREE}


def runnable(layouts: list[Layout]) -> list[Layout]:
    """Those for which the installed torch has the schedule."""
    return [layout for layout in layouts if HAS_ZBV or layout.schedule != "zbv"]


BESIDES = runnable(
    [
        Layout(pp=5, layers=6, tied=True, bucket=1500),  # fewer micro-batches than stages
        Layout(pp=7, rows=8, layers=11, sp=True, checkpoint=0.5),  # stages of one and of two layers
        Layout(dp=5, rows=5, tp=1, zero1=5, bucket=1500),
        Layout(dp=6, rows=6, zero1=3, tied=True),  # shards over three, replicas over two
        Layout(dp=2, pp=2, tp=2, rows=8, schedule="zbv", chunks=2, sp=True, tied=True, split_hidden=False, bucket=1500),
        Layout(pp=2, rows=4, schedule="interleaved", chunks=4, layers=9),
    ]
)
"""Corners that the pairs do not ask for."""


def config_of(layout: Layout, corpus: Path | None, dtype: str = "torch.float64", **sections: dict[str, Any]) -> Config:
    """`STEPS` steps of a decoder with eight query heads and four key/value heads, in this layout."""
    data = {"seq_len": 32, "micro_bsz": layout.micro_bsz, "micro_num": layout.rows // layout.dp, "total_steps": STEPS}
    model = {
        "num_attention_heads": 8,
        "num_kv_attention_heads": 4,
        "num_layers": layout.layers,
        "num_chunks": layout.chunks,
        "checkpoint": layout.checkpoint,
        "parallel_output": layout.parallel_output,
        "embed_split_hidden": layout.split_hidden,
        "tie_word_embeddings": layout.tied,
        "no_bias": not layout.bias,
        "out_bias": None if layout.bias != "qkv" else False,
        "qk_norm": layout.qk_norm,
        "head_dim": layout.head_dim,
        "rope_scaling": layout.rope
        and {"rope_type": layout.rope, "factor": 4.0, "original_max_position_embeddings": 8, "beta_fast": 2.0},
        "apply_post_layer_norm": layout.post_norm,
        "embed_grad_scale": layout.embed_scale,
        "use_fp32_norm": layout.fp32_norm,
        "fp8": layout.fp8,
        "dtype": dtype,
    }
    loss: dict[str, Any] = {"label_smoothing": layout.smoothing}
    engine: dict[str, Any] = {}
    for key, value in layout.keys:
        section, _, name = key.partition(".")
        target = {"model": model, "loss": loss, "engine": engine}[section]
        target[name] = dict(value) if name == "rope_scaling" else list(value) if isinstance(value, tuple) else value
    pipeline = {"size": layout.pp, "schedule": layout.schedule, "interleaved_overlap": layout.early_receive}
    zero = {
        "overlap_sync_grad": layout.overlap_grad,
        "overlap_sync_param": layout.overlap_param,
        "reduce_bucket_size": layout.bucket,
    }
    return tiny(
        corpus,
        data={**data, **sections.pop("data", {})},
        model=model,
        parallel={
            "zero1": layout.zero1,
            "zero_stage": layout.zero_stage,
            "reshard_after_forward": layout.reshard,
            "tensor": layout.tp,
            "pipeline": pipeline,
            "context": {"size": layout.cp, "exchange": layout.exchange},
            "sequence_parallel": layout.sp,
        },
        hybrid_zero_optimizer=zero,
        loss=loss,
        engine=engine,
        lr_scheduler={"total_steps": STEPS},
        **sections,
    )


def feasible(layout: Layout) -> bool:
    """What the trainer accepts, on at most MAX_RANKS ranks that share the rows evenly, with MAX_LAYERS at most."""
    fits = layout.world <= MAX_RANKS and layout.rows % layout.dp == 0 and layout.layers <= MAX_LAYERS
    return fits and not list(cross_problems(config_of(layout, None), layout.world))


def build(options: dict[str, Any]) -> Layout:
    """A model with a layer for every stage, and one more."""
    return Layout(**options, layers=max(5, options["pp"] * options["chunks"] + 1))


@cache
def bound_choices() -> tuple[tuple[Any, ...], ...]:
    """Every combination of values of BOUND that can stand together, in its order."""
    return tuple(
        values for values in product(*BOUND.values()) if feasible(build(dict(zip(BOUND, values, strict=True))))
    )


Pair = tuple[tuple[str, Any], tuple[str, Any]]


def all_pairs() -> set[Pair]:
    """Every pair of values of two options."""
    return {
        ((one, a), (other, b))
        for one, other in combinations(OPTIONS, 2)
        for a, b in product(OPTIONS[one], OPTIONS[other])
    }


def pairs_of(layout: Layout) -> set[Pair]:
    return set(combinations([(name, getattr(layout, name)) for name in OPTIONS], 2))


def feasible_pairs() -> set[Pair]:
    """Those of `all_pairs` that stand together in some layout: two bound options must meet in `bound_choices`."""
    met = {pair for values in bound_choices() for pair in combinations(zip(BOUND, values, strict=True), 2)}
    return {pair for pair in all_pairs() if pair in met or pair[1][0] in FREE}


class _Uncovered:
    """Pairs still to cover, as a symmetric matrix over the numbered values of all options."""

    def __init__(self) -> None:
        self.numbers = {value: i for i, value in enumerate((n, v) for n, values in OPTIONS.items() for v in values)}
        self.matrix = np.zeros((len(self.numbers),) * 2, bool)
        for pair in feasible_pairs():
            self.set(pair, True)

    def set(self, pair: Pair, value: bool) -> None:
        a, b = (self.numbers[end] for end in pair)
        self.matrix[a, b] = self.matrix[b, a] = value


def covering_layouts() -> Iterator[Layout]:
    """Greedy: the bound values that meet most open pairs for the ranks they cost, then free values one by one."""
    left = _Uncovered()
    choices = np.array([[left.numbers[end] for end in zip(BOUND, values, strict=True)] for values in bound_choices()])
    ranks = np.array([np.prod(values[:3]) for values in bound_choices()])
    free = [left.numbers[name, value] for name in FREE for value in FREE[name]]
    used = np.zeros(len(left.numbers), int)
    while left.matrix.any():
        open_here = sum(left.matrix[choices[:, i], choices[:, j]] for i, j in combinations(range(choices.shape[1]), 2))
        open_free = left.matrix[:, free].sum(1)[choices].sum(1)
        best = int(np.argmax((open_here + 0.25 * open_free) / ranks**0.5))
        options = dict(zip(BOUND, bound_choices()[best], strict=True))
        taken = choices[best].tolist()
        for name, values in FREE.items():
            numbers = [left.numbers[name, value] for value in values]
            here, later = left.matrix[np.ix_(numbers, taken)].sum(1), left.matrix[numbers].sum(1)
            options[name] = values[np.lexsort((used[numbers], -later, -here))[0]]
            taken.append(left.numbers[name, options[name]])
        used[taken] += 1
        layout = build(options)
        for pair in pairs_of(layout):
            left.set(pair, False)
        yield layout


@cache
def fixed_layouts() -> tuple[Layout, ...]:
    """By size of their world."""
    return tuple(sorted([*covering_layouts(), *BESIDES], key=lambda layout: layout.world))


def fixed_layouts_on(ranks: int) -> list[Layout]:
    return [layout for layout in fixed_layouts() if layout.world == ranks]
