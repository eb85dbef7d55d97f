"""internlm-lite evaluate: the figures that the run had, in any layout, without writing anything but its own file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from internlm_lite.cli import evaluate
from internlm_lite.config.schema import Config
from internlm_lite.mesh.mesh import single_process_mesh
from internlm_lite.monitor.jsonl import read_objects
from tests import cli
from tests.evaluate.local_tasks import write_tasks
from tests.evaluate.made_run import config_for, write_data
from tests.ports import free_port
from tests.train.runs import run_training

CONFIGS = Path(__file__).parents[2] / "configs"
TASKS = ["cloze_word", "cloze_greedy", "local_choice", "local_until"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ckpts/, tasks/ and run/, the run that wrote the checkpoint: with averages, and split in training as
    no test below is."""
    folder = write_data(tmp_path_factory.mktemp("tool"))
    write_tasks(folder / "tasks")
    ckpt = {"enable_save_ckpt": True, "save_ckpt_folder": str(folder / "ckpts"), "async_upload": False}
    asked = {"tasks": TASKS, "include_path": str(folder / "tasks"), "limit": 5, "weights": "both"}
    config = config_for(
        folder,
        ckpt={**ckpt, "checkpoint_every": 2},
        evaluation=asked,
        ema={"decay": 0.5},
        adam={"adam_beta1": 0.8, "adam_eps": 1e-7},
        guard={"spike": "rollback"},
        data={"valid_every": 4, "valid_train_batches": 1},
    )
    run_training(single_process_mesh(), config, folder / "run")
    return folder


def logged(folder: Path) -> dict[str, Any]:
    (event,) = (one for one in read_objects(folder / "run" / "events.jsonl") if one["event"] == "evaluation")
    return event


def expected(event: dict[str, Any], weights: str) -> dict[str, float]:
    tasks = {
        name.removesuffix("@ema"): of for name, of in event["tasks"].items() if ("@ema" in name) == (weights == "ema")
    }
    own = event if weights == "model" else event["ema"]
    return {"loss": own["loss"], "acc": own["acc"], "bits_per_byte": own["bits_per_byte"], **flat(tasks)}


def flat(tasks: dict[str, dict[str, float]]) -> dict[str, float]:
    return {f"{task}/{metric}": value for task, of in tasks.items() for metric, value in of.items()}


def figures(path: Path, weights: str) -> dict[str, float]:
    found = json.loads(path.read_text())["weights"][weights]
    return {name: found[name] for name in ("loss", "acc", "bits_per_byte")} | flat(found["tasks"])


def test_a_checkpoint_has_the_figures_of_its_run(run: Path, tmp_path: Path) -> None:
    before = sorted(path for path in run.rglob("*") if path.is_file())
    command = ("--checkpoint", str(run / "ckpts"), "--device", "cpu", "--weights", "both", "--output", "out.json")
    ended = cli.run("tools/evaluate.py", *command, folder=tmp_path)
    assert ended.code == 0, ended.output
    for weights in ("model", "ema"):
        assert figures(tmp_path / "out.json", weights) == pytest.approx(expected(logged(run), weights), rel=1e-9)
    assert "weights ema: loss=" in ended.output and "cloze_word/acc=" in ended.output
    assert json.loads((tmp_path / "out.json").read_text())["step"] == 4
    assert sorted(path for path in run.rglob("*") if path.is_file()) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.json", "output.log"]


def test_a_checkpoint_of_a_stage_has_the_figures_of_its_run(run: Path, tmp_path: Path) -> None:
    """The rotary base of its stage and the lengths of all evaluations, whether its config or a file is taken."""
    saves = str(tmp_path / "ckpts")
    ckpt = {"enable_save_ckpt": True, "save_ckpt_folder": saves, "async_upload": False}
    values = config_for(run, ckpt=ckpt, data={"total_steps": 2, "valid_every": 2}, adam={"lr": 3e-2}).model_dump()
    stages = [{"until": 1}, {"rope_base": 50.0, "seq_len": 64}]
    config = Config.model_validate({**values, "stages": stages})
    run_training(single_process_mesh(), config, tmp_path / "run")
    given = json.loads(config.model_dump_json(exclude_defaults=True))
    (tmp_path / "config.py").write_text("\n".join(f"{key} = {value!r}" for key, value in given.items()))
    for number, more in enumerate(((), ("--config", "config.py"))):
        command = ("--checkpoint", saves, "--device", "cpu", "--output", f"{number}.json", *more)
        ended = cli.run("tools/evaluate.py", *command, folder=tmp_path)
        assert ended.code == 0, ended.output
        found = json.loads((tmp_path / f"{number}.json").read_text())["weights"]["model"]
        assert found["loss"] == pytest.approx(logged(tmp_path)["loss"], rel=1e-9), more


@pytest.mark.parametrize("layout", [(), ("parallel.tensor=2",), ("parallel.pipeline.size=2",)], ids=str)
def test_in_any_layout(layout: tuple[str, ...], run: Path, tmp_path: Path) -> None:
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    command = ("--checkpoint", str(run / "ckpts"), "--device", "cpu", "--output", "out.json", *layout)
    ranks = []
    for rank in range(2):
        log, own = tmp_path / f"rank-{rank}.log", {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        environment = {**address, **own}
        ranks.append((cli.start("tools/evaluate.py", *command, folder=tmp_path, log=log, environment=environment), log))
    ends = [cli.ended(*rank) for rank in ranks]
    assert [end.code for end in ends] == [0, 0], ends
    assert figures(tmp_path / "out.json", "model") == pytest.approx(expected(logged(run), "model"), rel=1e-8)


@pytest.mark.parametrize(
    ("step", "overrides", "expected_values"),
    [
        (2, [], (256, 2, 10_000)),
        (4, ["SEQ_LEN=128"], (128, 2, 5e4)),
        (4, ["data.seq_len=32", "model.rope_base=7"], (32, 2, 7)),
    ],
)
def test_a_config_with_stages_rotates_by_the_base_of_the_checkpoints_stage(
    step: int, overrides: list[str], expected_values: tuple[int, int, float], run: Path, tmp_path: Path
) -> None:
    """The stages are those of the file, rows those of all evaluations; the command line goes before them."""
    stages = "[dict(until=2), dict(seq_len=64, micro_bsz=1, rope_base=5e4)]"
    base = f"_base_ = {str(CONFIGS / 'tiny.py')!r}\nSEQ_LEN = 256\n"
    (tmp_path / "staged.py").write_text(f"{base}data = dict(seq_len=SEQ_LEN, micro_bsz=2)\nstages = {stages}\n")
    command = ["--config", str(tmp_path / "staged.py"), "--checkpoint", str(run / "ckpts" / str(step))]
    arguments = evaluate.parse_arguments([*command, "data.valid_folder=valid", *overrides])
    config = evaluate.loaded_config(arguments, 1).config
    assert (config.data.seq_len, config.data.micro_bsz, config.model.rope_base) == expected_values
    assert config.stages == []


ERRORS = [
    (("--tasks", "x", "--include-path", "no"), "ConfigError: evaluation.include_path: found no folder no, expected"),
    (("--tasks", "none", "data.valid_folder=None"), "ConfigError: found neither data.valid_folder nor tasks"),
    (("VALID=3",), "ConfigError: VALID=...: "),
    (("data.seq_lenn=3",), "nearest known key: data.seq_len"),
    (("--checkpoint", "missing"), "CheckpointError: "),
    (("--tasks", "none", "--output", "no/such/file"), "StorageError: --output no/such/file: No such file"),
]


@pytest.mark.parametrize(("more", "message"), ERRORS, ids=lambda value: str(value)[:30])
def test_what_is_wrong_is_one_line(more: tuple[str, ...], message: str, run: Path, tmp_path: Path) -> None:
    command = ("--checkpoint", str(run / "ckpts"), "--device", "cpu", *more)
    ended = cli.run("tools/evaluate.py", *command, folder=tmp_path)
    assert ended.code in (2, 6) and message in ended.output and "Traceback" not in ended.output, ended.output


def test_weights_that_are_not_there(tmp_path: Path) -> None:
    folder = write_data(tmp_path)
    ckpt = {"enable_save_ckpt": True, "save_ckpt_folder": str(folder / "ckpts"), "async_upload": False}
    run_training(single_process_mesh(), config_for(folder, ckpt=ckpt, data={"total_steps": 1}), folder / "run")
    command = ("--checkpoint", str(folder / "ckpts"), "--device", "cpu", "--weights", "ema")
    ended = cli.run("tools/evaluate.py", *command, folder=tmp_path)
    assert ended.code == 2 and "has no averaged weights" in ended.output and "Traceback" not in ended.output
    ended = cli.run("tools/evaluate.py", *command[:-1], "both", folder=tmp_path)
    assert ended.code == 2 and "has no averaged weights" in ended.output
    assert "weights model: loss=" not in ended.output  # said before the first evaluation
