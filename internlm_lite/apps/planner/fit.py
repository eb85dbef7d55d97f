"""`train.py --dry-run --fit`: which layouts of a config fit N GPUs, and which of them is fastest.

Every layout trains the same tokens a step. Searched are tensor, pipeline (with its schedule) and context parallelism
(with its exchange), the stage of ZeRO, what is recomputed or goes to the host, and the rows of a micro-batch. Of
layouts that differ in stage and recomputation alone, one that pays more for memory is not tried where one that pays
less fits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from internlm_lite.apps.planner.clock import Seconds, document_lengths
from internlm_lite.apps.planner.device_file import DeviceFile
from internlm_lite.apps.planner.holdings import RankHoldings, holdings, with_buckets
from internlm_lite.apps.planner.memory import rank_bytes, row_shape
from internlm_lite.apps.planner.outside import outside_bytes
from internlm_lite.apps.planner.report import RankBytes
from internlm_lite.apps.planner.schedule import actions_of
from internlm_lite.apps.planner.step_clock import StepClock, present_ways
from internlm_lite.config.cross import cross_problems
from internlm_lite.config.schema import Config
from internlm_lite.errors import ConfigError
from internlm_lite.layers.context_parallel.exchanges import EXCHANGES
from internlm_lite.layers.flash import expected_backend
from internlm_lite.mesh.mesh import Sizes, sizes_of

USABLE = 0.96
"""Share of the memory that a layout may fill, with what is outside of tensors: fragments take the rest."""
SHOWN = 5
"""Layouts that are told."""
_LONG_PART = 8192
"""Tokens of a row that a context-parallel rank has at least: with fewer, tensor and data parallelism serve as well."""
_LONGEST_ROW = 32_768
"""Tokens of a packed row beyond which a step gains nothing, unless one sample is longer."""
_LONGEST_PIPELINE = 16
"""Ranks of a pipeline: longer ones wait more than they save."""
_HOST = 2
"""Memory of the host for each GPU that activations may fill, in memories of a GPU: hosts of 8 of 80 GB have 2 TB."""
_RECOMPUTED: tuple[bool | str, ...] = (False, "selective", "offload", True)
"""Values of model.checkpoint, from the one that keeps most."""
_SHARES = (0.25, 0.5, 0.75, 1.0)
"""Of the layers whose activations go to the host, the first that fits."""
LIMITS = {
    "compute": ("products", "attention", "elementwise", "loss", "embedding", "weight gradients", "gaps", "optimizer"),
    "recomputation": ("recomputation",),
    "tensor-parallel messages": ("tensor parallel",),
    "context-parallel messages": ("context parallel",),
    "bubbles": ("bubble",),
    "gather traffic": ("gather of weights", "reduce-scatter", "all-reduce of replicas"),
    "host traffic": ("offload",),
}
"""What limits a step -> rows of the plan that count it."""


@dataclass(frozen=True)
class Room:
    """What there is."""

    gpus: int
    memory: int
    """Bytes of one GPU."""
    device: DeviceFile

    @property
    def usable(self) -> int:
        return int(USABLE * self.memory)


@dataclass(frozen=True)
class Layout:
    """The keys that are chosen; the rest of the config stays."""

    tensor: int
    pipeline: int
    schedule: str | None
    chunks: int
    context: int
    exchange: str
    zero_stage: int
    checkpoint: bool | str
    offload_share: float
    micro_bsz: int
    micro_num: int

    def keys(self) -> dict[str, Any]:
        return {
            "data.micro_bsz": self.micro_bsz,
            "data.micro_num": self.micro_num,
            "model.checkpoint": self.checkpoint,
            "model.offload_share": self.offload_share,
            "model.num_chunks": self.chunks,
            "parallel.tensor": self.tensor,
            "parallel.sequence_parallel": self.tensor > 1,
            "parallel.pipeline.size": self.pipeline,
            "parallel.pipeline.schedule": self.schedule,
            "parallel.context.size": self.context,
            "parallel.context.exchange": self.exchange,
            "parallel.zero1": -1,
            "parallel.zero_stage": self.zero_stage,
        }

    @property
    def effort(self) -> tuple[int, int, float]:
        """What it pays for memory: of two layouts alike else, the one that is less in all is faster."""
        return self.zero_stage, _RECOMPUTED.index(self.checkpoint), self.offload_share


@dataclass(frozen=True)
class FittingLayout:
    """A layout that fits."""

    gpus: int
    layout: Layout
    config: Config
    bytes: RankBytes
    """Of the fullest rank."""
    outside: int
    """Bytes besides: see outside.py."""
    seconds: Seconds
    """Of a step."""

    @cached_property
    def step(self) -> float:
        return self.seconds.total()

    @property
    def tokens(self) -> int:
        """Of a step, on all GPUs; the same of every layout."""
        data, layout = self.config.data, self.layout
        copies = self.gpus // (layout.tensor * layout.pipeline * layout.context)
        return layout.micro_num * layout.micro_bsz * data.seq_len * copies

    def shares(self) -> dict[str, float]:
        """What limits the step -> its share, the largest first."""
        parts = self.seconds.by_part()
        shares = {name: sum(parts.get(part, 0.0) for part in rows) / self.step for name, rows in LIMITS.items()}
        return dict(sorted(shares.items(), key=lambda item: -item[1]))


def with_keys(config: Config, keys: Mapping[str, Any]) -> Config:
    """The config with these keys, "section.key", changed."""
    values = config.model_dump()
    for key, value in keys.items():
        *path, name = key.split(".")
        section = values
        for part in path:
            section = section[part]
        section[name] = value
    return Config.model_validate(values)


def fit(config: Config, room: Room) -> list[FittingLayout]:
    """The layouts that fit, fastest first, at most `SHOWN`, each the fastest of its kind (parallelism and stage), of
    whatever exchange.
    Raises ConfigError if there is none."""
    rows = rows_of_a_step(config, room.gpus)
    search, fastest = _Search(config, room), dict[Any, FittingLayout]()
    for plain in _plain_layouts(config, room, rows):
        for found in search.of(plain):
            kind = replace(plain, exchange="gather", zero_stage=found.layout.zero_stage, micro_num=1)
            if kind not in fastest or found.step < fastest[kind].step:
                fastest[kind] = found
    if not fastest:
        raise ConfigError(_none_fits(room, rows, search))
    return sorted(fastest.values(), key=lambda one: one.step)[:SHOWN]


def _none_fits(room: Room, rows: int, search: _Search) -> str:
    wanted = f"--fit: no layout of {rows} rows a step on {room.gpus} GPUs"
    change = (
        "expected more GPUs (--gpus), more memory (--memory), a smaller model or data.seq_len, or DeepSpeed's offload "
        "(engine.offload), which is not searched"
    )
    if search.nearest is None:
        why = search.refused or "none divides rows and heads"
        return f"{wanted}: {why}; change data.micro_num, --gpus, or what it says"
    peak, layout = search.nearest
    keys = " ".join(f"{key}={value}" for key, value in layout.keys().items())
    space = f"{room.memory / 1e9:.4g} GB ({USABLE:.0%} of it may be filled)"
    return f"{wanted} fits {space}; the smallest that was tried takes {peak / 1e9:.4g} GB: {keys}; {change}"


def rows_of_a_step(config: Config, gpus: int) -> int:
    """Samples of seq_len tokens in a step of `config` on so many GPUs, in its own layout. Raises ConfigError."""
    parallel, data = config.parallel, config.data
    copy = parallel.tensor * parallel.pipeline.size * parallel.context.size
    if gpus % copy:
        raise ConfigError(
            f"--gpus {gpus}: the config's own layout takes {copy} GPUs for a copy of the model, so its tokens a step "
            f"are not known; expected a multiple of {copy}, or parallel.tensor=1 parallel.pipeline.size=1"
        )
    return data.micro_num * data.micro_bsz * (gpus // copy)


def _plain_layouts(config: Config, room: Room, rows: int) -> Iterator[Layout]:
    """Every parallelism that divides GPUs, rows and heads, with everything kept and single rows."""
    seq_len, model = config.data.seq_len, config.model
    for tensor in _powers(min(room.gpus, room.device.gpus_per_node)):
        if model.kv_heads % tensor or model.num_attention_heads % tensor:
            continue
        for pipeline in _powers(min(room.gpus // tensor, model.num_blocks, _LONGEST_PIPELINE)):
            for schedule, chunks in _schedules(model.num_blocks, pipeline):
                for context in _powers(max(1, min(room.gpus // tensor // pipeline, seq_len // _LONG_PART))):
                    copies, rest = divmod(room.gpus, tensor * pipeline * context)
                    if rest or rows % copies or rows // copies < pipeline:  # most ranks of the pipeline would wait
                        continue
                    kinds = (tensor, pipeline, schedule, chunks, context)
                    for exchange in _exchanges(config, tensor, context):
                        yield Layout(*kinds, exchange, 1, False, 1.0, 1, rows // copies)


def _exchanges(config: Config, tensor: int, context: int) -> Iterator[str]:
    """Values of parallel.context.exchange."""
    if context == 1:
        yield config.parallel.context.exchange
        return
    for name in EXCHANGES:
        if name != "ulysses" or config.model.num_attention_heads // tensor % context == 0:
            yield name


def _powers(most: int) -> Iterator[int]:
    size = 1
    while size <= most:
        yield size
        size *= 2


def _schedules(layers: int, pipeline: int) -> Iterator[tuple[str | None, int]]:
    """(parallel.pipeline.schedule, model.num_chunks); None: as the number of chunks says."""
    yield None, 1
    if pipeline > 1 and layers >= 2 * pipeline:
        yield None, 2
        yield "zbv", 2


class _Search:
    """Finds, for one parallelism after another, what has to be paid for the memory."""

    def __init__(self, config: Config, room: Room) -> None:
        self._config, self._room = config, room
        self._built: tuple[Layout, dict[int, list[RankHoldings]]] | None = None
        """What ranks hold, by stage, whatever the context parallelism; of the last plain layout but for that."""
        self.refused = ""
        """Why the last layout was refused."""
        self.nearest: tuple[int, Layout] | None = None
        """(bytes of the fullest rank, layout) of that which came nearest without fitting."""

    def of(self, plain: Layout) -> list[FittingLayout]:
        """Those of `plain` that fit and of which no other is better in stage and recomputation with as many rows."""
        seq_len, found = self._config.data.seq_len, []
        alike = replace(plain, context=1, exchange="gather", micro_num=1)
        if self._built is None or self._built[0] != alike:
            self._built = alike, {}
        sizes = [n for n in _powers(plain.micro_num) if plain.micro_num % n == 0 and n * seq_len <= _LONGEST_ROW]
        for micro_bsz in reversed(sizes or [1]):
            micro_num = plain.micro_num // micro_bsz
            layout = replace(plain, micro_bsz=micro_bsz, micro_num=micro_num)
            if micro_num >= plain.pipeline and not self._is_refused(with_keys(self._config, layout.keys())):
                some = self._cheapest(layout)
                found += some
                if plain.pipeline == 1 and any(one.layout.effort[:2] == (1, 0) for one in some):
                    break  # smaller micro-batches only take longer
        return found

    def _cheapest(self, layout: Layout) -> list[FittingLayout]:
        """Over stages and recomputation, at one number of rows."""
        found: list[FittingLayout] = []
        choices = len(_RECOMPUTED)
        for stage in (1, 2, 3) if layout.pipeline == 1 else (1, 2):
            for index, checkpoint in enumerate(_RECOMPUTED[:choices]):
                shares = _SHARES if checkpoint == "offload" else (1.0,)
                tries = (replace(layout, zero_stage=stage, checkpoint=checkpoint, offload_share=n) for n in shares)
                one = next((fitting for one in tries if (fitting := self._tried(one))), None)
                if one is None and self._lasts_too_much(stage):
                    break  # whatever is recomputed
                if one is not None:
                    found.append(one)
                    choices = min(choices, index)  # a higher stage is of use only with less recomputation
                    if checkpoint != "offload":
                        break  # else recomputation may take less time than the way to the host
        return found

    def _is_refused(self, config: Config) -> bool:
        problem = next(iter(cross_problems(config, self._room.gpus)), None)
        if problem is not None:
            self.refused = f"{', '.join(problem.keys)}: {problem.text}"
        return problem is not None

    def _lasts_too_much(self, stage: int) -> bool:
        assert self._built is not None, "a layout was tried"
        held = self._built[1].get(stage, [])
        return any(own.weights + own.gradients + own.optimizer > self._room.usable for own in held)

    def _held(self, config: Config, sizes: Sizes) -> list[RankHoldings]:
        """What ranks hold. The model is built once for all stages and kinds of recomputation, and told which."""
        assert self._built is not None, "a plain layout was begun"
        by_stage, stage = self._built[1], config.parallel.zero_stage
        if not by_stage:
            backend = expected_backend(config.model, deterministic=config.deterministic)
            by_stage[stage] = holdings(config, sizes, backend)[0]
        if stage not in by_stage:
            known = next(iter(by_stage.values()))
            by_stage[stage] = [with_buckets(own, config, sizes) for own in known]
        for own in by_stage[stage]:
            for block in (block for part in own.stages.values() for block in part.blocks()):
                block.recompute = block.attention.layer < config.model.recomputed_layers
        return by_stage[stage]

    def _tried(self, layout: Layout) -> FittingLayout | None:
        """None: it is refused, or does not fit."""
        room, config = self._room, with_keys(self._config, layout.keys())
        if self._is_refused(config):
            return None
        sizes = sizes_of(room.gpus, layout.tensor, layout.pipeline, -1, layout.context)
        backend = expected_backend(config.model, deterministic=config.deterministic)
        try:
            held, data = self._held(config, sizes), config.data
        except ConfigError:
            return None
        orders = actions_of(config.schedule, sizes.pp, config.model.num_chunks, data.micro_num)
        row, recomputed = row_shape(config, backend, "cuda"), config.model.recomputed_layers
        every = [rank_bytes(own, row, n, data.micro_num, recomputed) for own, n in zip(held, orders, strict=True)]
        fullest = max(every, key=lambda one: one.peak)
        outside = outside_bytes(config, sizes)
        if fullest.peak + outside > room.usable or fullest.host > _HOST * room.memory:
            if self.nearest is None or fullest.peak + outside < self.nearest[0]:
                self.nearest = fullest.peak + outside, layout
            return None
        ways = present_ways(config, row, document_lengths([(0, data.seq_len)]), room.device)
        seconds = StepClock(room.device, config, sizes, held, orders).seconds(ways)
        return FittingLayout(room.gpus, layout, config, fullest, outside, seconds)
