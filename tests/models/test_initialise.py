"""Initial weights: the same whatever the mesh, and distributed as asked."""

import hashlib
import math
from collections.abc import Iterator
from unittest.mock import Mock, call

import numpy as np
import pytest
import torch

from internlm_lite.config.schema import LossConfig
from internlm_lite.layers.flash import AttentionBackend
from internlm_lite.mesh.layout import parameter, split, whole
from internlm_lite.mesh.mesh import Group, single_process_mesh
from internlm_lite.models.decoder import build_model
from internlm_lite.models.initialise import _Tile, initialise
from tests.models.small import small_config


class Holder(torch.nn.Module):
    def __init__(self, layout, dtype=torch.float32, device="cpu"):
        super().__init__()
        self.weight = parameter(layout, dtype, device)
        initialise(self, seed=3)


def group(rank: int, size: int) -> Group:
    return Group("tp", tuple(range(size)), rank, None)


@pytest.mark.parametrize("shape", [(2200, 1200), (12, 4000), (4000, 12)])
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("size", [2, 4])
def test_shards_side_by_side_are_the_whole(shape, dim, size):
    together = Holder(whole("a", shape, init_std=0.1)).weight
    parts = [Holder(split("a", shape, dim, group(rank, size), init_std=0.1)).weight for rank in range(size)]
    assert torch.equal(torch.cat(parts, dim=dim), together)


def drawn_alone(name: str, shape: tuple[int, int], std: float) -> torch.Tensor:
    """The whole tensor with seed 3, tile after tile."""
    whole_tensor = np.zeros(shape, dtype=np.float32)
    for row in range(0, shape[0], 1024):
        for column in range(0, shape[1], 1024):
            tile = whole_tensor[row : row + 1024, column : column + 1024]
            key = hashlib.blake2b(f"3:{name}:{row}:{column}".encode(), digest_size=16).digest()
            generator = np.random.Generator(np.random.SFC64(int.from_bytes(key, "little")))
            tile[:] = generator.standard_normal(tile.shape, dtype=np.float32) * np.float32(std)
    return torch.from_numpy(whole_tensor)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("n_threads", [1, 2, 7])
def test_the_number_of_threads_changes_no_bit(n_threads: int, threads: None) -> None:
    torch.set_num_threads(n_threads)
    for shape in ((2200, 1200), (3, 4000), (1, 1)):
        made = Holder(whole("a", shape, init_std=0.1)).weight
        assert torch.equal(made, drawn_alone("a", shape, 0.1)) and made.requires_grad
    assert torch.get_num_threads() == n_threads


def test_a_tile_that_fails_fails_the_start(threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise MemoryError("tile")

    monkeypatch.setattr(_Tile, "draw", fails)
    torch.set_num_threads(3)
    with pytest.raises(MemoryError, match="tile"):
        Holder(whole("a", (4000, 4000), init_std=0.1))
    assert torch.get_num_threads() == 3


# A new thread's device is GPU 0, where its first call allocates half a gigabyte for each rank of the host.
def test_a_thread_takes_the_gpu_of_the_rank_first(monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpu = Mock(is_cuda=True, device=torch.device("cuda", 3))
    monkeypatch.setattr(torch.cuda, "set_device", on_gpu.set_device)
    _Tile("key", (4, 4), 0.1, (slice(0, 2), slice(1, 4)), on_gpu).draw()
    (first, second) = on_gpu.method_calls
    assert first == call.set_device(torch.device("cuda", 3)) and second[0] == "copy_" and second[1][0].shape == (2, 3)


def test_draws_are_normal_and_differ_by_name_seed_and_tile():
    weight = Holder(whole("a", (2048, 2048), init_std=0.1)).weight
    assert weight.mean().abs() < 1e-3 and weight.std().item() == pytest.approx(0.1, rel=1e-2)
    assert not torch.equal(weight[:1024, :1024], weight[1024:, 1024:])
    assert not torch.equal(weight, Holder(whole("b", (2048, 2048), init_std=0.1)).weight)


def test_half_precision_is_the_rounded_draw():
    layout = whole("a", (64, 64), init_std=0.1)
    assert torch.equal(Holder(layout, torch.bfloat16).weight, Holder(layout).weight.bfloat16())


def test_a_model_follows_its_layouts():
    config = small_config(hidden_size=128, init_std=0.02, num_layers=2)
    model = build_model(config, LossConfig(), single_process_mesh(), AttentionBackend.SDPA)
    initialise(model, 0)
    for name, param in model.named_parameters():
        if name.endswith("norm.weight"):
            assert torch.equal(param, torch.ones_like(param))
        elif name.endswith("bias"):
            assert not param.any()
        else:
            std = 0.02 / math.sqrt(4) if name.endswith(("wo.weight", "w2.weight")) else 0.02
            assert param.std().item() == pytest.approx(std, rel=0.05), name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_gpu_holds_the_weights_of_the_cpu(dtype: torch.dtype) -> None:
    layout = split("a", (3000, 4000), 1, group(1, 4), init_std=0.1)
    assert torch.equal(Holder(layout, dtype, "cuda").weight.cpu(), Holder(layout, dtype).weight)
