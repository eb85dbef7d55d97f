"""model.checkpoint="offload": the bits of a step that keeps everything, two blocks on the device, copies in order."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from internlm_lite.layers import offload
from internlm_lite.layers.offload import HostOffload
from internlm_lite.mesh import comm
from internlm_lite.mesh.mesh import Mesh, single_process_mesh
from tests.corpus import write_corpus
from tests.models.test_recompute import HAS_ZBV, LAYOUTS, steps
from tests.world import run_world

MODELS: list[dict[str, Any]] = [
    {"dtype": "torch.float32"},
    {"dtype": "torch.bfloat16", "no_bias": True, "use_fp32_norm": True, "num_kv_attention_heads": 2},
    {"dtype": "torch.float32", "residual_dropout": 0.1, "attention_dropout": 0.1, "mlp_type": "gelu", "mlp_bias": True},
    {"dtype": "torch.bfloat16", "norm_position": "sandwich", "norm_type": "layernorm", "qk_norm": "head"},
    {"dtype": "torch.float64", "norm_position": "reordered", "qk_norm": "full", "tie_word_embeddings": True,
     "embed_split_hidden": False},
]  # fmt: skip


def differing(mesh: Mesh, corpus: Path, layouts: list[dict[str, Any]], models: list[dict[str, Any]]) -> list[str]:
    """Cases in which a bit of losses, norms or weights depends on the offload."""
    found = []
    for layout in layouts:
        for number, model in enumerate(models):
            offload = {"checkpoint": "offload", "offload_share": (1.0, 0.5)[number % 2]}
            if steps(mesh, corpus, layout, **model) != steps(mesh, corpus, layout, **model, **offload):
                found.append(str((layout, model)))
    return found


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("offload") / "corpus")


def test_the_bits_of_one_process(corpus: Path) -> None:
    assert differing(single_process_mesh(), corpus, [{}], MODELS) == []
    assert differing(single_process_mesh(), corpus, [{}], [{"dtype": "torch.float32", "compile": True}]) == []


@pytest.mark.parametrize("layouts", [("tensor", "sequence"), ("1f1b", "interleaved", *["zbv"] * HAS_ZBV)], ids=" ".join)
def test_the_bits_of_every_layout(layouts: tuple[str, ...], corpus: Path) -> None:
    sections = [LAYOUTS[name] for name in layouts]
    tensor, pipeline = sections[0].get("tensor", 1), sections[0].get("pipeline", {}).get("size", 1)
    world = run_world(differing, 2, (corpus, sections, MODELS[:2]), tensor=tensor, pipeline=pipeline)
    assert world == [[], []]


class LateStream:
    """A stream whose copies take place at the latest moment that `join` allows, and hold nothing.

    So a copy reads what its source has become; what is used before it has come back is not there; and memory that is
    given away while a copy still reads or writes it is missed."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._waiting: list[tuple[Any, Any]] = []

    @contextmanager
    def current_work(self) -> Iterator[None]:
        def copy_(target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> None:
            assert non_blocking, "the host would wait"
            self._waiting.append((weakref.ref(target.untyped_storage()), weakref.ref(source.untyped_storage())))

        with mock.patch.object(torch.Tensor, "copy_", copy_):
            yield

    def join(self) -> None:
        for target, source in self._waiting:
            assert target() is not None and source() is not None, "memory was given away while a copy used it"
            target().copy_(source())
        self._waiting = []


@pytest.mark.parametrize("layout", ["one", "1f1b"])
def test_copies_have_arrived_before_they_are_used_and_hold_their_ends(layout: str, corpus: Path) -> None:
    """A transfer that is not yet done reads a source that was written anew, and one that comes back may find its memory
    given to another tensor: neither raises on a GPU, both change gradients."""
    if layout == "one":
        assert late(single_process_mesh(), corpus, {}) == []
    else:
        assert run_world(late, 2, (corpus, LAYOUTS["1f1b"]), pipeline=2) == [[], []]


def late(mesh: Mesh, corpus: Path, layout: dict[str, Any]) -> list[str]:
    with mock.patch.object(offload, "SideStream", LateStream):
        return differing(mesh, corpus, [layout], MODELS[:1])


def test_a_missing_wait_is_seen(corpus: Path) -> None:
    """The test above fails where the computing stream does not wait."""
    plain = steps(single_process_mesh(), corpus, {}, **MODELS[0])
    with mock.patch.object(offload, "SideStream", LateStream), mock.patch.object(LateStream, "join", lambda _: None):
        assert steps(single_process_mesh(), corpus, {}, **MODELS[0], checkpoint="offload") != plain


def test_the_side_stream_waits_for_the_stream_that_computes() -> None:
    """Asked for inside the block, the current stream is the side stream itself, which then waits for nothing."""
    waits: list[tuple[str, str]] = []

    class Stream:
        current: list[Any] = []

        def __init__(self, name: Any = "side") -> None:
            self.name = name if isinstance(name, str) else "side"

        def wait_stream(self, other: Any) -> None:
            waits.append((self.name, other.name))

        def __enter__(self) -> None:
            Stream.current.append(self)

        def __exit__(self, *error: object) -> None:
            Stream.current.pop()

    Stream.current.append(Stream("compute"))
    patches = {"Stream": Stream, "current_stream": lambda _: Stream.current[-1], "stream": lambda one: one}
    with mock.patch.multiple(torch.cuda, **patches):
        side = comm.SideStream(torch.device("cuda", 0))
        with side.current_work():
            pass
        side.join()
    assert waits == [("side", "compute"), ("compute", "side")]


def test_only_two_blocks_stay_and_buffers_are_used_again() -> None:
    """No stream, and no buffer of the host, is made after the first step."""
    mover = HostOffload(torch.device("cpu"))
    weight = torch.ones(64, requires_grad=True)

    def step() -> int:
        x, alive = torch.ones(64) * weight, []
        for layer in range(5):
            with mover.block(layer, [weight], moves=layer < 4):
                y = x * x
                x = (y * weight).exp()
                alive += [weakref.ref(tensor.untyped_storage()) for tensor in (y, x)]
        del y
        kept = sum(ref() is not None for ref in alive)
        x.sum().backward()
        return kept

    kept = step()
    held = mover.host_bytes
    assert held == 4 * 3 * 64 * 4  # x, y and exp's output, which the next block saves again
    assert kept <= 5 and step() == kept and mover.host_bytes == held


def test_a_storage_moves_once_and_comes_back_with_its_strides() -> None:
    mover = HostOffload(torch.device("cpu"))
    seen: list[tuple[Any, ...]] = []

    class Keep(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, whole: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(whole, whole[1:, ::2], whole.t())
            return whole.clone()

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            tensors = ctx.saved_tensors
            seen.append(tuple((x.shape, x.stride(), x.untyped_storage().data_ptr()) for x in tensors))
            assert torch.equal(tensors[1], tensors[0][1:, ::2]) and torch.equal(tensors[2], tensors[0].t())
            return grads[0]

    x = torch.arange(24.0).view(4, 6).requires_grad_()
    for layer in range(3):  # the first is away when the backward pass begins
        with mover.block(layer, [], moves=True):
            x = Keep.apply(x * 1)
    x.sum().backward()
    assert mover.host_bytes == 3 * 24 * 4
    for whole, part, turned in seen:
        assert part[:2] == ((3, 3), (6, 2)) and turned[1] == (1, 6) and whole[2] == part[2] == turned[2]
