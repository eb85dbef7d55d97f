"""Resuming a run with another update rule: refused, or on request, with one line about what starts at zero."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from internlm_lite.errors import CheckpointError
from internlm_lite.faults.signals import StopSignals
from internlm_lite.mesh.mesh import Mesh, single_process_mesh
from internlm_lite.optim.rule_change import rule_change
from internlm_lite.train.build import Run, build_run
from internlm_lite.train.loop import train
from tests.corpus import write_corpus
from tests.train.runs import run_training, tiny
from tests.world import run_world


def config_for(corpus: Path, saves: Path, optimizer: dict[str, Any], **ckpt: Any) -> Any:
    folders = {"enable_save_ckpt": True, "save_ckpt_folder": str(saves), "checkpoint_every": 4, "async_upload": False}
    return tiny(corpus, optimizer=optimizer, ckpt={**folders, **ckpt}, data={"train_folder": str(corpus)})


def restored(mesh: Mesh, config: Any, folder: Path, resume: str = "4") -> Run:
    """A run as it is before its first step; it saves nothing."""
    config = config.model_copy(update={"ckpt": config.ckpt.model_copy(update={"enable_save_ckpt": False})})
    folder.mkdir(parents=True, exist_ok=True)
    run = build_run(config, mesh, folder, resume)
    run.checkpoints.close(wait=True)
    return run


def state_of(run: Run) -> dict[tuple[str, str], torch.Tensor]:
    return {(piece.role, piece.name): piece.tensor.clone() for piece in run.trainer.optimizer.pieces()}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


ADAMW, LION, SGD, MUON = {"name": "adamw"}, {"name": "lion"}, {"name": "sgd", "momentum": 0.9}, {"name": "muon"}


@pytest.mark.parametrize(
    ("then", "now", "kept", "zero", "words"),
    [
        (ADAMW, LION, ["exp_avg"], [], "exp_avg of 21 tensors kept; nothing at zero; exp_avg_sq dropped"),
        (
            ADAMW,
            {"name": "adamw_cs336"},
            ["exp_avg", "exp_avg_sq"],
            [],
            "exp_avg_sq of 21 tensors kept; nothing at ze",
        ),
        (
            ADAMW,
            MUON,
            ["exp_avg", "exp_avg_sq"],
            [],
            "exp_avg of 21 tensors, exp_avg_sq of 11 tensors kept; nothing at zero",
        ),
        (MUON, ADAMW, [], ["exp_avg", "exp_avg_sq"], "exp_avg of 21 tensors, exp_avg_sq of 21 tensors at zero"),
        (LION, ADAMW, [], ["exp_avg", "exp_avg_sq"], "exp_avg of 21 tensors, exp_avg_sq of 21 tensors at zero"),
        (LION, SGD, [], ["momentum"], "momentum of 21 tensors at zero; exp_avg dropped"),
        ({"name": "sgd"}, SGD, [], ["momentum"], "'sgd' then, 'sgd' now: momentum of 21 tensors at zero"),
        (ADAMW, {"name": "sgd"}, [], [], "nothing at zero; exp_avg, exp_avg_sq dropped"),
    ],
)
def test_another_rule_is_refused_and_taken_on_request(
    then: dict[str, Any],
    now: dict[str, Any],
    kept: list[str],
    zero: list[str],
    words: str,
    corpus: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """What has the same meaning is kept to the bit. AdamW without its second moment starts both again, with its count:
    one count could not correct the bias of an old and a new average."""
    mesh = single_process_mesh()
    values = config_for(corpus, tmp_path / "saves", then)
    run_training(mesh, values, tmp_path / "first")
    before = state_of(restored(mesh, config_for(corpus, tmp_path / "saves", then), tmp_path / "again"))
    for options, resume in (({}, "4"), ({}, "auto")):
        with pytest.raises(CheckpointError, match=r"state of another update rule: .*allow_changed_optimizer=True"):
            restored(mesh, config_for(corpus, tmp_path / "saves", now, **options), tmp_path / "refused", resume)
    allowed = config_for(corpus, tmp_path / "saves", now, allow_changed_optimizer=True)
    caplog.clear()
    run = restored(mesh, allowed, tmp_path / "second")
    (line,) = [record.message for record in caplog.records if "another update rule" in record.message]
    assert words in line, line
    after = state_of(run)
    for (role, name), tensor in after.items():
        if role in ("master", *kept):
            assert torch.equal(tensor, before[role, name]), (role, name)
        else:
            assert role in zero and not tensor.any()
    counters = run.trainer.optimizer.state_dict()
    assert counters["good_steps"] == 4
    assert counters.get("adam_steps") == {"adamw": 0, "adamw_cs336": 4, "muon": 4}.get(now["name"])
    train(run, StopSignals())
    assert run.trainer.optimizer.problem() is None


def test_all_state_starts_at_zero_without_load_optimizer(
    corpus: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    mesh = single_process_mesh()
    run_training(mesh, config_for(corpus, tmp_path / "saves", ADAMW), tmp_path / "first")
    (commit,) = (tmp_path / "saves" / "commits").glob(f"{4:010d}-*.json")
    asked = {"load_ckpt_folder": str(commit), "load_optimizer": False, "enable_save_ckpt": False}
    run = restored(mesh, config_for(corpus, tmp_path / "other", LION, **asked), tmp_path / "second", "none")
    assert all(not tensor.any() for (role, _), tensor in state_of(run).items() if role != "master")
    assert [r.message for r in caplog.records if "starts at zero" in r.message] == [
        "the state of lion starts at zero: ckpt.load_optimizer=False"
    ]


def _saved(mesh: Mesh, corpus: Path, folder: Path, optimizer: dict[str, Any]) -> None:
    run_training(mesh, config_for(corpus, folder / "saves", optimizer), folder / "first")


def _loaded(mesh: Mesh, corpus: Path, folder: Path, optimizer: dict[str, Any]) -> dict[Any, Any]:
    run = restored(mesh, config_for(corpus, folder / "saves", optimizer), folder / f"resumed-{mesh.world.size}")
    pieces = run.trainer.optimizer.pieces()
    return {(p.role, p.name, p.flat_range): p.tensor.clone() for p in pieces}


@pytest.mark.parametrize("optimizer", [LION, SGD, {"name": "sgd"}], ids=["lion", "sgd with momentum", "sgd"])
def test_rules_without_a_second_moment_move_between_layouts(
    optimizer: dict[str, Any], corpus: Path, tmp_path: Path
) -> None:
    """Shards of two ranks, and the whole on one: what is stored is what a rule has, no more."""
    run_world(_saved, 2, (corpus, tmp_path, optimizer))
    halves: dict[tuple[str, str], list[tuple[int, torch.Tensor]]] = {}
    for rank in run_world(_loaded, 2, (corpus, tmp_path, optimizer)):
        for (role, name, span), tensor in rank.items():
            halves.setdefault((role, name), []).append((span[0], tensor))
    whole = _loaded(single_process_mesh(), corpus, tmp_path, optimizer)
    state = {"exp_avg"} if optimizer is LION else {"momentum"} if optimizer is SGD else set()
    roles = {"master"} | state
    assert {role for role, _, _ in whole} == roles
    for (role, name, _), tensor in whole.items():
        parts = [part for _, part in sorted(halves[role, name], key=lambda one: one[0])]
        assert tensor.dtype == torch.float64 and torch.equal(torch.cat(parts), tensor)


def test_state_of_some_tensors_is_enough_for_rules_that_do_not_count() -> None:
    """From a rule for matrices to one for all: AdamW needs both moments of all of them, others take what there is."""
    stored = {"master": ["a", "b"], "exp_avg": ["a", "b"], "exp_avg_sq": ["b"]}
    to_adamw = rule_change("muon", "adamw", {"master": "ab", "exp_avg": "ab", "exp_avg_sq": "ab"}, stored)
    assert to_adamw and to_adamw.left == {(role, name) for role in ("exp_avg", "exp_avg_sq") for name in "ab"}
    back = rule_change("adamw", "muon", {"master": "ab", "exp_avg": "ab", "exp_avg_sq": "b"}, stored)
    assert back and not back.left
    assert rule_change(None, "lion", {"master": "ab", "exp_avg": "ab"}, stored) is None
    assert rule_change("lion", "lion", {"master": "abc", "exp_avg": "abc"}, stored) is None, (
        "another model: said elsewhere"
    )
