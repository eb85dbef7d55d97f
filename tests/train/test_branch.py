"""Cooldown branches equal an uninterrupted run of the same schedule, leave the trunk alone, begin where it's stable."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from internlm_lite.config.overrides import parse_overrides
from internlm_lite.config.schema import Config
from internlm_lite.errors import CheckpointError, ConfigError
from internlm_lite.mesh.mesh import single_process_mesh
from internlm_lite.optim.lr_schedule import learning_rate
from internlm_lite.train.branch import branch_overrides
from internlm_lite.train.changes import horizon_moved
from tests.corpus import write_corpus
from tests.train.runs import curve, run_training, tiny
from tests.train.test_run_folder import CONFIG, digests, runs_in, trained

TRUNK = {"kind": "wsd", "total_steps": 8, "decay_steps": 2, "warmup_steps": 2, "warmup_ratio": None, "eta_min": 1e-4}


def config_for(corpus: Path, saves: Path, **curve: Any) -> Config:
    """A run that saves every step, with a ramp of the batch and a skipped one."""
    values = tiny(
        corpus,
        ckpt={"enable_save_ckpt": True, "save_ckpt_folder": str(saves), "checkpoint_every": 1, "async_upload": False},
        data={"skip_batches": "2", "rampup_batch_size": "2 2 300 tokens"},
    ).model_dump()
    return Config.model_validate({**values, "lr_scheduler": {**TRUNK, **curve}})


def branched(config: Config, path: str, steps: int, **ckpt: Any) -> Config:
    """`config` with the keys of a branch, as the command line sets them."""
    values = config.model_dump()
    for section, keys in parse_overrides(branch_overrides(config, path, steps)).layer.values.items():
        values[section] = {**values[section], **keys}
    values["ckpt"] |= ckpt
    return Config.model_validate(values)


def weights(saves: Path, step: int) -> dict[str, torch.Tensor]:
    """All tensors of the checkpoint of `step`: master weights and moments."""
    (folder,) = (saves / "data").glob(f"{step:010d}*")
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.fixture(scope="module")
def trunk(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(corpus, save folder) of a trunk run with a checkpoint of every step."""
    folder = tmp_path_factory.mktemp("branch")
    corpus = write_corpus(folder / "corpus")
    run_training(single_process_mesh(), config_for(corpus, folder / "saves"), folder / "run")
    return corpus, folder / "saves"


@pytest.mark.parametrize(
    ("start", "steps", "shape"), [(2, 3, "linear"), (5, 4, "cosine"), (7, 2, "1-sqrt"), (4, 1, "exponential")]
)
def test_a_branch_equals_an_uninterrupted_run_of_its_schedule(
    trunk: tuple[Path, Path], tmp_path: Path, start: int, steps: int, shape: str
) -> None:
    corpus, saves = trunk
    config = config_for(corpus, saves, decay_shape=shape)
    before = digests(saves)
    branch = branched(config, f"{saves}/{start}", steps, keep=1)
    own = Path(str(branch.ckpt.save_ckpt_folder))
    assert own == saves.with_name(f"saves-branch-{start}-{steps}-{shape}")
    assert branch.lr_scheduler.total_steps == branch.data.total_steps == start + steps
    found = run_training(single_process_mesh(), branch, tmp_path / "branch")
    assert digests(saves) == before, "the trunk's checkpoints stay, whatever the branch keeps"
    alone = {"ckpt": config.ckpt.model_copy(update={"save_ckpt_folder": str(tmp_path / "whole")})}
    whole = run_training(single_process_mesh(), branch.model_copy(update=alone), tmp_path / "run")
    assert curve(found) == curve(whole)[start:] and len(found) == steps
    assert [step["num_consumed_tokens"] for step in found] == [step["num_consumed_tokens"] for step in whole[start:]]
    ours, theirs = weights(own, start + steps), weights(tmp_path / "whole", start + steps)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    shutil.rmtree(own)


def test_a_branch_goes_on_where_it_was_stopped(trunk: tuple[Path, Path], tmp_path: Path) -> None:
    corpus, saves = trunk
    config = config_for(corpus, saves)
    branch = branched(config, f"{saves}/3", 4)
    own = Path(str(branch.ckpt.save_ckpt_folder))
    whole = run_training(single_process_mesh(), branch, tmp_path / "whole")
    for step in (6, 7):  # as if it had been killed after step 5
        for path in own.rglob(f"{step:010d}*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    again = run_training(single_process_mesh(), branch, tmp_path / "again")
    assert curve(again) == curve(whole)[2:] and len(again) == 2
    shutil.rmtree(own)


@pytest.mark.parametrize(
    ("start", "keys", "message"),
    [
        (1, {}, "is in its warm-up, 1 of 2 steps; expected one of the stable phase of a run"),
        (8, {}, "is in its decay phase, which began with step 6; expected one of the stable phase"),
    ],
)
def test_a_branch_begins_in_the_stable_phase(
    trunk: tuple[Path, Path], start: int, keys: dict[str, Any], message: str
) -> None:
    corpus, saves = trunk
    with pytest.raises(ConfigError, match=message):
        branch_overrides(config_for(corpus, saves, **keys), f"{saves}/{start}", 3)


def test_borders_of_the_stable_phase(trunk: tuple[Path, Path]) -> None:
    """The first update of a decay is still at the peak, so that a checkpoint after it is one of the stable phase."""
    corpus, saves = trunk
    config = config_for(corpus, saves)
    assert [learning_rate(step, 1.0, config.lr_scheduler) for step in range(8)] == pytest.approx(
        [0.5, 1, 1, 1, 1, 1, 1, 0.50005]
    )
    for start in (2, 6, 7):
        curve = branched(config, f"{saves}/{start}", 3).lr_scheduler
        found = [learning_rate(step, 1.0, curve) for step in range(start + 3)]
        assert found == pytest.approx([0.5, *[1.0] * (start - 1), 1.0, 2 / 3 + 1e-4 / 3, 1 / 3 + 2e-4 / 3])


def test_what_is_no_place_to_branch_from(trunk: tuple[Path, Path], tmp_path: Path) -> None:
    corpus, saves = trunk
    config = config_for(corpus, saves)
    with pytest.raises(ConfigError, match=r"expected one checkpoint, not a folder of them; add its step: .*saves/100"):
        branch_overrides(config, str(saves), 3)
    with pytest.raises(CheckpointError, match="no checkpoint of step 77 in"):
        branch_overrides(config, f"{saves}/77", 3)
    other = config.model_copy(update={"adam": config.adam.model_copy(update={"lr": 0.02})})
    with pytest.raises(ConfigError, match=r"adam.lr is 0.02 now and was 0.01 then, so the rate would jump"):
        branch_overrides(other, f"{saves}/4", 3)
    cosine = config_for(corpus, tmp_path / "cosine", kind="cosine", decay_steps=None, total_steps=1)
    short = {"data": cosine.data.model_copy(update={"total_steps": 1})}
    curve = {"lr_scheduler": cosine.lr_scheduler.model_copy(update={"warmup_steps": 0})}
    run_training(single_process_mesh(), cosine.model_copy(update={**short, **curve}), tmp_path / "run")
    with pytest.raises(ConfigError, match=r'with lr_scheduler.kind "cosine", which has no stable phase; expected one'):
        branch_overrides(config, f"{tmp_path / 'cosine'}/1", 3)


def test_the_command_starts_a_branch_beside_its_trunk(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus")
    (tmp_path / "config.py").write_text(CONFIG)
    stable = ("lr_scheduler.kind=constant", "ckpt.checkpoint_every=2")
    assert trained(tmp_path, *stable).code == 0
    before = digests(tmp_path / "saves")
    command = (*stable, "--branch-from", "local:saves/2", "--decay-steps", "4", "lr_scheduler.decay_shape=1-sqrt")
    branch = trained(tmp_path, *command)
    assert branch.code == 0 and "WARNING" not in branch.output, branch.output
    assert "the rate falls in 4 steps; saved to local:saves-branch-2-4-1-sqrt" in branch.output
    assert digests(tmp_path / "saves") == before and len(runs_in(tmp_path)) == 2
    again = trained(tmp_path, *command)
    assert again.code == 0 and "nothing to do" in again.output and len(runs_in(tmp_path)) == 2, again.output
    wrong = {
        "--branch-from and --decay-steps belong together": ("--branch-from", "saves/2"),
        "--decay-steps 0: expected at least 1": ("--branch-from", "saves/2", "--decay-steps", "0"),
        "name two checkpoints to begin from": ("--branch-from", "saves/2", "--decay-steps", "2", "--resume", "4"),
        "no checkpoint of step 9 in saves": ("--branch-from", "saves/9", "--decay-steps", "2"),
        "in its decay phase": ("--branch-from", "saves-branch-2-4-1-sqrt/6", "--decay-steps", "2"),
    }
    for message, arguments in wrong.items():
        refused = trained(tmp_path, *stable, *arguments)
        assert refused.code and message in refused.output and "Traceback" not in refused.output, refused.output


def test_another_end_is_refused_unless_it_is_declared(tmp_path: Path) -> None:
    """A forgotten total_steps silently bends the rest of a cosine."""
    corpus, mesh = write_corpus(tmp_path / "corpus"), single_process_mesh()
    ckpt = {"enable_save_ckpt": True, "save_ckpt_folder": str(tmp_path / "saves"), "async_upload": False}
    run_training(mesh, tiny(corpus, ckpt=ckpt, data={"total_steps": 4}), tmp_path / "first")
    longer = {"total_steps": 16, "warmup_ratio": 0.25, "eta_min": 1e-4}
    shutil.copytree(tmp_path / "saves", tmp_path / "copy")  # the refused run of this process keeps its folder locked
    refused = {**ckpt, "save_ckpt_folder": str(tmp_path / "copy")}
    with pytest.raises(CheckpointError, match=r"(?s)total_steps 8 then, 16 now.*expected lr_scheduler.total_steps 8"):
        run_training(
            mesh, tiny(corpus, ckpt=refused, data={"total_steps": 6}, lr_scheduler=longer), tmp_path / "second"
        )
    declared = tiny(corpus, ckpt={**ckpt, "allow_changed_schedule": True}, lr_scheduler=longer)
    assert len(run_training(mesh, declared, tmp_path / "third")) == 4


@pytest.mark.parametrize(("done", "moved"), [(4, False), (6, False), (7, True)])
def test_more_steps_are_no_surprise_while_wsd_is_stable(tmp_path: Path, done: int, moved: bool) -> None:
    then, now = (config_for(tmp_path, tmp_path, total_steps=total) for total in (8, 12))
    assert horizon_moved(then, now, done) is moved
    rates = [[learning_rate(step, 1.0, one.lr_scheduler) for step in range(12)] for one in (then, now)]
    assert rates[0][:7] == rates[1][:7] and rates[1][7:] == [1.0, 1.0, 1.0, 1.0, pytest.approx(0.50005)]
