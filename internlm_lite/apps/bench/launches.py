"""Kernel launches of a training step and bytes that they move, counted without a GPU.

Eager: a step on fake CUDA tensors (`fake_cuda`). An operation that is no view and no allocation is one launch; it
reads each input once, writes each output once, and reads only the chosen rows of a table. Attention, the fused
update and a norm are one operation each; products and attention are counted, but their bytes are not.

Compiled: the nodes that inductor's scheduler leaves after fusion, for a block and a chunk of the loss on the CPU. Each
is one launch; its bytes are the sizes of the buffers it reads and writes. Attention is two launches more, products are
launches without bytes, as above. On a GPU inductor may split a long reduction in two.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from internlm_lite.apps.bench.fake_cuda import fake_batch, fake_cuda
from internlm_lite.apps.bench.shapes import bench_config, random_batch
from internlm_lite.config.schema import Config
from internlm_lite.layers import compiled
from internlm_lite.layers.flash import packed_sdpa
from internlm_lite.layers.loss import LossOptions, linear_cross_entropy, losses_and_gradient
from internlm_lite.layers.rope import Rotations
from internlm_lite.mesh.mesh import single_process_mesh
from internlm_lite.models.decoder import Block, tensor_parallel_context
from internlm_lite.optim.zero import HybridZeroOptimizer
from internlm_lite.train import trainer as trainer_module
from internlm_lite.train.trainer import Trainer

_NO_KERNEL = {
    *("view", "_unsafe_view", "t", "transpose", "slice", "select", "unsqueeze", "squeeze", "expand", "as_strided"),
    *("split", "split_with_sizes", "detach", "alias", "permute", "unbind", "chunk", "_reshape_alias", "diagonal"),
    *("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "lift_fresh", "set_", "is_same_size"),
}
_PRODUCTS = {"mm", "addmm", "addmm_", "bmm", "_scaled_mm"}
_ROWS_OF_A_TABLE = {"embedding", "gather", "index_select", "scatter_add_", "index_copy_"}
_COMPILED_TOKENS = 256
"""Of the sample that is compiled; its launches do not depend on it, and its bytes are per token."""


@dataclass(frozen=True)
class Launches:
    """Of one part of a step."""

    launches: int
    products: int
    """Of these: matrix products and attention."""
    moved: float
    """Bytes moved by the others."""


class Counted(TorchDispatchMode):
    """Counts the operations of each phase; set `phase` before."""

    def __init__(self) -> None:
        super().__init__()
        self.phase = "elsewhere"
        self.launches: Counter[str] = Counter()
        self.products: Counter[str] = Counter()
        self.moved: Counter[str] = Counter()
        self.parameters = 0

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1]
        if name not in _NO_KERNEL:
            product = name in _PRODUCTS or "attn" in name or "attention" in name
            self.launches[self.phase] += 1
            self.products[self.phase] += product
            self.moved[self.phase] += 0 if product else _moved(name, args, kwargs or {}, out)
        return out

    def of(self, phase: str) -> Launches:
        return Launches(self.launches[phase], self.products[phase], self.moved[phase])


def _moved(name: str, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> int:
    """Bytes that one operation reads and writes."""
    written = tree_leaves(out)
    read = tree_leaves((args, {key: value for key, value in kwargs.items() if key != "out"}))
    if name in ("copy_", "fill_", "zero_"):
        read = read[1:]
    elif name == "_fused_adamw_":
        written = tree_leaves((args[0], args[2], args[3]))
    elif name in _ROWS_OF_A_TABLE:
        rows = read[-1] if name.endswith("_") else written[0]
        read, written = [x for x in read if isinstance(x, torch.Tensor) and x.dtype == torch.int64], [rows, rows]
    return sum(_nbytes(x) for x in (*read, *written) if isinstance(x, torch.Tensor))


def _nbytes(x: torch.Tensor) -> int:
    """Of the elements that are in memory: an expanded dimension is one."""
    n = x.element_size()
    for size, stride in zip(x.shape, x.stride(), strict=True):
        n *= size if stride else min(size, 1)
    return n


def eager_step(config: Config) -> Counted:
    """A second step on fake CUDA tensors, by phase: forward, loss, metrics, backward, optimizer."""
    host, counted = random_batch(config, 0, torch.device("cpu")), Counted()
    with mock.patch.object(trainer_module, "initialise", lambda *_: None), fake_cuda() as device:
        trainer = Trainer(config, single_process_mesh(device))
        batch = fake_batch(host, device)
        trainer.step(batch, 0)
        counted.parameters = sum(bucket.numel for bucket in cast(HybridZeroOptimizer, trainer.optimizer).buckets)
        with phases(trainer, counted), counted:
            trainer.step(batch, 1)
            counted.phase = "optimizer"
            trainer.optimizer.wait_weights()
    return counted


@contextmanager
def phases(trainer: Any, counted: Counted) -> Iterator[None]:
    """Sets the phase where `trainer` passes from one to the next."""

    def train(task: Any, micro_num: int) -> None:
        for micro in range(micro_num):
            counted.phase = "forward"
            hidden = task.forward(0, micro, None)
            counted.phase = "loss"
            loss = task.loss(micro, hidden)
            counted.phase = "backward"
            loss.backward()
        counted.phase = "optimizer"

    def add(*arguments: Any) -> None:
        counted.phase = "metrics"
        add_to(*arguments)

    add_to = trainer.metrics.add
    with mock.patch.object(trainer.engine, "train", train), mock.patch.object(trainer.metrics, "add", add):
        yield


def compiled_parts(config: Config) -> dict[str, Launches]:
    """Forward and backward pass of a block of `_COMPILED_TOKENS` tokens, and the loss of that many."""
    parts: dict[str, Launches] = {}
    with _counting() as nodes:
        _run_block(config)
        for part in ("forward", "backward"):
            found = _sum(nodes[part == "backward"])
            parts[part] = Launches(found.launches + 1, found.products + 1, found.moved)  # and attention
        for of_direction in nodes:
            of_direction.clear()
        _run_loss(config)
        parts["loss"] = _sum(nodes[False])
    return parts


def _run_block(config: Config) -> None:
    model = config.model.model_copy(update={"compile": True})
    context = tensor_parallel_context(model, single_process_mesh(), by_sequence=False)
    block = Block(model, 0, context)
    for param in block.parameters():
        param.data.zero_()
        if param.manual_grad:  # type: ignore[attr-defined]
            param.main_grad = torch.zeros(param.shape)  # type: ignore[attr-defined]
    x = torch.zeros(_COMPILED_TOKENS, model.hidden_size, dtype=context.dtype, requires_grad=True)
    rotations = Rotations(model, (0,), torch.device("cpu")).at(torch.arange(_COMPILED_TOKENS), context.dtype)
    block(x, rotations[block.rotation], packed_sdpa((0, _COMPILED_TOKENS))).backward(torch.zeros_like(x))


def _run_loss(config: Config) -> None:
    dtype, vocab = torch.bfloat16, config.model.vocab_size
    hidden, weight = (torch.zeros(n, 8, dtype=dtype, requires_grad=True) for n in (_COMPILED_TOKENS, vocab))
    options = LossOptions(single_process_mesh().tp, fused=compiled.compiled(losses_and_gradient))
    with mock.patch("internlm_lite.layers.loss._CHUNK_BYTES", {"cpu": 1 << 40}):
        labels = torch.zeros(_COMPILED_TOKENS, dtype=torch.int64)
        linear_cross_entropy(hidden, weight, labels, torch.ones(()), options)


Nodes = list[tuple[Any, int]]
"""(node of inductor's scheduler, bytes it moves)"""


@contextmanager
def _counting() -> Iterator[tuple[Nodes, Nodes]]:
    """Compiles by counting: yields the nodes of forward and of backward graphs; the graphs run as they are."""
    from torch._inductor.compile_fx import compile_fx

    nodes: tuple[Nodes, Nodes] = ([], [])

    def count(graph: torch.fx.GraphModule, inputs: Sequence[Any], **options: Any) -> Any:
        unchanged = copy.deepcopy(graph)
        nodes[bool(options.get("is_backward"))].extend(_scheduled(graph, inputs, bool(options.get("is_backward"))))

        def run(arguments: list[Any]) -> Any:
            return unchanged(*arguments)

        run._boxed_call = True  # type: ignore[attr-defined]
        return run

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        return compile_fx(graph, inputs, inner_compile=count)

    torch._dynamo.reset()
    with mock.patch.object(compiled, "COMPILER", backend):
        yield nodes


def _scheduled(graph: torch.fx.GraphModule, inputs: Sequence[Any], backward: bool) -> Nodes:
    from torch._inductor import ir
    from torch._inductor.compile_fx import _recursive_post_grad_passes, record_original_output_strides
    from torch._inductor.debug import DebugContext
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V

    _recursive_post_grad_passes(graph, is_inference=False)
    record_original_output_strides(graph)
    lowered = GraphLowering(graph, example_inputs=inputs, is_backward=backward)
    mode = V.set_fake_mode(torch._guards.detect_fake_mode(inputs))
    as_on_a_gpu = mock.patch.object(ir, "is_cpu", lambda node: False)  # a CPU keeps results of exp
    with as_on_a_gpu, V.set_graph_handler(lowered), V.set_debug_handler(DebugContext()), mode:
        lowered.run(*inputs)
        lowered._update_scheduler()
        scheduled = [node for node in lowered.scheduler.nodes if type(node).__name__ != "NopKernelSchedulerNode"]
        return [(node, node.get_read_write_buffers_sizes()) for node in scheduled]


def _sum(nodes: Nodes) -> Launches:
    products = sum(node.is_extern() for node, _ in nodes)
    return Launches(len(nodes), products, sum(moved for node, moved in nodes if not node.is_extern()))


@dataclass(frozen=True)
class LaunchRow:
    """One part of a step: launches, and bytes of those that are no products per token, logit or parameter."""

    shape: str
    part: str
    eager: int
    moved: float | None = None
    compiled: int | None = None
    compiled_moved: float | None = None


def count_launches(name: str, **shape: Any) -> list[LaunchRow]:
    """Rows of a table for a model of `shape` in bf16. What a block costs is the difference of two layers and one."""
    configs = [bench_config(**{**shape, "layers": n}, dtype="torch.bfloat16", bucket_size=64 * 2**20) for n in (1, 2)]
    one, two = map(eager_step, configs)
    fused, data = compiled_parts(configs[0]), configs[0].data
    tokens, logits = data.micro_bsz * data.seq_len, shape["vocab"]
    parts = [
        ("block forward, per token", _per(two.of("forward"), data.micro_num, one.of("forward")), "forward", tokens),
        ("block backward, per token", _per(two.of("backward"), data.micro_num, one.of("backward")), "backward", tokens),
        ("head and loss, per logit", _per(one.of("loss"), data.micro_num), "loss", tokens * logits),
        ("metrics, per token", _per(one.of("metrics"), data.micro_num), None, tokens),
        ("optimizer, per parameter", one.of("optimizer"), None, one.parameters),
    ]
    sample = {"loss": _COMPILED_TOKENS * logits}
    rows = []
    for part, eager, key, unit in parts:
        row = LaunchRow(name, part, eager.launches, eager.moved / unit)
        if key is not None:
            found = fused[key]
            moved = found.moved / sample.get(key, _COMPILED_TOKENS)
            row = replace(row, compiled=found.launches, compiled_moved=moved)
        rows.append(row)
    in_layers = (shape["layers"] - 1) * (two.launches.total() - one.launches.total())
    return [*rows, LaunchRow(name, f"step of {shape['layers']} layers", one.launches.total() + in_layers)]


def _per(found: Launches, times: int, less: Launches = Launches(0, 0, 0)) -> Launches:
    """One of `times`, without `less`."""
    return Launches(
        (found.launches - less.launches) // times,
        (found.products - less.products) // times,
        (found.moved - less.moved) / times,
    )
