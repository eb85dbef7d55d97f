"""The average of the weights: against a recomputation in float64, in layouts, through a resume, while it is in use."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from internlm_lite.checkpoint.format.catalog import Found, committed, inspect
from internlm_lite.checkpoint.format.tensor_file import DTYPES
from internlm_lite.checkpoint.load.reader import Reader
from internlm_lite.checkpoint.storage.local import LocalStorage
from internlm_lite.config.schema import Config, EmaConfig
from internlm_lite.faults.signals import StopSignals
from internlm_lite.generate.load_model import load_model
from internlm_lite.mesh.layout import LocalShard
from internlm_lite.mesh.mesh import Mesh, single_process_mesh
from internlm_lite.monitor.jsonl import read_objects
from internlm_lite.optim.average import WeightAverage
from internlm_lite.optim.zero import HybridZeroOptimizer
from internlm_lite.train.build import build_run
from internlm_lite.train.loop import train
from internlm_lite.train.trainer import Trainer
from tests.corpus import write_corpus
from tests.train.layouts import LIMIT, Layout, config_of
from tests.train.runs import STEPS, curve, run_training, tiny
from tests.train.test_reshard import LAYOUTS, held_by, run_all
from tests.world import run_world

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("averages") / "corpus")


def saving(folder: Path, every: int = 1, **more: Any) -> dict[str, Any]:
    keys = {"enable_save_ckpt": True, "save_ckpt_folder": str(folder), "checkpoint_every": every, "async_upload": False}
    return {**keys, **more}


def checkpoints(folder: Path) -> dict[int, Found]:
    storage = LocalStorage(folder)
    return {name.step: inspect(storage, name) for name in reversed(committed(storage))}


def stored(found: Found, role: str) -> Tensors:
    """Whole tensors of a role, in their dtype."""
    reader, tensors = Reader(found), {}
    for name, entry in found.manifest.tensors[role].items():
        tensors[name] = torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
        box = tuple((0, n) for n in entry.shape)
        reader.fill(LocalShard(name, role, entry.shape, box, None, tensors[name]))
    return tensors


def initial(config: Config) -> Tensors:
    optimizer = Trainer(config, single_process_mesh()).optimizer
    return {
        piece.name: piece.tensor.clone().view(piece.shape) for piece in optimizer.pieces() if piece.role == "master"
    }


def assert_equal(found: Tensors, expected: Tensors) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def by_hand(
    ema: dict[str, Any], start: Tensors, masters: dict[int, Tensors], applied: list[bool]
) -> dict[int, Tensors]:
    """Step -> averages, in float64, one update of the weights after the other by the formula of the documentation."""
    average = {name: tensor.double() for name, tensor in start.items()}
    every, decay, taken_in, new, found = ema.get("every", 1), ema.get("decay", 0.999), 0, 0, {}
    for step in sorted(masters):
        new += applied[step - 1]
        if step % every == 0:
            used = min(decay, (1 + taken_in) / (10 + taken_in)) if ema.get("warmup", True) else decay
            for name, tensor in masters[step].items():
                average[name] = used**new * average[name] + (1 - used**new) * tensor.double()
            taken_in, new = taken_in + new, 0
        found[step] = dict(average)
    return found


@pytest.mark.parametrize(
    ("ema", "dtype"),
    [
        ({}, "torch.float32"),
        ({"decay": 0.7, "warmup": False}, "torch.float32"),
        ({"decay": 0.6, "every": 3}, "torch.bfloat16"),
        ({"decay": 0.8, "every": 2}, "torch.float16"),  # whose first steps are skipped
    ],
)
def test_it_is_what_float64_makes_of_the_saved_weights(
    ema: dict[str, Any], dtype: str, corpus: Path, tmp_path: Path
) -> None:
    """With skipped steps, which are no updates; an average of n updates decays n times."""
    scaler = {"fp16": {"initial_scale": 2.0**23, "growth_interval": 100}, "hysteresis": 1, "backoff_factor": 0.25}
    model = {"dtype": dtype, "num_layers": 1}
    config = tiny(corpus, ema=ema, model=model, grad_scaler=scaler, ckpt=saving(tmp_path / "saves"))
    run_training(single_process_mesh(), config, tmp_path / "run")
    found = checkpoints(tmp_path / "saves")
    counts = {step: one.manifest.state["optimizer"]["good_steps"] for step, one in found.items()}
    applied = [counts.get(step, 0) > counts.get(step - 1, 0) for step in range(1, STEPS + 1)]
    assert all(applied) == (dtype != "torch.float16")
    masters = {step: stored(found[step], "master") if step in found else {} for step in range(1, STEPS + 1)}
    start = initial(config)
    for step in masters:
        masters[step] = masters[step] or masters.get(step - 1, start)  # nothing is saved of a skipped step
    for step, expected in by_hand(ema, start, masters, applied).items():
        if step not in found:
            continue
        for name, tensor in stored(found[step], "ema").items():
            difference = (tensor.double() - expected[name]).norm()
            assert tensor.dtype == torch.float32 and difference <= 1e-6 * expected[name].norm(), (step, name)


def test_its_decay_warms_up_and_what_it_took_in_is_saved() -> None:
    """(1 + t) / (10 + t) until that exceeds the decay, which a warm-up value does not replace for good."""
    master = torch.zeros(1, dtype=torch.float64)
    average, expected = WeightAverage(EmaConfig(decay=0.3), [master]), 0.0
    for t, decay in enumerate([1 / 10, 2 / 11, 3 / 12, 0.3, 0.3, 0.3]):
        if t == 2:  # as after a resume
            state, value = average.state_dict(), average.values[0]
            average = WeightAverage(EmaConfig(decay=0.3), [master])
            average.values[0].copy_(value)
            average.load_state_dict(state)
        master.fill_(t + 1)
        average.after_step(t + 1, torch.tensor(t + 1))
        expected = decay * expected + (1 - decay) * (t + 1)
        assert average.values[0].item() == pytest.approx(expected, rel=1e-14)
    before = average.values[0].clone()
    master.fill_(100)
    average.after_step(7, torch.tensor(6))
    assert torch.equal(average.values[0], before), "a skipped step is no update"


def test_layouts_have_the_averages_of_one_process(corpus: Path, tmp_path: Path) -> None:
    """Whether a batch is four micro-batches of one process or one of each of four; in tied and split weights."""
    ema: dict[str, Any] = {"decay": 0.5, "warmup": False}
    layouts = [Layout(), *LAYOUTS.values(), Layout(pp=2, tied=True), Layout(dp=4, zero1=4, bucket=1500)]
    same = {tied: Layout(tied=tied) for tied in (False, True)}
    jobs = [
        (layout, config_of(layout, corpus, ema=ema, ckpt=saving(tmp_path / str(number), 3)))
        for number, layout in enumerate([*same.values(), *layouts])
    ]
    ran = dict(zip([str(layout) for layout, _ in jobs], run_all(jobs, tmp_path / "runs"), strict=True))
    for layout in layouts:
        (ours, _), (expected, _) = ran[str(layout)], ran[str(same[layout.tied])]
        names = [key for key in expected if key[0] == "ema"]
        assert len(names) == sum(role == "master" for role, _ in expected) and ours.keys() == expected.keys()
        for key in names:
            assert not torch.equal(expected[key], expected["master", key[1]])
            torch.testing.assert_close(ours[key], expected[key], rtol=LIMIT, atol=LIMIT * expected[key].abs().max())


def test_it_changes_no_bit_of_training_and_goes_on_to_the_bit(corpus: Path, tmp_path: Path) -> None:
    mesh = single_process_mesh()
    keys: dict[str, Any] = {"data": {"rampup_batch_size": "2 2 3"}, "model": {"dtype": "torch.bfloat16"}}
    plain = run_training(mesh, tiny(corpus, **keys), tmp_path / "plain")
    keys["ema"] = {"every": 2}
    whole = run_training(mesh, tiny(corpus, **keys, ckpt=saving(tmp_path / "whole", 5)), tmp_path / "run")
    assert curve(whole) == curve(plain)
    first = checkpoints(tmp_path / "whole")
    keys["ckpt"] = saving(tmp_path / "half", load_ckpt_folder=str(tmp_path / "whole" / "5"))
    assert curve(run_training(mesh, tiny(corpus, **keys), tmp_path / "resumed")) == curve(plain)[5:]
    half = checkpoints(tmp_path / "half")
    for role in ("ema", "master"):
        assert_equal(stored(half[STEPS], role), stored(first[STEPS], role))
    assert half[STEPS].manifest.state["optimizer"]["ema"] == first[STEPS].manifest.state["optimizer"]["ema"]
    assert half[STEPS].manifest.state["optimizer"]["ema"] == {"taken_in": STEPS, "seen": STEPS}


@pytest.mark.parametrize("key", ["load_ckpt_folder", "load_optimizer", "load_model_only_folder"])
def test_without_one_in_the_checkpoint_it_begins_at_the_weights(
    key: str, corpus: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One line says so; a run without averages takes none of a checkpoint that has them."""
    mesh, ema = single_process_mesh(), {} if key == "load_optimizer" else None
    sections: dict[str, Any] = {} if ema is None else {"ema": ema}
    run_training(mesh, tiny(corpus, ckpt=saving(tmp_path / "saves", 3), **sections), tmp_path / "run")
    found = checkpoints(tmp_path / "saves")[3]
    ckpt = {key: str(tmp_path / "saves" / "3")}
    if key == "load_optimizer":
        ckpt = {"load_ckpt_folder": ckpt[key], "load_optimizer": False}
    with caplog.at_level(logging.INFO, "internlm_lite"):
        run = build_run(tiny(corpus, ckpt=ckpt, ema={}), mesh, tmp_path / "second", "auto")
    run.checkpoints.close(wait=False)
    optimizer = run.trainer.optimizer
    held = {(piece.role, piece.name): piece.tensor.view(piece.shape) for piece in optimizer.pieces()}
    assert_equal({name: held["ema", name] for _, name in held}, stored(found, "master"))
    seen = 0 if key == "load_model_only_folder" else 3
    assert optimizer.average is not None and optimizer.average.state_dict() == {"taken_in": 0, "seen": seen}
    lines = [line for line in caplog.messages if line.startswith("ema: begins at the weights of step 3: checkpoint ")]
    assert len(lines) == (key != "load_model_only_folder")
    if ema is None:
        return
    plain = build_run(tiny(corpus, ckpt={"load_ckpt_folder": str(tmp_path / "saves" / "3")}), mesh, tmp_path, "auto")
    plain.checkpoints.close(wait=False)
    assert {piece.role for piece in plain.trainer.optimizer.pieces()} == {"master", "exp_avg", "exp_avg_sq"}


def test_a_rollback_takes_it_back(corpus: Path, tmp_path: Path) -> None:
    config = tiny(corpus, ckpt=saving(tmp_path / "saves", 3), ema={"decay": 0.5})
    (tmp_path / "run").mkdir()
    run = build_run(config, single_process_mesh(), tmp_path / "run", "auto")
    state = train(run, StopSignals()).state
    run.reporter.close()
    assert run.checkpoints.roll_back(state, spiked_step=4) is not None
    optimizer = run.trainer.optimizer
    held = {piece.name: piece.tensor.view(piece.shape) for piece in optimizer.pieces() if piece.role == "ema"}
    assert_equal(held, stored(checkpoints(tmp_path / "saves")[3], "ema"))
    assert optimizer.average is not None and optimizer.average.state_dict() == {"taken_in": 3, "seen": 3}
    run.checkpoints.close(wait=True)


def weights_of(optimizer: HybridZeroOptimizer) -> Tensors:
    return {slot.param.shard_spec.name: slot.param.detach().clone() for b in optimizer.buckets for slot in b.slots}


def _used(mesh: Mesh, config: Config, folder: Path) -> tuple[Any, ...]:
    """What a rank holds and computes with, before, inside and after `averaged()`."""
    folder.mkdir(parents=True, exist_ok=True)
    run = build_run(config, mesh, folder, "auto")
    train(run, StopSignals())
    run.reporter.close()
    optimizer = run.trainer.optimizer
    assert optimizer.before_exchange == run.checkpoints.manager.allow_changes, "a save may still read the masters"
    held, weights = held_by(optimizer), weights_of(optimizer)
    refused = []
    with optimizer.averaged():
        inside = weights_of(optimizer)
        refusals = (lambda: optimizer.step(0, 1, 1), lambda: list(optimizer.pieces()), optimizer.averaged().__enter__)
        for refusal in (*refusals, lambda: run.checkpoints.contents.pieces(), optimizer.problem):
            with pytest.raises(RuntimeError, match=r"the weights are the averaged ones: .*no save inside") as error:
                refusal()
            refused.append(str(error.value))
    after = held_by(optimizer), weights_of(optimizer)
    with pytest.raises(ValueError, match="of the block"), optimizer.averaged():
        raise ValueError("of the block")
    optimizer.publish_weights()
    run.checkpoints.close(wait=True)
    return held, weights, inside, refused, after, (held_by(optimizer), weights_of(optimizer))


@pytest.mark.parametrize("dtype", ["torch.float64", "torch.bfloat16"])
def test_every_rank_computes_with_it_and_has_its_own_weights_back(dtype: str, corpus: Path, tmp_path: Path) -> None:
    """Tensor parallel, and sharded twice over; nothing is saved and no step is done meanwhile."""
    layout = Layout(dp=2, tp=2, zero1=2, sp=True, bucket=1500)
    config = config_of(layout, corpus, dtype, ema={"decay": 0.5, "warmup": False})
    for held, weights, inside, refused, *afterwards in run_world(
        _used, 4, (config, tmp_path), tensor=2, zero1=2, timeout_seconds=120
    ):
        assert len(refused) == 5
        averages = {piece.name: piece for piece in held if piece.role == "ema"}
        assert averages
        for name, piece in averages.items():
            mine = inside[name].view(-1)[slice(*piece.span)]
            assert torch.equal(mine, piece.values.to(mine.dtype)), name
        assert any(not torch.equal(inside[name], weights[name]) for name in weights)
        for pieces, now in afterwards:
            assert_equal(now, weights)
            assert all(torch.equal(a.values, b.values) for a, b in zip(pieces, held, strict=True))


def test_an_evaluation_measures_both_and_a_save_beside_it_holds_the_masters(corpus: Path, tmp_path: Path) -> None:
    """Saved after the same step: the weights trained on are not replaced by the averaged ones, not even in the save of
    the best; the figures are those of a model with the saved averages."""
    mesh = single_process_mesh()
    data = {"valid_every": 4, "valid_folder": str(corpus), "valid_batches": 1}
    plain = tiny(corpus, ckpt=saving(tmp_path / "plain", 4))
    config = tiny(corpus, data=data, ema={}, ckpt=saving(tmp_path / "saves", 4, keep_best=True))
    expected = run_training(mesh, plain, tmp_path / "run 0")
    assert curve(run_training(mesh, config, tmp_path / "run 1")) == curve(expected)
    found = checkpoints(tmp_path / "saves")
    assert_equal(stored(found[4], "master"), stored(checkpoints(tmp_path / "plain")[4], "master"))
    events = [event for event in read_objects(tmp_path / "run 1" / "events.jsonl") if event["event"] == "evaluation"]
    assert [event["step"] for event in events] == [3, 7]
    run = build_run(config, mesh, tmp_path / "again", "auto")
    assert run.valid is not None
    for event in events:
        assert event["ema"].keys() == {"loss", "acc", "perplexity"} and event["ema"]["loss"] != event["loss"]
        model, _ = load_model(str(tmp_path / "saves" / str(event["step"] + 1)), mesh, weights="ema")
        for stage in run.trainer.stages.values():
            stage.load_state_dict(model.any_stage.state_dict())
        again = run.trainer.evaluate(run.valid)
        assert (again.cross_entropy, again.accuracy) == (event["ema"]["loss"], event["ema"]["acc"])
    run.checkpoints.close(wait=False)
