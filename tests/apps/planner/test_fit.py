"""`--dry-run --fit`: the layouts that it finds hold, send and take what a plan of them says, and a start takes them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.pipelining import stage as torch_stage
from torch.distributed.pipelining.schedules import _PipelineSchedule
from torch.testing._internal.distributed.fake_pg import FakeStore

from internlm_lite.apps.planner.context_balance import context_balance
from internlm_lite.apps.planner.device_file import load_device
from internlm_lite.apps.planner.fit import (
    LIMITS,
    FittingLayout,
    Layout,
    Room,
    _plain_layouts,
    fit,
    rows_of_a_step,
    with_keys,
)
from internlm_lite.apps.planner.fit_report import fit_json, overlay, overrides
from internlm_lite.apps.planner.holdings import holdings
from internlm_lite.apps.planner.memory import row_shape
from internlm_lite.apps.planner.outside import COMMUNICATOR, CONTEXT, PEER, WORKSPACE, outside_bytes
from internlm_lite.apps.planner.plan import Questions, make_plan
from internlm_lite.apps.planner.traffic import messages
from internlm_lite.batch import Batch
from internlm_lite.config.load import check_config, load_config
from internlm_lite.errors import ConfigError
from internlm_lite.layers.context_parallel import partial_attention, scores
from internlm_lite.layers.context_parallel.exchanges import EXCHANGES
from internlm_lite.layers.flash import AttentionBackend
from internlm_lite.mesh.mesh import build_mesh, sizes_of
from internlm_lite.optim.rules import AdamW
from internlm_lite.train.trainer import Trainer
from tests.apps.planner.counting import Calls, expected
from tests.apps.planner.steps import random_batch, run_step
from tests.apps.planner.test_scale import agree_without_words
from tests.cli import run

CONFIGS = Path(__file__).parents[3] / "configs"
GB = 10**9
SMALL = ["model.num_layers=8", "model.hidden_size=2048", "model.num_attention_heads=16", "data.micro_num=2"]
LONG = "20B, 131,072 tokens, on 32"
SHAPES: dict[str, tuple[str, int, list[str]]] = {
    "7B on 8": ("7B_sft.py", 8, []),
    "70B on 64": (
        "20B_sft.py",
        64,
        [
            "model.hidden_size=8192",
            "model.num_layers=80",
            "model.num_attention_heads=64",
            "model.num_kv_attention_heads=8",
            "model.mlp_ratio=3.5",
        ],
    ),
    LONG: (
        "20B_sft.py",
        32,
        ["data.seq_len=131072", "data.micro_bsz=1", "data.micro_num=1"],
    ),
}
"""(config, GPUs, overrides)"""


def room(gpus: int, memory: int = 80 * GB) -> Room:
    return Room(gpus, memory, load_device("h100"))


@pytest.fixture(scope="module")
def found() -> list[FittingLayout]:
    """Of a model that fits in few ways."""
    return fit(load_config(CONFIGS / "7B_sft.py", SMALL).config, room(4, 20 * GB))


def test_layouts_fit_train_the_same_tokens_and_stand_by_time(found: list[FittingLayout]) -> None:
    assert 1 < len(found) <= 5
    assert [one.step for one in found] == sorted(one.step for one in found)
    for one in found:
        assert one.bytes.peak + one.outside <= 0.96 * 20 * GB
        assert one.tokens == found[0].tokens
        assert sum(one.shares().values()) == pytest.approx(1), "every row of the plan is a limit"
        assert set(one.shares()) == set(LIMITS)


def test_a_plan_of_each_says_the_same(found: list[FittingLayout]) -> None:
    """The search tells one model what is recomputed; a plan builds it so."""
    for one in found:
        plan = make_plan(one.config, 4, None, "cuda", Questions(timed=load_device("h100")))
        assert max(rank.bytes.peak for rank in plan.ranks) == one.bytes.peak
        assert plan.clock is not None
        assert plan.clock.seconds_per_step == pytest.approx(one.step, rel=0.1)  # its documents are real ones


def test_overrides_and_overlay_are_the_layout(found: list[FittingLayout], tmp_path: Path) -> None:
    for one in found:
        config = load_config(CONFIGS / "7B_sft.py", [*SMALL, *overrides(one).split()]).config
        assert config == one.config
        (tmp_path / "fits.py").write_text(overlay(one, CONFIGS / "7B_sft.py", SMALL))
        loaded = load_config(tmp_path / "fits.py")
        check_config(loaded, 4)
        assert loaded.config == config


def test_an_overlay_repeats_variables_and_aliases_of_the_command_line(
    found: list[FittingLayout], tmp_path: Path
) -> None:
    given = [
        "JOB_NAME=long",
        "SEQ_LEN=4096",
        "parallel.context=2",
        "parallel.zero1=dict(size=8, fsdp=True)",
        "adam.lr=1e-3",
    ]
    (tmp_path / "fits.py").write_text(overlay(found[0], CONFIGS / "7B_sft.py", given))
    config = load_config(tmp_path / "fits.py").config
    assert (config.JOB_NAME, config.data.seq_len, config.adam.lr) == ("long", 4096, 1e-3)
    assert config.parallel == found[0].config.parallel


def test_recomputation_is_no_better_than_what_fits_without(found: list[FittingLayout]) -> None:
    """More memory changes the first layout only to a faster one."""
    more = fit(load_config(CONFIGS / "7B_sft.py", SMALL).config, room(4))
    assert more[0].step <= found[0].step


def test_exchanges_are_searched_where_the_heads_allow() -> None:
    name, _, changes = SHAPES[LONG]
    config = load_config(CONFIGS / name, [*changes, "model.num_layers=2"]).config
    gpus, heads = room(64), config.model.num_attention_heads
    searched: dict[tuple[int, int], set[str]] = {}
    for one in _plain_layouts(config, gpus, rows_of_a_step(config, gpus.gpus)):
        searched.setdefault((one.tensor, one.context), set()).add(one.exchange)
    for (tensor, context), exchanges in searched.items():
        few = heads // tensor % context > 0
        expected = {"gather"} if context == 1 else {"gather", "ring"} if few else set(EXCHANGES)
        assert exchanges == expected, (tensor, context)
    assert any("ulysses" not in exchanges for (_, context), exchanges in searched.items() if context > 1)
    best = next(one for one in fit(config, room(8)) if one.layout.context > 1)
    told = fit_json([best], room(8))["layouts"][0]["keys"]
    assert told["parallel.context.exchange"] == best.layout.exchange
    assert f'exchange="{best.layout.exchange}"' in overlay(best, CONFIGS / name)


def test_what_no_tensor_has_grows_with_groups_and_with_ranks_that_are_sent_to() -> None:
    config = load_config(CONFIGS / "7B_sft.py", []).config
    alone = outside_bytes(config, sizes_of(1, 1, 1, -1))
    assert alone == CONTEXT + WORKSPACE and WORKSPACE == 32 * 2**20
    assert outside_bytes(config, sizes_of(8, 1, 1, -1)) == alone + 3 * COMMUNICATOR  # world, dp, zero
    assert outside_bytes(config, sizes_of(8, 1, 1, -1, 4)) == alone + 4 * COMMUNICATOR + 3 * PEER
    assert outside_bytes(config, sizes_of(16, 2, 2, 2)) == alone + 7 * COMMUNICATOR + PEER
    assert pytest.approx(3.3e9) == 7 * PEER


def test_nothing_fits() -> None:
    config = load_config(CONFIGS / "7B_sft.py", SMALL).config
    with pytest.raises(ConfigError, match=r"no layout of \d+ rows a step on 1 GPUs fits .* takes .*zero_stage"):
        fit(config, room(1, 2 * GB))
    with pytest.raises(ConfigError, match="--gpus 3: the config's own layout takes 2 GPUs"):
        fit(with_keys(config, {"parallel.tensor": 2}), room(3))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--fit", "--gpus=8"], "--fit belongs to --dry-run: add it"),
        (["--dry-run", "--gpus=8"], "--gpus belongs to --fit: add it"),
        (["--dry-run", "--fit-out=x"], "--fit-out belongs to --fit: add it"),
        (["--dry-run", "--fit"], "--fit needs the number of GPUs: add --gpus N"),
        (["--dry-run", "--fit", "--gpus=0"], "--gpus 0"),
        (["--dry-run", "--fit", "--gpus=1000000000"], "--gpus 1000000000: expected at most 100000"),
        (["--dry-run", "--world-size=1000000000"], "--world-size 1000000000: expected at most 100000"),
        (["--dry-run", "--fit", "--gpus=2", "--device=cpu"], "--device cpu is not one"),
        (["--dry-run", "--fit", "--gpus=2", "--world-size=4"], "--world-size does not go with --fit"),
        (["--dry-run", "--fit", "--gpus=2", "--tflops=4"], "--tflops does not go with --fit"),
    ],
)
def test_mistakes_on_the_command_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    from internlm_lite.cli.train import parse_arguments

    with pytest.raises(SystemExit):
        parse_arguments(["--config=configs/tiny.py", *arguments])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", list(SHAPES)[: None if "FIT_SHAPES" in os.environ else 1])
def test_large_shapes_find_layouts(name: str) -> None:
    config, gpus, changes = SHAPES[name]
    layouts = fit(load_config(CONFIGS / config, changes).config, room(gpus))
    assert layouts and layouts[0].bytes.peak + layouts[0].outside <= 0.96 * 80 * GB


LAYOUTS: dict[str, tuple[str, int, Layout]] = {
    "stage 3, offload": ("7B on 8", 5, Layout(1, 1, None, 1, 1, "gather", 3, "offload", 0.5, 2, 2)),
    "stage 2, tp, pp": ("70B on 64", 63, Layout(4, 4, None, 1, 1, "gather", 2, "selective", 1.0, 1, 8)),
    **{
        f"stage 3, tp, {exchange}, offload": (LONG, 15, Layout(2, 1, None, 1, 4, exchange, 3, "offload", 0.75, 1, 2))
        for exchange in EXCHANGES
    },
}
"""(shape, rank, layout). Of a ring's ranks the last one sends most."""


@pytest.fixture(params=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> Iterator[tuple[str, int, Layout]]:
    shape, rank, wanted = LAYOUTS[request.param]
    dist.init_process_group("cpu:fake,meta:fake", rank=rank, world_size=SHAPES[shape][1], store=FakeStore())
    yield shape, rank, wanted
    dist.destroy_process_group()


def samples_are_documents(batch: Batch) -> Batch:
    """The batch that plans are made for."""
    ends = tuple(range(0, batch.tokens.shape[1] + 1, batch.max_seqlen))
    on_device = torch.tensor([ends] * len(batch.rows), dtype=torch.int32)
    return replace(batch, cu_seqlens=on_device, cu_seqlens_host=(ends,) * len(batch.rows))


def test_collectives_of_large_layouts_are_counted_exactly(layout: tuple[str, int, Layout], monkeypatch: Any) -> None:
    name, rank, wanted = layout
    path, world, changes = SHAPES[name]
    if name == LONG and "FIT_SHAPES" not in os.environ:
        changes = [*changes, "model.num_layers=4"]
    config = with_keys(load_config(CONFIGS / path, changes).config, wanted.keys())
    sizes = sizes_of(world, wanted.tensor, wanted.pipeline, -1, wanted.context)
    mesh = build_mesh(sizes, rank, torch.device("meta"), timedelta(seconds=60))
    trainer = Trainer(config, mesh)
    # Blocks of scores fit a memory that is not needed here.
    monkeypatch.setattr(scores, "_AT_ONCE", 2**60)
    monkeypatch.setattr(partial_attention, "_AT_ONCE", 2**60)
    # The fused kernel knows no meta tensors; what it computes sends nothing.
    monkeypatch.setattr(AdamW, "_update", lambda *_: None)
    monkeypatch.setattr(_PipelineSchedule, "_warmup_p2p", agree_without_words, raising=False)
    monkeypatch.setattr(torch_stage._PipelineStageBase, "_get_init_p2p_neighbors_ops", lambda _: [], raising=False)
    with Calls(mesh) as calls:
        run_step(trainer, samples_are_documents(random_batch(config, mesh)))
    held, _ = holdings(config, sizes, AttentionBackend.SDPA)
    planned = messages(
        row_shape(config, AttentionBackend.SDPA, "cpu"), sizes, held[mesh.pp.rank], config.data.micro_num
    )
    axes = ("dp", "cp", "tp", "pp", "zero", "replica", "ends")
    assert calls.counted == expected(planned, {axis: mesh.axis(axis).size for axis in axes} | {"world": world})


def test_the_command(tmp_path: Path) -> None:
    out = tmp_path / "fits.py"
    asked = ["--dry-run", "--fit", "--gpus=2", "--memory=20", "--json", f"--fit-out={out}"]
    done = run("train.py", "--config", str(CONFIGS / "tiny.py"), *asked, folder=tmp_path)
    assert done.code == 0, done.output
    told = json.loads(done.output[done.output.index("{") :])
    assert told["gpus"] == 2 and told["memory"] == 20 * GB and told["layouts"][0]["limits"]
    assert load_config(out, []).config.data.micro_bsz == told["layouts"][0]["keys"]["data.micro_bsz"]


def test_the_attention_of_real_documents_is_shared_evenly() -> None:
    changes = ["parallel.context=2", "parallel.tensor=1", "model.num_layers=2", "data.seq_len=4096"]
    plan = make_plan(load_config(CONFIGS / "tiny.py", changes).config, 4, None, "cpu")
    assert [one.step for one in plan.balance] == [figures.step for figures in plan.batches]
    for one in plan.balance:
        assert 1 <= one.imbalance < 1.05 and one.attention_flops > 0
    rows = [(0, 1000, 4096), (0, 4096)]
    model = load_config(CONFIGS / "tiny.py", []).config.model
    pairs = 2 * sum(n * (n + 1) // 2 for n in (1000, 3096, 4096))
    found = context_balance(0, rows, model.model_copy(update={"num_layers": 2}), 2)
    assert found.attention_flops == 12 * model.num_attention_heads * model.head_size * pairs
