"""Memory of a rank, computed from the bytes that its stages keep per micro-batch.

Scalars, the batch itself and rounding by the allocator are not included.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from internlm_lite.apps.planner.holdings import RankHoldings
from internlm_lite.apps.planner.report import RankBytes
from internlm_lite.apps.planner.schedule import Action, moments
from internlm_lite.config.schema import Config
from internlm_lite.layers.costs import Bytes, RowShape
from internlm_lite.layers.flash import AttentionBackend
from internlm_lite.models.decoder import Transformer


def row_shape(config: Config, backend: AttentionBackend, device: str) -> RowShape:
    """Shape of a micro-batch of `config`."""
    context = config.parallel.context
    return RowShape(
        config.data.micro_bsz * config.data.seq_len // context.size,
        device,
        attention_by_document=backend in (AttentionBackend.SDPA, AttentionBackend.CUDNN),
        reference=backend is AttentionBackend.SDPA,
        selective=config.model.recomputes_cheap,
        offloaded=config.model.offloaded_layers,
        context=context.size,
        exchange=context.exchange,
        source_tokens=config.source_tokens,
    )


def stage_bytes(stage: Transformer, row: RowShape, recomputed: int) -> Bytes:
    """Bytes kept for one micro-batch; the model's first `recomputed` layers are recomputed.

    In a pipeline the first layer's input lies in a receive buffer (`receive_buffers`), and the output is kept as well.
    """
    kept = stage.saved_bytes(row, recomputed=recomputed)
    if not stage.spec.first and not stage.blocks()[0].host_bytes(row):
        kept["layer inputs"] -= stage.input_bytes(row)
    if not (stage.spec.first and stage.spec.last):
        kept["stage outputs"] = stage.hidden_bytes(replace(row, source_tokens=0) if stage.spec.last else row)
    return kept


def most_kept(held: RankHoldings, row: RowShape, order: Sequence[Action], recomputed: int) -> Bytes:
    """Activations in bytes by component, at the peak of a step."""
    kept_once = {number: stage_bytes(stage, row, recomputed) for number, stage in held.stages.items()}
    splits = any(action.kind == "I" for action in order)
    deferred_once = {number: stage.deferred_bytes(row) if splits else 0 for number, stage in held.stages.items()}

    def at(kept: dict[int, int], deferred: dict[int, int]) -> Bytes:
        found: Counter[str] = Counter()
        for number, count in kept.items():
            found.update({name: count * size for name, size in kept_once[number].items()})
        found["waiting for weight gradients"] = sum(count * deferred_once[n] for n, count in deferred.items())
        return {name: size for name, size in found.items() if size}

    return max((at(*moment) for moment in moments(order)), key=lambda found: sum(found.values()))


def host_bytes(held: RankHoldings, row: RowShape, order: Sequence[Action]) -> int:
    """Pinned host memory for activations, at the peak of a step."""
    once = {number: stage.host_bytes(row) for number, stage in held.stages.items()}
    return max(sum(count * once[number] for number, count in kept.items()) for kept, _ in moments(order))


def receive_buffers(held: RankHoldings, row: RowShape, micro_num: int) -> int:
    """Bytes of torch's pipeline receive buffers: one per micro-batch and direction, kept between steps."""
    boundaries = sum((not stage.spec.first) + (not stage.spec.last) for stage in held.stages.values())
    return boundaries * micro_num * next(iter(held.stages.values())).hidden_bytes(row)


def rank_bytes(
    held: RankHoldings, row: RowShape, order: Sequence[Action], micro_num: int, recomputed: int
) -> RankBytes:
    """Memory of every rank of this pipeline position."""
    activations = sum(most_kept(held, row, order, recomputed).values())
    moments = zip(held.stages[max(held.stages)].workspaces(row), held.whole(micro_num), strict=True)
    workspace, whole = max(moments, key=sum)
    return RankBytes(
        weights=held.weights,
        gradients=held.gradients,
        optimizer=held.optimizer,
        activations=activations,
        buffers=receive_buffers(held, row, micro_num),
        workspace=workspace,
        update=held.update,
        host=host_bytes(held, row, order),
        whole=whole,
    )
