"""The hybrid ZeRO optimizer against torch.optim.AdamW on one process, in fp64, and its other guarantees."""

import gc
import math
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import pytest
import torch
from torch import nn

from internlm_lite.config.schema import Config
from internlm_lite.errors import ConfigError
from internlm_lite.mesh import comm
from internlm_lite.mesh.layout import Parameter, parameter, whole
from internlm_lite.mesh.mesh import Group, Mesh, build_mesh, single_process_mesh, sizes_of
from internlm_lite.optim.buckets import build_buckets
from internlm_lite.optim.gather import WeightGatherer
from internlm_lite.optim.grad_norm import Requests, reduce_totals, square_sums
from internlm_lite.optim.lr_schedule import learning_rate
from internlm_lite.optim.zero import HybridZeroOptimizer
from tests.world import TIMEOUT, run_world

WIDTH, MICRO, ROWS, STEPS = 24, 2, 8, 6


def config(**zero: object) -> Config:
    return Config.model_validate(
        {
            "data": {"seq_len": 8, "total_steps": 20},
            "lr_scheduler": {"total_steps": 20, "warmup_ratio": 0.2, "eta_min": 1e-4},
            "adam": {"lr": 1e-2, "weight_decay": 0.1},
            "model": {"num_attention_heads": 1, "vocab_size": 8, "hidden_size": 8, "num_layers": 1},
            "grad_scaler": {"fp16": {"initial_scale": 1024.0, "growth_interval": 4}, "hysteresis": 1},
            "hybrid_zero_optimizer": {"reduce_bucket_size": 700, "clip_grad_norm": 0.5, **zero},
        }
    )


class Unit(nn.Module):
    """x -> x + tanh(x W + b)."""

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(sum(map(ord, name)))
        self.weight = parameter(whole(f"{name}.weight", (WIDTH, WIDTH)), dtype, "cpu")
        self.bias = parameter(whole(f"{name}.bias", (WIDTH,)), dtype, "cpu")
        with torch.no_grad():
            self.weight.copy_(torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64) / WIDTH)
            self.bias.zero_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.tanh(x @ self.weight + self.bias)


def rows(step: int, micro: int) -> torch.Tensor:
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(100 * step + micro), dtype=torch.float64)


def loss_of(units: list[Unit], x: torch.Tensor) -> torch.Tensor:
    for unit in units:
        x = unit(x)
    return x.square().sum()


def train(mesh: Mesh, cfg: Config, dtype: torch.dtype = torch.float64, bad_step: int = -1) -> dict:
    """Weights after STEPS steps; dp ranks share the rows of a micro-batch; every second row counts as a label."""
    units = [Unit(f"layers.{i}", dtype) for i in range(4)]
    optimizer = HybridZeroOptimizer(list(units), cfg, mesh, dtype)
    norms, rates, skipped, scales, early = [], [], [], [], []
    for step in range(STEPS):
        optimizer.begin(MICRO)
        for micro in range(MICRO):
            mine = rows(step, micro).chunk(mesh.dp.size)[mesh.dp.rank].to(dtype)
            loss = loss_of(units, mine) * (optimizer.loss_scale / (MICRO * ROWS)).to(dtype)
            if step == bad_step and mesh.dp.rank == mesh.dp.size - 1:
                loss = loss * float("inf")
            loss.backward()
        early.append(len(optimizer._reducer._started))
        outcome = optimizer.step(step, num_labels=MICRO * ROWS // mesh.dp.size // 2, global_tokens=MICRO * ROWS)
        norms.append((outcome.norm_model_dtype.square() + outcome.norm_fp32.square()).sqrt().item())
        rates.append(outcome.next_lr.item())
        skipped.append(outcome.skips.consecutive_skips.item() > 0)
        scales.append(outcome.loss_scale.item())
    optimizer.wait_weights()
    weights = {p.shard_spec.name: p.detach().clone() for u in units for p in u.parameters() if isinstance(p, Parameter)}
    pieces = {(p.name, p.role): (p.flat_range, p.tensor.clone()) for p in optimizer.pieces()}
    return {
        "weights": weights,
        "norms": norms,
        "rates": rates,
        "skipped": skipped,
        "scales": scales,
        "early": early,
        "buckets": len(optimizer.buckets),
        "pieces": pieces,
        "elements": optimizer.elements_on_zero_ranks(),
    }


def reference(cfg: Config) -> tuple[dict[str, torch.Tensor], list[float]]:
    """The same training with nothing of ours but the lr curve's documented formula."""
    units = [Unit(f"layers.{i}", torch.float64) for i in range(4)]
    matrices, vectors = [u.weight for u in units], [u.bias for u in units]
    adam = cfg.adam
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": adam.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        betas=(adam.adam_beta1, adam.adam_beta2),
        eps=adam.adam_eps,
        foreach=False,
    )
    norms = []
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = adam.lr * min(1.0, (step + 1) / 4)
            if step >= 4:
                turn = torch.pi * (step - 4) / 16
                group["lr"] = (
                    1e-4 + (adam.lr - 1e-4) * (1 + torch.cos(torch.tensor(turn, dtype=torch.float64)).item()) / 2
                )
        optimizer.zero_grad()
        total = torch.stack([loss_of(units, rows(step, m)) for m in range(MICRO)]).sum() / (MICRO * ROWS / 2)
        total.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(matrices + vectors, 0.5).item())
        optimizer.step()
    return {p.shard_spec.name: p.detach() for u in units for p in (u.weight, u.bias)}, norms


def assert_same_training(result: dict, expected: tuple[dict[str, torch.Tensor], list[float]]) -> None:
    weights, norms = expected
    assert result["norms"] == pytest.approx(norms, rel=1e-12)
    assert min(norms) > 0.5, "clipping must be part of the test"
    for name, weight in weights.items():
        torch.testing.assert_close(result["weights"][name], weight, rtol=1e-11, atol=1e-13)


def test_the_norm_of_many_small_numbers_is_exact():
    numbers = torch.randn(1 << 22, generator=torch.Generator().manual_seed(0)) * 1e-3
    expected = numbers.double().square().sum().item()
    for dtype, rel in ((torch.float32, 1e-8), (torch.float16, 1e-3), (torch.bfloat16, 1e-3), (torch.float64, 1e-12)):
        halves = [numbers.to(dtype)[: 1 << 21], numbers.to(dtype)[1 << 21 :]]
        assert square_sums(halves).sum().item() == pytest.approx(expected, rel=rel)
        on_gpus = torch.stack(torch._foreach_norm(halves, 2, dtype=torch.float64)).square()
        torch.testing.assert_close(on_gpus, square_sums(halves), rtol=1e-7, atol=0)


def test_one_process_equals_plain_adamw():
    assert_same_training(train(single_process_mesh(), config()), reference(config()))


def sweep(world: Mesh) -> list[dict]:
    results = []
    for zero1 in (-1, 2, 1):
        mesh = build_mesh(sizes_of(world.world.size, 1, 1, zero1), world.rank, world.device, TIMEOUT)
        for overlap in (True, False):
            results.append(train(mesh, config(overlap_sync_grad=overlap, overlap_sync_param=overlap)))
    return results


@pytest.fixture(scope="module")
def four_ranks() -> list[list[dict]]:
    return run_world(sweep, 4)


def test_every_zero_size_equals_plain_adamw(four_ranks: list[list[dict]]):
    expected = reference(config())
    for per_rank in four_ranks:
        for result in per_rank:
            assert_same_training(result, expected)


def test_all_ranks_hold_the_same_weights_to_the_bit(four_ranks: list[list[dict]]):
    for others in four_ranks[1:]:
        for result, first in zip(others, four_ranks[0], strict=True):
            assert all(torch.equal(result["weights"][n], w) for n, w in first["weights"].items())


def test_buckets_are_reduced_while_the_backward_pass_runs(four_ranks: list[list[dict]]):
    overlapped, plain = four_ranks[0][0], four_ranks[0][1]
    assert overlapped["buckets"] == 5  # four matrices that do not fit together, and all biases
    assert overlapped["early"] == [5] * STEPS
    assert plain["early"] == [0] * STEPS


@pytest.mark.parametrize(("case", "zero"), [(0, 4), (2, 2), (4, 1)])
def test_optimizer_state_is_sharded_evenly_and_covers_everything(four_ranks: list[list[dict]], case: int, zero: int):
    elements = four_ranks[0][case]["elements"]
    assert len(elements) == zero
    assert sum(elements) == 4 * (WIDTH * WIDTH + WIDTH)
    for role in ("master", "exp_avg", "exp_avg_sq"):
        covered: dict[str, list[tuple[int, int]]] = {}
        for rank in range(zero):
            for (name, piece_role), (flat, tensor) in four_ranks[rank][case]["pieces"].items():
                if piece_role == role:
                    assert tensor.shape == (flat[1] - flat[0],)
                    covered.setdefault(name, []).append(flat)
        for name, spans in covered.items():
            spans.sort()
            whole_size = WIDTH * WIDTH if name.endswith("weight") else WIDTH
            assert [a for a, _ in spans] == [0, *(b for _, b in spans[:-1])]
            assert spans[-1][1] == whole_size
        assert len(covered) == 8


def overflow_sweep(world: Mesh) -> list[dict]:
    return [train(world, config(), torch.float16, bad_step=2), train(world, config(), torch.bfloat16, bad_step=2)]


def test_an_overflow_on_one_rank_skips_the_step_everywhere():
    for half, brain in run_world(overflow_sweep, 2):
        for result in (half, brain):
            assert result["skipped"] == [False, False, True, False, False, False]
            assert all(w.isfinite().all() for w in result["weights"].values())
            assert result["rates"][1] == result["rates"][2], "the learning rate does not move on a skipped step"
        assert half["scales"] == [1024, 1024, 1024, 512, 512, 512]
        assert brain["scales"] == [1] * STEPS


def test_a_unit_waits_for_a_weight_that_another_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """An encoder's embedding that is the decoder's, which comes later in the forward pass."""
    mesh, (borrower, owner) = single_process_mesh(), (Unit(name, torch.float64) for name in ("borrower", "owner"))
    borrower.borrowed = (owner.weight,)  # type: ignore[assignment]
    (bucket,) = build_buckets([cast(Parameter, owner.weight)], mesh.zero, config())
    del borrower.weight, borrower.bias, owner.bias
    waited: list[str] = []

    class Gather(comm.Work):
        def wait(self) -> None:
            waited.append("gathered")

    monkeypatch.setattr(comm, "all_gather", lambda full, group: Gather([], group))
    gatherer = WeightGatherer([bucket], [borrower, owner], mesh.zero, overlap=True)
    gatherer.start([bucket.master])
    borrower.register_forward_pre_hook(lambda *_: waited.append("runs"))
    monkeypatch.setattr(borrower, "forward", lambda x: x)
    borrower(torch.zeros(1, WIDTH))
    assert waited == ["gathered", "runs"]


def squares(mesh: Mesh) -> list[float]:
    """Sums of squares of a gradient of ones; then with something else on rank 1 alone."""
    copy = parameter(whole("copy", (8,), partial_over=("ends",)), torch.float64, "cpu")
    (bucket,) = build_buckets([copy], mesh.zero, config())
    found = []
    for value in (1.0, float("inf"), float("nan")):
        bucket.grads[:8] = value if mesh.rank == 1 else 1.0
        found.append(reduce_totals([bucket], torch.float64, 1, Requests(), 0.0, mesh).square_model_dtype.item())
    return found


@pytest.mark.parametrize("layout", [{"tensor": 2}, {"pipeline": 2}, {"zero1": 1}])
def test_a_copy_counts_in_the_norm_only_where_it_is_not_finite(layout: dict[str, int]):
    wanted = pytest.approx([8.0, float("inf"), float("nan")], rel=0, nan_ok=True)
    assert run_world(squares, 2, **layout) == [wanted, wanted]


def test_a_skipped_step_changes_nothing():
    mesh = single_process_mesh()
    units = [Unit("layers.0", torch.float16)]
    optimizer = HybridZeroOptimizer(list(units), config(), mesh, torch.float16)
    before = [p.tensor.clone() for p in optimizer.pieces()]
    optimizer.begin(1)
    (loss_of(units, rows(0, 0).half()) * float("nan")).backward()
    outcome = optimizer.step(0, num_labels=8, global_tokens=8)
    assert outcome.skips.consecutive_skips.item() == 1
    assert all(torch.equal(a, p.tensor) for a, p in zip(before, optimizer.pieces(), strict=True))
    assert optimizer.state_dict()["good_steps"] == 0
    assert optimizer.state_dict()["adam_steps"] == 0


def test_half_precision_updates_the_fp32_master_and_rounds_it_once():
    result = train(single_process_mesh(), config(clip_grad_norm=0), torch.bfloat16)
    for name, weight in result["weights"].items():
        _, master = result["pieces"][name, "master"]
        assert master.dtype == torch.float32
        assert torch.equal(weight.flatten(), master.bfloat16())


def test_the_learning_rate_of_a_skipped_step_is_used_again():
    cfg = config()
    optimizer = HybridZeroOptimizer([Unit("layers.0", torch.float64)], cfg, single_process_mesh(), torch.float64)
    for step in range(3):
        optimizer.buckets[0].grads.fill_(float("nan") if step < 2 else 1.0)
        optimizer.begin(1)
        outcome = optimizer.step(step, num_labels=8, global_tokens=8)
        assert outcome.next_lr.item() == learning_rate(max(0, step - 1), cfg.adam.lr, cfg.lr_scheduler)
        assert outcome.skips.consecutive_skips.item() == (step + 1 if step < 2 else 0)


def test_consecutive_overflows_are_counted_separately_and_resumed():
    def step(kind: str) -> tuple[int, int]:
        optimizer.buckets[0].grads.fill_(float("nan") if kind == "overflow" else 1.0)
        optimizer.begin(1)
        outcome = optimizer.step(0, 8, 8, loss_sum=float("nan") if kind == "bad loss" else 1.0)
        return int(outcome.skips.consecutive_skips), int(outcome.skips.consecutive_overflows)

    def fresh() -> HybridZeroOptimizer:
        return HybridZeroOptimizer([Unit("layers.0", torch.float64)], config(), single_process_mesh(), torch.float64)

    optimizer = fresh()
    kinds = ("overflow", "overflow", "bad loss", "overflow", "good", "overflow")
    assert [step(kind) for kind in kinds] == [(1, 1), (2, 2), (3, 0), (4, 1), (0, 0), (1, 1)]
    saved = optimizer.state_dict()
    optimizer = fresh()
    optimizer.load_state_dict(saved, moments=True)
    assert step("overflow") == (2, 2)
    for name in [name for name in saved if name.endswith("_in_a_row")]:
        del saved[name]
    optimizer.load_state_dict(saved, moments=True)
    assert step("overflow") == (1, 1), "an older checkpoint"


@pytest.mark.parametrize(
    ("loss", "grad", "labels", "counter"),
    [(math.nan, math.nan, 8, "bad_losses"), (0.0, 0.0, 0, "unlabelled"), (0.0, math.nan, 0, "unlabelled")],
)
def test_a_bad_forward_pass_and_a_step_without_labels_say_nothing_about_the_loss_scale(
    loss: float, grad: float, labels: int, counter: str
) -> None:
    """A token without a label has no part in the loss, but 0 times a number that is not finite is a gradient."""
    optimizer = HybridZeroOptimizer([Unit("layers.0", torch.float16)], config(), single_process_mesh(), torch.float16)
    before = {(p.name, p.role): p.tensor.clone() for p in optimizer.pieces()}
    counters = optimizer.state_dict()
    optimizer.begin(1)
    optimizer.buckets[0].grads.fill_(grad)
    outcome = optimizer.step(0, num_labels=labels, global_tokens=8, loss_sum=loss)
    assert getattr(outcome.skips, f"consecutive_{counter}").item() == outcome.skips.consecutive_skips.item() == 1
    assert outcome.skips.consecutive_overflows.item() == 0
    assert all(torch.equal(p.tensor, before[p.name, p.role]) for p in optimizer.pieces()), "no decay either"
    assert optimizer.state_dict() == counters | {"skipped_steps": 1, "skips_in_a_row": 1, f"{counter}_in_a_row": 1}


@pytest.mark.parametrize(
    ("role", "value", "words"),
    [
        ("master", math.nan, "NaN or infinity"),
        ("exp_avg", -math.inf, "NaN or infinity"),
        ("exp_avg_sq", math.inf, "NaN or infinity"),
        ("exp_avg_sq", -1e-30, "negative numbers"),
        ("exp_avg", -1e-30, None),
        ("exp_avg_sq", -0.0, None),
    ],
)
def test_a_number_that_no_healthy_run_has_is_named(role: str, value: float, words: str | None) -> None:
    units = [Unit(f"layers.{i}", torch.bfloat16) for i in range(2)]
    optimizer = HybridZeroOptimizer(list(units), config(), single_process_mesh(), torch.bfloat16)
    assert optimizer.problem() is None
    piece = next(p for p in optimizer.pieces() if (p.role, p.name) == (role, "layers.1.weight"))
    piece.tensor.view(-1)[-1] = value
    assert optimizer.problem() == (None if words is None else f"{role} of layers.1.weight holds {words}")


def test_memory_of_an_optimizer_is_freed_with_it() -> None:
    units = [Unit("layers.0", torch.float32)]
    optimizer = HybridZeroOptimizer(list(units), config(), single_process_mesh(), torch.float32)
    weights = weakref.ref(optimizer.buckets[0].weights)
    del units, optimizer
    gc.collect()
    assert weights() is None


def test_a_parameter_that_is_not_to_be_trained_is_refused() -> None:
    unit = Unit("layers.0", torch.float32)
    unit.bias.requires_grad_(False)
    with pytest.raises(ConfigError, match=r"layers.0.bias has requires_grad=False"):
        HybridZeroOptimizer([unit], config(), single_process_mesh(), torch.float32)


def test_master_weights_beyond_the_range_of_the_weights_are_named() -> None:
    """They are finite, the weights made of them are not."""
    for dtype in (torch.float16, torch.bfloat16):
        optimizer = HybridZeroOptimizer([Unit("layers.0", dtype)], config(), single_process_mesh(), dtype)
        (master,) = (p for p in optimizer.pieces() if (p.role, p.name) == ("master", "layers.0.bias"))
        largest = torch.finfo(dtype).max
        for value, found in (
            (-largest, None),
            (1.001 * largest, f"numbers beyond {largest:g}, too large for the weights"),
        ):
            master.tensor[-1] = value
            assert optimizer.problem() == (found and f"master of layers.0.bias holds {found}")


def test_a_backward_pass_that_was_broken_off_does_not_count() -> None:
    def norm(broken_off: bool) -> float:
        units = [Unit(f"layers.{i}", torch.float64) for i in range(3)]
        optimizer = HybridZeroOptimizer(list(units), config(), single_process_mesh(), torch.float64)
        if broken_off:
            optimizer.begin(1)
            with units[1].register_full_backward_hook(lambda *_: 1 / 0), pytest.raises(ZeroDivisionError):
                loss_of(units, rows(0, 0).requires_grad_()).backward()
            assert any(bucket.grads.any() for bucket in optimizer.buckets)
        optimizer.begin(1)
        loss_of(units, rows(0, 0)).backward()
        return optimizer.step(0, num_labels=ROWS, global_tokens=ROWS).norm_model_dtype.item()

    assert norm(broken_off=True) == norm(broken_off=False)


def logged(mesh: Mesh, *, beside: bool) -> tuple[dict, list[tuple[str, str, int]]]:
    """`train`, and the collectives on shards in the order of their start: (collective, axis, bytes).

    `beside`: all-reduces over replicas start as on CUDA, while the backward pass goes on."""
    log: list[tuple[str, str, int]] = []

    def seen(name: str) -> None:
        start = getattr(comm, name)

        def call(tensor: torch.Tensor, *rest: Any) -> comm.Work:
            group = next(one for one in rest if isinstance(one, Group))
            log.append((name, group.name, tensor.nbytes))
            return start(tensor, *rest)

        setattr(comm, name, call)

    for name in ("reduce_scatter", "all_reduce"):
        seen(name)
    if beside:
        comm.SideStream.is_real = property(lambda self: True)
    return train(mesh, config()), log


def test_replicas_are_reduced_behind_the_scatter_in_the_same_order_on_every_rank():
    alone, beside = (run_world(partial(logged, beside=flag), 4, zero1=2) for flag in (False, True))
    for (plain, _), (result, log) in zip(alone, beside, strict=True):
        assert log == beside[0][1] and plain["norms"] == result["norms"]
        assert all(torch.equal(result["weights"][name], weight) for name, weight in plain["weights"].items())
        shards = [(name, axis) for name, axis, _ in log if axis in ("zero", "replica")]
        assert shards == [("reduce_scatter", "zero"), ("all_reduce", "replica")] * (len(shards) // 2)
        n_buckets = len(shards) // 2 // STEPS
        assert n_buckets > 2 and len(log) == STEPS * (2 * n_buckets + 1), "one reduction of the sum over micro-batches"


def test_a_side_stream_waits_for_the_current_one_and_is_waited_for(monkeypatch: pytest.MonkeyPatch):
    """The current stream must be asked for before the switch: inside it, the side stream would wait for itself."""
    current, log = ["compute"], []

    class Stream:
        def __init__(self, name: object) -> None:
            self.name = "side" if isinstance(name, torch.device) else name

        def wait_stream(self, other: Any) -> None:
            log.append((self.name, "waits for", other.name))

    @contextmanager
    def switched(stream: Stream) -> Iterator[None]:
        current.append(stream.name)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", switched)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream(current[-1]))
    side = comm.SideStream(torch.device("cuda"))
    with side.current_work():
        log.append((current[-1], "runs", "all_reduce"))
    side.join()
    assert log == [("side", "waits for", "compute"), ("side", "runs", "all_reduce"), ("compute", "waits for", "side")]
