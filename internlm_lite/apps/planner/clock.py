"""How long the units of a model and the optimizer take on a device: a roofline from what the layers say they cost.

A kernel takes either the time of its operations (matrix products, attention) or that of the memory that it moves, and
the gap before the next one. Nothing overlaps on the GPU but what overlap.py counts, and a ring's exchanges.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from internlm_lite.apps.planner.bucket_sizes import BucketSizes
from internlm_lite.apps.planner.device_file import DeviceFile
from internlm_lite.apps.planner.schedule import StageCost
from internlm_lite.layers.attention import Attention
from internlm_lite.layers.context_parallel.exchange_costs import in_ring
from internlm_lite.layers.costs import CostedLayer, Message, Pass, RowShape
from internlm_lite.layers.flash import LONG, TILE
from internlm_lite.models.decoder import Block, EncoderBlock
from internlm_lite.models.head import Head


class Seconds(dict[tuple[str, str], float]):
    """(row of the plan, kind of kernel) -> seconds. Kinds, as a profile shows them: products, attention, elementwise,
    copies, norms, optimizer, gaps, messages."""

    def add(self, part: str, kind: str, seconds: float) -> None:
        if seconds:
            self[part, kind] = self.get((part, kind), 0.0) + seconds

    def add_all(self, other: Seconds, times: int = 1) -> None:
        for (part, kind), seconds in other.items():
            self.add(part, kind, times * seconds)

    def total(self) -> float:
        return sum(self.values())

    def by_part(self) -> dict[str, float]:
        return self._summed(0)

    def by_kind(self) -> dict[str, float]:
        return self._summed(1)

    def _summed(self, index: int) -> dict[str, float]:
        """Longest first."""
        found: dict[str, float] = {}
        for key, seconds in self.items():
            found[key[index]] = found.get(key[index], 0.0) + seconds
        return dict(sorted(found.items(), key=lambda item: -item[1]))


KIND_OF_PASS = {
    **dict.fromkeys(("elementwise", "broadcast", "strided", "fused"), "elementwise"),
    **dict.fromkeys(("contiguous_copy", "strided_copy", "cast", "roll"), "copies"),
    **dict.fromkeys(("norm", "reduce"), "norms"),
    **dict.fromkeys(("product", "accumulate"), "products"),
    "attention": "attention",
    "update": "optimizer",
}
DTYPES = {"torch.bfloat16": "bf16", "torch.float16": "bf16", "torch.half": "bf16", "torch.tf32": "tf32"}
"""model.dtype -> key of `peak_tflops`; others: fp32."""


@dataclass(frozen=True)
class DocumentLengths:
    """What attention depends on."""

    keys: float
    """Keys that a query attends to on average: half of its document, or of a tile of the kernels, if that is longer."""
    long: float
    """Share of the pairs of tokens in documents that cuDNN's kernel takes, see layers/flash.py."""

    def keys_within(self, window: int | None) -> float:
        """`keys` of a layer with this window, as if all documents were of one length."""
        length = 2 * self.keys
        return self.keys if window is None or window >= length else window - window**2 / (2 * length)


def document_lengths(rows: Iterable[Sequence[int]]) -> DocumentLengths:
    """`rows`: boundaries of documents."""
    lengths = [stop - start for borders in rows for start, stop in pairwise(borders)]
    pairs = [(length, length * max(length, TILE)) for length in lengths]
    total = sum(count for _, count in pairs)
    long = sum(count for length, count in pairs if length >= LONG and length % TILE == 0)
    return DocumentLengths(total / sum(lengths) / 2, long / total)


def _flops_per_key(unit: CostedLayer) -> int:
    """Of attention, for each key that a query of causal attention sees: others see twice as many."""
    whole = unit.flops_per_token(1) - unit.flops_per_token(0)
    if isinstance(unit, EncoderBlock):
        return 2 * whole
    cross = unit.cross_attention if isinstance(unit, Block) else None
    return whole if cross is None else whole + cross.flops_per_token(1) - cross.flops_per_token(0)


@dataclass(frozen=True)
class Ways:
    """How a step computes."""

    row: RowShape
    dtype: str
    """Key of `peak_tflops`."""
    attention: str
    """Key of `attention_tflops`; "cudnn": beside varlen for other documents than long ones."""
    documents: DocumentLengths
    update_dtype: str = "bf16"
    """Key of `peak_tflops`, of the products of update rules."""
    imbalance: float = 1.0
    """Attention work of the busiest context-parallel rank over the mean."""
    one_pass_update: bool = False
    """Gradients are scaled inside the fused update."""


@dataclass(frozen=True)
class UnitSeconds:
    """Times of one micro-batch in a unit of the model."""

    forward: Seconds
    backward: Seconds
    weights: float
    """The part of `backward` that a zero-bubble schedule may put off."""


@dataclass(frozen=True)
class Roofline:
    device: DeviceFile
    ways: Ways
    tp: int
    message_seconds: Callable[[Message], float]

    def unit(self, unit: CostedLayer) -> UnitSeconds:
        """`unit`: an embedding, a block, a norm or a head."""
        forward, backward = self.passes(unit.passes(self.ways.row))
        made_at_once = 3 if isinstance(unit, Head) else 1  # the head makes its gradients in the forward pass
        product = self._products(unit)
        for direction, times, products in (
            ("forward", forward, made_at_once),
            ("backward", backward, 3 - made_at_once),
        ):
            times.add("products", "products", products * product)
            times.add("attention", "attention", self._attention(unit, direction))
        recompute = isinstance(unit, Block) and unit.recompute
        for message in unit.messages(self.ways.row):
            times = backward if message.backward else forward
            once = 0.5 if recompute and not message.backward else 1  # the layer says what it sends twice
            part = "context parallel" if message.axis == "cp" else "tensor parallel"
            times.add(part, "messages", once * self.message_seconds(message))
        if in_ring(self.ways.row):
            for times in (forward, backward):
                leave_waits_of_a_ring(times, self.ways.row.context)
        added = sum(seconds for (part, _), seconds in backward.items() if part == "weight gradients")
        weights = (product if made_at_once == 1 else 0) + added
        if isinstance(unit, Block) and (moved := unit.host_bytes(self.ways.row)):  # behind a block like it
            link = self.device.host_link
            taken = link.latency_us * 1e-6 + moved / (link.gb_per_s * 1e9)
            for times in (forward, backward):
                times.add("offload", "messages", max(0.0, taken - times.total()))
        if recompute:
            for (_, kind), seconds in forward.items():
                backward.add("recomputation", kind, seconds)
        return UnitSeconds(forward, backward, weights)

    def units(self, many: Iterable[CostedLayer]) -> list[UnitSeconds]:
        """Of several units; blocks of a kind are timed once."""
        timed: dict[object, UnitSeconds] = {}
        found = []
        for unit in many:
            key: object = unit
            if isinstance(unit, Block):
                key = (
                    type(unit),
                    unit.attention.rule.window,
                    unit.rotation,
                    unit.recompute,
                    unit.host_bytes(self.ways.row) > 0,
                )
            if key not in timed:
                timed[key] = self.unit(unit)
            found.append(timed[key])
        return found

    def _products(self, unit: CostedLayer) -> float:
        """Seconds of the products of a forward pass."""
        dtype = "fp8" if self.ways.row.fp8 and isinstance(unit, Block) else self.ways.dtype
        rate = self.device.peak_tflops[dtype] * 1e12 * self.device.product_fraction
        return unit.flops_per_token(0) * self.ways.row.tokens / self.tp / rate

    def _attention(self, unit: CostedLayer, direction: str) -> float:
        """Seconds in one direction. Figures of the device are those of half precision."""
        ways, device = self.ways, self.device
        per_key = _flops_per_key(unit) * ways.row.tokens / self.tp * ways.imbalance
        keys = ways.documents.keys_within(unit.attention.rule.window if isinstance(unit, Block) else None)
        if isinstance(unit, Block) and unit.attention.in_blocks(ways.row):
            return self._in_blocks(direction, per_key * keys, unit.attention)
        operations = {"forward": 1.0, "backward": 2.5}[direction] * per_key * keys
        shares = {ways.attention: 1.0}
        if ways.attention == "cudnn":
            shares = {"cudnn": ways.documents.long, "varlen": 1 - ways.documents.long}
        slower = device.peak_tflops["bf16"] / device.peak_tflops[ways.dtype]
        rates = {kernel: getattr(device.attention_tflops[kernel], direction) for kernel in shares}
        seconds: float = sum(share * operations / (rates[kernel] * 1e12) for kernel, share in shares.items())
        return slower * seconds

    def _in_blocks(self, direction: str, operations: float, attention: Attention) -> float:
        """Of layers/scores.py, in fp32: one kernel after another reads and writes the scores, and for dropout numbers
        twice as wide. The backward pass makes them again."""
        products, kernels = {"forward": (1, 12), "backward": (3, 27)}[direction]
        kernels += attention.has_dropout * {"forward": 39, "backward": 44}[direction]
        peaks = self.device.peak_tflops
        rate = peaks.get("fp32", peaks[self.ways.dtype]) * 1e12 * self.device.product_fraction
        scores = 4 * operations / (4 * attention.head_dim)
        return products * operations / rate + self.device.passes_seconds("elementwise", kernels * scores)

    def passes(self, passes: Iterable[Pass]) -> tuple[Seconds, Seconds]:
        """(forward, backward) of kernels and the gaps before them."""
        times = Seconds(), Seconds()
        for one in passes:
            direction = times[one.backward]
            direction.add(one.part, KIND_OF_PASS[one.kind], self.device.passes_seconds(one.kind, one.n_bytes))
            direction.add("gaps", "gaps", one.kernels * self.device.launch_us * 1e-6)
        return times

    def optimizer(self, buckets: Sequence[BucketSizes]) -> Seconds:
        """The step of the optimizer on one rank; of collectives, what rules exchange for whole parameters."""
        found = self.passes(
            one for bucket in buckets for one in update_passes(bucket, one_pass=self.ways.one_pass_update)
        )[0]
        busiest = max(map(sum, zip(*(bucket.product_flops for bucket in buckets), strict=True)))
        rate = self.device.peak_tflops[self.ways.update_dtype] * 1e12 * self.device.product_fraction
        found.add("optimizer", "products", busiest / self.tp / rate)
        for bucket in buckets:
            if bucket.exchanged:
                exchange = Message("tp", "all_to_all", bucket.exchanged, times=2)
                found.add("optimizer", "messages", self.message_seconds(exchange))
        return found


def leave_waits_of_a_ring(times: Seconds, context: int) -> None:
    """Of the messages of `context` ranks: keys come while the block of those before them is computed, one of
    `context` equal ones; the last block's computation hides nothing."""
    sent = times.pop(("context parallel", "messages"), 0.0)
    hidden = times.get(("attention", "attention"), 0.0) * (context - 1) / context
    times.add("context parallel", "messages", max(0.0, sent - hidden))


def stage_seconds(units: Sequence[UnitSeconds]) -> StageCost:
    """Seconds of the actions of a stage of these units."""
    weights = sum(unit.weights for unit in units)
    backward = sum(unit.backward.total() for unit in units)
    return StageCost(sum(unit.forward.total() for unit in units), backward - weights, weights)


def update_passes(bucket: BucketSizes, *, one_pass: bool) -> list[Pass]:
    """Norm; scale, in the dtype of the masters; update; cast of the new weights; zeros for the next gradients."""
    exact = bucket.update_grads or bucket.shard_grads
    found = [Pass("reduce", bucket.shard_grads, 8)]
    if bucket.update_grads:
        found.append(Pass("cast", bucket.shard_grads + bucket.update_grads))
    if not one_pass:
        found.append(Pass("broadcast", 2 * exact))
    found.append(Pass("update", bucket.update_traffic, max(1, exact // 250_000_000)))
    if bucket.masters:
        found.append(Pass("contiguous_copy", bucket.masters + bucket.shard_weights))
    found.append(Pass("contiguous_copy", bucket.grads))
    if bucket.averages:  # beside the next forward pass, whose bandwidth it takes
        found.append(Pass("broadcast", bucket.averages_moved))
    return [replace(one, part="optimizer") for one in found]
