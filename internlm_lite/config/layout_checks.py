"""Checks of the layout against the number of processes, the rows and the model, before any process group exists.

world = data * context * tensor * pipeline        every split size divides what it splits
"""

from __future__ import annotations

from collections.abc import Iterator

from internlm_lite.config.problems import Problem
from internlm_lite.config.schema import Config

_TENSOR = "parallel.tensor"
_STAGES = "parallel.pipeline.size"
_CONTEXT = "parallel.context.size"
_ROWS = ("data.seq_len", "data.micro_bsz")


def world_problems(config: Config, world: int) -> Iterator[Problem]:
    """Whether `world` processes are a whole number of copies of the model, and zero1 divides those."""
    parallel = config.parallel
    tensor, stages, context = parallel.tensor, parallel.pipeline.size, parallel.context.size
    ranks, copy = tensor * stages * context, f"{tensor} * {_STAGES} {stages}"
    if context > 1:
        copy = f"{copy} * {_CONTEXT} {context}"
    if world % ranks:
        yield Problem(
            (_TENSOR, _STAGES, *(_CONTEXT,) * (context > 1)),
            f"one copy of the model takes {copy} = {ranks} processes; "
            f"found {world} process{'es' if world > 1 else ''}, expected a multiple of {ranks}; "
            "start more (srun -n, torchrun --nproc_per_node, --world-size of a dry run), or change the layout",
        )
    elif parallel.zero1 > 1 and (alike := world // (tensor * stages)) % parallel.zero1:
        times, processes = " times context" * (context > 1), f"{world} process{'es' if world > 1 else ''}"
        yield Problem(
            ("parallel.zero1",),
            f"found {parallel.zero1}, expected a divisor of the data parallel size{times} {alike} "
            f"({processes} / {tensor * stages} per model), -1 for all of it, or 1 for none; or start more "
            "(--world-size of a dry run)",
        )


def row_problems(config: Config) -> Iterator[Problem]:
    """Whether the ranks that share the tokens of a row get equal parts."""
    tensor, context = config.parallel.tensor, config.parallel.context.size
    tokens = config.data.micro_bsz * config.data.seq_len
    rows = f"rows of micro_bsz * seq_len = {tokens} tokens"
    if tokens % context:
        yield Problem(
            (_CONTEXT, *_ROWS),
            f"found {context} with {rows}, expected a multiple of {_CONTEXT}: each rank has the same number of "
            "tokens; change one of them",
        )
    elif config.parallel.sequence_parallel and tokens // context % tensor:
        divisor, what = tensor, f"{_TENSOR} {tensor}"
        if context > 1:
            divisor, what = tensor * context, f"{_CONTEXT} {context} * {_TENSOR} {tensor} = {tensor * context}"
        yield Problem(
            ("parallel.sequence_parallel", *_ROWS, _TENSOR, *(_CONTEXT,) * (divisor > tensor)),
            f"found True with {rows}, expected a multiple of {what}; change one of them",
        )


def heads_problems(config: Config) -> Iterator[Problem]:
    """Whether the ranks that exchange tokens for heads get equal numbers of query heads. Key heads may be fewer: they
    are repeated."""
    tensor, context, heads = config.parallel.tensor, config.parallel.context, config.model.num_attention_heads
    if context.exchange == "ulysses" and heads % tensor == 0 and heads // tensor % context.size:
        yield Problem(
            (_CONTEXT, "parallel.context.exchange", "model.num_attention_heads", *(_TENSOR,) * (tensor > 1)),
            f'found {context.size} with exchange "ulysses" and {heads // tensor} query heads'
            f"{' on each tensor-parallel rank' * (tensor > 1)}, expected a divisor of {heads // tensor}: every rank "
            'has as many heads; change one of them, or set exchange to "ring" or "gather"',
        )
