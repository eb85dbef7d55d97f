"""The predicted step: against what one H100 took, and its parts against closed forms."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest

from internlm_lite.apps.bench.gpu.step_speed import shape_config
from internlm_lite.apps.planner.bucket_sizes import BucketSizes
from internlm_lite.apps.planner.clock import (
    KIND_OF_PASS,
    DocumentLengths,
    Seconds,
    Ways,
    document_lengths,
    leave_waits_of_a_ring,
)
from internlm_lite.apps.planner.command import PlanOptions, dry_run
from internlm_lite.apps.planner.device_file import (
    DeviceFile,
    KernelFractions,
    Link,
    device_names,
    device_of,
    load_device,
)
from internlm_lite.apps.planner.overlap import Axis, exposed, network
from internlm_lite.apps.planner.plan import Questions, make_plan
from internlm_lite.apps.planner.report import ClockPlan
from internlm_lite.apps.planner.step_clock import StepClock, clock_plan, full_rows
from internlm_lite.config.load import load_config
from internlm_lite.errors import ConfigError
from internlm_lite.layers.costs import FUSIONS, Message, Pass
from internlm_lite.mesh.mesh import Sizes, axis_groups
from tests.cli import ROOT, run

CONFIG = ROOT / "configs" / "tiny.py"
WITHIN = 0.15
MEASURED = {
    # docs/benchmarks/2026-11-28-h100.json: shape, what was fused, milliseconds of a step
    "perf:1b:eager": ("1b", frozenset[str](), 390.2),
    "perf:1b:islands+wgrad": ("1b", FUSIONS["parts"] | {"gradients"}, 338.6),
    "perf:7b:eager": ("7b", frozenset[str](), 537.0),
    "perf:7bhalf:eager": ("7bhalf", frozenset[str](), 340.4),
    # docs/benchmarks/2026-11-28-h100-second.json, another machine
    "second perf:1b:eager": ("1b", frozenset[str](), 380.1),
}
KERNELS = {  # milliseconds by kind, profile:1b of the first file; 4.1 ms of its "other" are a kernel of the norms
    "products": 172.0,
    "attention": 54.0,
    "elementwise": 73.4,
    "copies": 50.7,
    "optimizer": 15.3,
    "norms": 11.4 + 4.5,
    "gaps": 10.7,
}
BARE = 289.9
"""perf:1b:bare_compiled; 283.2 in the second file."""


def timed(shape: str, fused: Iterable[str], **changes: object) -> tuple[StepClock, Ways, Seconds]:
    clock, ways = full_rows(shape_config(shape, "eager"), 1, load_device("h100"))
    ways = replace(ways, row=replace(ways.row, fused=frozenset(fused)), **{"attention": "varlen", **changes})
    return clock, ways, clock.seconds(ways)


@pytest.mark.parametrize("name", MEASURED)
def test_a_step_takes_what_was_measured(name: str) -> None:
    shape, fused, milliseconds = MEASURED[name]
    assert timed(shape, fused)[2].total() * 1e3 == pytest.approx(milliseconds, rel=WITHIN)


def test_each_kind_of_kernel_takes_what_was_measured() -> None:
    kinds = {kind: seconds * 1e3 for kind, seconds in timed("1b", ())[2].by_kind().items()}
    assert kinds == {kind: pytest.approx(taken, rel=WITHIN) for kind, taken in KERNELS.items()}


def test_a_layer_of_the_7b_shape_takes_what_was_measured() -> None:
    eight, four = (timed(shape, ())[2].total() for shape in ("7b", "7bhalf"))
    assert (eight - four) / 4 * 1e3 == pytest.approx(49, rel=WITHIN)


def test_the_compiled_bare_loop_takes_what_was_measured() -> None:
    """apps/bench/bare.py: the same layers, but whole logits in fp32, gradients, weights and moments in bf16, SDPA."""
    clock, ways, ours = timed("1b", FUSIONS["blocks"], attention="cudnn")
    parts = ours.by_part()
    shared = sum(seconds for part, seconds in parts.items() if part not in ("weight gradients", "loss", "optimizer"))
    logits, weights, micro_num = ways.row.tokens * 50304, clock.held[0].parameters, 2
    loss = [
        *(Pass("cast", 6 * logits), Pass("contiguous_copy", 10 * logits)),  # to fp32; zeros, and back to bf16
        Pass("elementwise", 20 * logits),  # log_softmax forward 8, backward 12
    ]
    once = [Pass("elementwise", 6 * weights), Pass("reduce", 2 * weights), Pass("elementwise", 4 * weights)]
    once.append(Pass("update", 14 * weights))
    other = sum(clock.device.passes_seconds(one.kind, one.n_bytes) for one in [*loss * micro_num, *once])
    assert (shared + other) * 1e3 == pytest.approx(BARE, rel=WITHIN)


def test_the_terms_are_the_step_and_mfu_is_that_of_the_step_line() -> None:
    clock, ways, times = timed("1b", FUSIONS["blocks"] | {"loss", "gradients"})
    plan = clock_plan(clock, ways, "")
    for sums in (plan.terms, plan.kinds):
        assert sum(sums.values()) == pytest.approx(plan.seconds_per_step)
    assert plan.seconds_per_step == pytest.approx(times.total())
    assert plan.mfu == pytest.approx(9_111_601_152 * 16_384 / plan.seconds_per_step / 989.4e12)  # flops_per_token there
    assert plan.mfu_causal < plan.mfu
    assert plan.buckets == []
    taken = [change.seconds_per_step for change in plan.changes]
    assert taken == sorted(taken, reverse=True) and len(taken) == 8


def test_what_is_fused_takes_less_memory_traffic_and_fewer_kernels() -> None:
    none, parts, blocks = (
        timed("1b", names)[2].by_part() for names in (FUSIONS["off"], FUSIONS["parts"], FUSIONS["blocks"] | {"loss"})
    )
    for term in ("elementwise", "gaps"):
        assert none[term] > parts[term] > blocks[term]
    assert blocks["loss"] < none["loss"] / 2


@pytest.mark.parametrize("name", device_names())
def test_every_figure_of_a_built_in_device_has_a_source(name: str) -> None:
    device = load_device(name)
    figures = set(DeviceFile.model_fields) - {"name", "sources", "attention_tflops", "kernel_fraction"}
    figures |= {f"attention_tflops.{kernel}" for kernel in device.attention_tflops}
    figures |= {f"kernel_fraction.{kind}" for kind in KernelFractions.model_fields}
    assert set(device.sources) == figures
    assert set(KIND_OF_PASS) - {"product", "attention"} == set(KernelFractions.model_fields)
    assert device_of(device.name) == device


H100 = ROOT / "internlm_lite/apps/planner/devices/h100.json"
WRONG = [
    ({"copy_tb_per_s": None}, "copy_tb_per_s is missing, expected a number above 0"),
    ({"copy_tb_per_s": "fast"}, "copy_tb_per_s: found 'fast', expected a number above 0"),
    ({"product_fraction": 1.5}, "product_fraction: found 1.5, expected a number above 0, up to 1"),
    ({"intra_node": 450}, "intra_node: found 450, expected an object of gb_per_s and latency_us"),
    ({"intra_node": {"gb_per_s": -1, "latency_us": 1}}, "intra_node.gb_per_s: found -1, expected a number above 0"),
    (
        {"attention_tflops": {"varlen": 3}},
        "attention_tflops.varlen: found 3, expected an object of forward and backward",
    ),
    ({"kernel_fraction": {}}, "kernel_fraction.elementwise is missing, expected a number above 0, up to 1"),
    ({"memory": 80}, "memory: no such key"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG, ids=lambda value: None)
def test_a_wrong_device_file_names_key_and_type(changes: dict[str, object], message: str, tmp_path: Path) -> None:
    values = json.loads(H100.read_text("utf-8")) | changes
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
    with pytest.raises(ConfigError) as refused:
        load_device(str(file))
    assert str(refused.value).startswith(f"--device {file}: {message}\n")


@pytest.mark.parametrize(("text", "message"), [("{", "line 1: expected JSON"), ("[]", "expected a JSON object")])
def test_a_file_that_is_no_device(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_device(str(tmp_path / "mine.json"))


def test_an_unknown_device_is_one_error_with_the_names_there_are(tmp_path: Path) -> None:
    ended = run("train.py", "--config", str(CONFIG), "--dry-run", "--device", "h1000", folder=tmp_path)
    assert ended.code == 2
    assert ended.output == (
        "ConfigError: --device h1000: expected auto, cpu or cuda, one of a100, b200, h100, h200, or a JSON file of a "
        "device; found no such file\n"
    )


def test_a_named_device_belongs_to_a_dry_run(tmp_path: Path) -> None:
    ended = run("train.py", "--config", str(CONFIG), "--device", "h100", folder=tmp_path)
    assert ended.code == 2 and "belongs to --dry-run" in ended.output


def test_a_dtype_that_the_device_file_lacks() -> None:
    config = load_config(CONFIG, ["model.dtype=torch.float32"]).config
    device = load_device("h100").model_copy(update={"peak_tflops": {"bf16": 1.0}})
    with pytest.raises(ConfigError, match=r"says nothing about peak_tflops\.fp32"):
        make_plan(config, 1, None, questions=Questions(device))


LAYOUTS = {
    "dp8": [],
    "zero4": ["parallel.zero1=4"],
    "tp2 sp": ["parallel.tensor=2", "parallel.sequence_parallel=True"],
    "pp2": ["parallel.pipeline.size=2"],
    "recompute": ["model.checkpoint=True"],
    "zbv": ["parallel.pipeline=dict(size=2, schedule='zbv')", "model.num_chunks=2", "model.num_layers=4"],
}
EXPECTED = {
    "dp8": {"reduce-scatter", "gather of weights"},
    "zero4": {"all-reduce of replicas"},
    "tp2 sp": {"tensor parallel"},
    "pp2": {"bubble"},
    "recompute": {"recomputation"},
    "zbv": {"bubble"},
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_has_its_terms(name: str) -> None:
    plan = make_plan(load_config(CONFIG, LAYOUTS[name]).config, 8, None, questions=Questions(load_device("h100")))
    assert plan.clock is not None
    terms = plan.clock.terms
    assert EXPECTED[name] <= set(terms)
    assert all(seconds > 0 for seconds in terms.values())
    assert sum(terms.values()) == pytest.approx(plan.clock.seconds_per_step)
    assert len(plan.clock.expensive) == 2 and all(one.term != "products" for one in plan.clock.expensive)
    assert [size.elements for size in plan.clock.buckets][-1] <= 32 * 1024**2
    assert json.loads(json.dumps(plan.to_json()))["clock"]["terms"] == terms
    assert 0 < plan.clock.mfu < 1


def test_zero_bubble_waits_least_in_seconds_too() -> None:
    def bubble(schedule: str, chunks: int) -> float:
        overrides = [f"parallel.pipeline=dict(size=2, schedule='{schedule}')", f"model.num_chunks={chunks}"]
        config = load_config(CONFIG, [*overrides, "model.num_layers=8", "data.micro_num=8"]).config
        plan = make_plan(config, 2, None, questions=Questions(load_device("h100")))
        assert plan.clock is not None
        return plan.clock.terms["bubble"] / plan.clock.seconds_per_step

    assert bubble("zbv", 2) < bubble("1f1b", 1)


def bucket(n_bytes: int, *units: int) -> BucketSizes:
    return BucketSizes(
        weights=n_bytes,
        grads=n_bytes,
        shard_grads=n_bytes,
        masters=0,
        moments=0,
        expanded=0,
        update_grads=0,
        partial_over=(),
        shard_weights=n_bytes,
        units=units,
        product_flops=(0,),
        exchanged=0,
        update_workspace=0,
    )


AXES = {"zero": Axis(2, Link(gb_per_s=1e-9, latency_us=1e-9)), "replica": Axis(1, Link(gb_per_s=1, latency_us=1))}
"""A reduce-scatter of 2 bytes takes one second."""


def test_buckets_overlap_with_the_units_behind_them() -> None:
    three = [bucket(2, 2), bucket(2, 1), bucket(2, 0)]
    waits = exposed(three, AXES, backward=[1, 1, 1], forward=[1, 1, 1], hidden=(True, True))
    assert waits.scatter == pytest.approx(1)  # the last one
    assert waits.gather == pytest.approx(1)  # the first one
    assert waits.fraction == pytest.approx(2 / 6)
    slow = exposed(three, AXES, backward=[0.5] * 3, forward=[0.5] * 3, hidden=(True, True))
    assert slow.scatter == pytest.approx(2) and slow.gather == pytest.approx(2)
    whole = exposed([bucket(6, 0, 1, 2)], AXES, backward=[1, 1, 1], forward=[1, 1, 1], hidden=(True, True))
    assert (whole.scatter, whole.gather) == (pytest.approx(3), pytest.approx(3))
    bare = exposed(three, AXES, backward=[1, 1, 1], forward=[1, 1, 1], hidden=(False, False))
    assert (bare.scatter, bare.gather, bare.fraction) == (pytest.approx(3), pytest.approx(3), pytest.approx(1))


def test_which_axes_cross_nodes_is_known_without_listing_their_groups() -> None:
    for dp, cp, tp, pp, zero in product((1, 2, 3, 4), (1, 2), (1, 2, 4), (1, 2, 3), (1, 2)):
        sizes = Sizes(dp, tp, pp, zero if dp * cp % zero == 0 else 1, cp)
        for per_node in (1, 2, 3, 4, 8):
            device = load_device("h100").model_copy(update={"gpus_per_node": per_node})
            for name, axis in network(device, sizes).items():
                groups = axis_groups(sizes)[name]
                crosses = any(len({rank // per_node for rank in group}) > 1 for group in groups)
                link = device.inter_node if crosses else device.intra_node
                assert axis == Axis(max(map(len, groups)), link), (name, sizes, per_node)
    assert network(load_device("h100"), Sizes(dp=10**9, zero=10**9))["zero"].size == 10**9


def test_a_collective_takes_its_bytes_and_a_latency_for_each_doubling() -> None:
    axis = Axis(8, Link(gb_per_s=100, latency_us=10))
    assert axis.seconds(Message("zero", "all_gather", 8 * 10**9)) == pytest.approx(7e9 / 100e9 + 3 * 10e-6)
    assert axis.seconds(Message("zero", "all_reduce", 8 * 10**9)) == pytest.approx(14e9 / 100e9 + 3 * 10e-6)
    assert Axis(1, axis.link).seconds(Message("zero", "all_gather", 10**9)) == 0


def test_keys_of_a_query_are_half_its_document_or_a_tile() -> None:
    assert document_lengths([(0, 2048, 4096)]) == DocumentLengths(1024, 1)
    assert document_lengths([(0, 100), (0, 300)]) == DocumentLengths((100 * 128 + 300 * 300) / 400 / 2, 0)
    assert document_lengths([(0, 2048, 2048)]) == DocumentLengths(1024, 1)  # padded boundaries


def test_keys_of_a_sliding_layer_are_those_of_its_window() -> None:
    documents = document_lengths([(0, 2048, 4096)])
    assert [documents.keys_within(window) for window in (None, 4096, 2048)] == [1024] * 3
    assert documents.keys_within(512) == pytest.approx(917_760 / 2048, rel=1e-3)


def planned(*overrides: str) -> ClockPlan:
    config = load_config(CONFIG, ["model.dtype=torch.bfloat16", "data.seq_len=8192", *overrides]).config
    clock, ways = full_rows(config, 8, load_device("h100"))
    return clock_plan(clock, ways, "full rows")


def test_windows_take_the_time_of_their_pairs_and_soft_caps_that_of_their_scores() -> None:
    plain, sliding, capped = planned(), planned("model.sliding_window=512"), planned("model.attention_softcap=50.0")
    assert (plain.attention, sliding.attention) == ("cudnn", "varlen")
    assert sliding.terms["attention"] < plain.terms["attention"] / 4 and sliding.mfu < plain.mfu
    assert capped.terms["attention"] > 8 * plain.terms["attention"]
    names = [
        [change.change for change in plan.changes if "attention by" in change.change] for plan in (sliding, capped)
    ]
    assert names == [["attention by flash-attn 3"]] * 2
    (with_kernel,) = (
        change.seconds_per_step for change in capped.changes if change.change == "attention by flash-attn 3"
    )
    assert with_kernel < capped.seconds_per_step / 2


def test_the_tables_show_the_step(capsys: pytest.CaptureFixture[str]) -> None:
    config = load_config(CONFIG, ["model.dtype=torch.bfloat16"]).config
    assert dry_run(config, 8, PlanOptions(device=str(H100))) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 110
    for part in ("A step on NVIDIA H100", "tokens/s a GPU; MFU", "reduce_bucket_size", "What each change gives"):
        assert part in text
    assert "as predicted below" in text


# Keys come while the block before them is computed, so the last one hides nothing.
@pytest.mark.parametrize(("attention", "waits"), [(0.0, 3.0), (2.0, 1.5), (8.0, 0.0)])
def test_a_ring_waits_for_what_its_blocks_do_not_hide(attention: float, waits: float) -> None:
    times = Seconds()
    times.add("attention", "attention", attention)
    times.add("context parallel", "messages", 3.0)
    leave_waits_of_a_ring(times, 4)
    assert dict(times.by_part()) == {
        name: n for name, n in {"attention": attention, "context parallel": waits}.items() if n
    }
