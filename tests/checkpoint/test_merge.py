"""`ckpt merge`: the average of checkpoints of any layouts, exact, in bounded memory, read like any other checkpoint."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch

from internlm_lite.apps.convert.to_hf import MasterRows, open_checkpoint
from internlm_lite.checkpoint.admin.merge import weights_of
from internlm_lite.checkpoint.format.catalog import committed, inspect
from internlm_lite.checkpoint.manager import CheckpointManager
from internlm_lite.checkpoint.save import write_alone
from internlm_lite.checkpoint.storage.local import LocalStorage
from internlm_lite.cli import ckpt
from internlm_lite.config.render_config import resolved
from internlm_lite.config.schema import Config
from internlm_lite.errors import ConfigError
from internlm_lite.generate.load_model import load_model
from internlm_lite.mesh.layout import LocalShard
from internlm_lite.mesh.mesh import single_process_mesh
from internlm_lite.train.build import build_run
from tests.checkpoint.pieces import pieces_of
from tests.cli import ROOT
from tests.corpus import write_corpus
from tests.train.layouts import Layout, config_of
from tests.train.test_reshard import SAVED, run_all

Tensors = dict[str, torch.Tensor]


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    code = ckpt.main(["merge", *(str(argument) for argument in arguments)])
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return code, captured.out + captured.err


def masters(folder: Path) -> Tensors:
    rows = MasterRows(open_checkpoint(str(folder))[0])
    return {name: rows.read(name, 0, shape[0] if shape else 1).clone() for name, shape in rows.shapes.items()}


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.int32 if tensor.dtype == torch.float32 else torch.int64)


def assert_same_bits(found: Tensors, expected: Tensors) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(bits(found[name]), bits(tensor)), name


def averaged(tensors: Sequence[torch.Tensor], weights: Sequence[int]) -> torch.Tensor:
    """The exact average, rounded once to fp32."""
    columns = zip(*(tensor.flatten().tolist() for tensor in tensors), strict=True)
    exact = [sum(Fraction(x) * w for x, w in zip(column, weights, strict=True)) / sum(weights) for column in columns]
    return torch.tensor([float(number) for number in exact], dtype=torch.float64).float().view(tensors[0].shape)


LAYOUTS = {
    "zero": Layout(dp=2, bucket=1500, tied=True),
    "tp": Layout(tp=2, sp=True, tied=True, split_hidden=False),
    "pp": Layout(pp=2, tied=True),
    "one": Layout(tied=True),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of one tied model, saved after SAVED and 5 steps by four layouts; the weights of each seed differ."""
    folder = tmp_path_factory.mktemp("merge")
    corpus = write_corpus(folder / "corpus")
    jobs = []
    for seed, (name, layout) in enumerate(LAYOUTS.items()):
        saves: dict[str, Any] = {"enable_save_ckpt": True, "checkpoint_every": SAVED, "async_upload": False}
        saves["save_ckpt_folder"] = str(folder / name)
        config = config_of(layout, corpus, "torch.float32", ckpt=saves, ema={"decay": 0.5, "warmup": False})
        jobs.append((layout, config.model_copy(update={"seed": seed})))
    run_all(jobs, folder / "runs")
    return folder


@pytest.mark.parametrize(
    ("options", "weights"),
    [((), (1, 1, 1)), (("--method", "linear"), (1, 2, 3)), (("--weights", "3,-1,2"), (3, -1, 2))],
)
def test_it_is_the_average_of_what_any_layouts_saved(
    options: Sequence[str], weights: Sequence[int], runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A tied weight, which two pipeline ranks hold, is averaged once; moments are not there."""
    sources = [runs / "zero", runs / "tp" / str(SAVED), runs / "pp"]
    code, text = run(capsys, tmp_path / "out", *sources, *options)
    assert code == 0 and "load_model_only_folder" in text
    have = [masters(source) for source in sources]
    merged = masters(tmp_path / "out")
    assert_same_bits(merged, {name: averaged([one[name] for one in have], weights) for name in have[0]})
    manifest = open_checkpoint(str(tmp_path / "out"))[0].manifest
    assert (set(manifest.tensors), manifest.step, manifest.kind) == ({"master"}, 5, "final")
    facts = manifest.state["merged"]
    assert [one["step"] for one in facts["checkpoints"]] == [5, SAVED, 5]
    assert [one["weight"] for one in facts["checkpoints"]] == list(weights)
    assert [one["name"] for one in facts["checkpoints"]] == [open_checkpoint(str(one))[0].name for one in sources]
    assert (facts["of"], facts["method"]) == ("model", {1: "mean", 2: "linear", -1: "weights"}[weights[1]])


def test_a_checkpoint_averaged_with_itself_stays_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """To the bit, also -0 and numbers next to the largest, in fp32 and fp64, by any weights."""
    config = config_of(Layout(), None)
    for dtype in (torch.float32, torch.float64):
        largest = torch.finfo(dtype).max
        pieces = [
            replace(piece, tensor=piece.tensor.to(dtype) * 0.1) for piece in pieces_of(0, roles=["master"], fill=True)
        ]
        pieces[0].tensor.view(-1)[:4] = torch.tensor(
            [-0.0, largest, -largest, torch.finfo(dtype).tiny / 8], dtype=dtype
        )
        saves, out = tmp_path / f"{dtype}", tmp_path / f"{dtype} out"
        CheckpointManager(str(saves), single_process_mesh(), config=resolved(config)).save(1, "final", pieces, {})
        assert run(capsys, out, saves, saves, saves, "--weights", "0.3,0.1,7")[0] == 0
        for found, expected in zip(*(stored_pieces(folder, dtype) for folder in (out, saves)), strict=True):
            assert torch.equal(bits(found), bits(expected))


def stored_pieces(folder: Path, dtype: torch.dtype) -> list[torch.Tensor]:
    pieces = [replace(piece, tensor=piece.tensor.to(dtype)) for piece in pieces_of(0, roles=["master"], fill=False)]
    manager = CheckpointManager(str(folder), single_process_mesh(), saving=None)
    storage = LocalStorage(folder)
    pieces = [replace(piece, largest=float("inf")) for piece in pieces]
    manager.load(inspect(storage, committed(storage)[0]), pieces)
    return [piece.tensor.view(-1) for piece in pieces]


def test_averages_of_averages(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _ = run(capsys, tmp_path / "out", runs / "zero", runs / "tp", "--weights", "ema", "--weights", "1,3")
    assert code == 0
    mesh = single_process_mesh()
    have = [load_model(str(runs / name), mesh, weights="ema")[0].any_stage.state_dict() for name in ("zero", "tp")]
    found = load_model(str(tmp_path / "out"), mesh)[0].any_stage.state_dict()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, averaged([one[name] for one in have], (1, 3)), rtol=0, atol=0)
    assert open_checkpoint(str(tmp_path / "out"))[0].manifest.state["merged"]["of"] == "ema"


def test_a_run_starts_from_it_and_does_not_resume_it(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run(capsys, out, runs / "pp", runs / "one")[0] == 0

    def started(**keys: Any) -> Tensors:
        config = config_of(LAYOUTS["one"], runs / "corpus", "torch.float32", ckpt=keys)
        begun = build_run(config, single_process_mesh(), tmp_path, "auto")
        begun.checkpoints.close(wait=False)
        pieces = begun.trainer.optimizer.pieces()
        return {piece.name: piece.tensor.view(piece.shape) for piece in pieces if piece.role == "master"}

    assert_same_bits(started(load_model_only_folder=str(out)), masters(out))
    with pytest.raises(Exception, match=r"holds weights alone, no training state.*load_model_only_folder"):
        started(load_ckpt_folder=str(out))


def saved(folder: Path, config: Config, **changes: torch.Tensor | None) -> Path:
    """A checkpoint with some tensors replaced, or left out."""
    pieces = []
    for piece in pieces_of(0, roles=["master"], fill=True):
        tensor = changes.get(piece.name.replace(".", "_"), piece.tensor)
        if tensor is not None:
            box = tuple((0, n) for n in tensor.shape)
            pieces.append(LocalShard(piece.name, piece.role, tuple(tensor.shape), box, None, tensor))
    CheckpointManager(str(folder), single_process_mesh(), config=resolved(config)).save(1, "final", pieces, {})
    return folder


def test_wrong_checkpoints_and_weights_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = config_of(Layout(), None)
    good = saved(tmp_path / "good", config)
    other = config.model_copy(update={"model": config.model.model_copy(update={"rope_base": 5e5})})
    damaged = saved(tmp_path / "damaged", config)
    (payload,) = damaged.glob("data/*/rank-00000.safetensors")
    payload.write_bytes(payload.read_bytes()[:-1] + b"\xff")
    rows: list[tuple[list[object], str]] = [
        ([good, saved(tmp_path / "shape", config, norm_weight=torch.ones(8))], "norm.weight: [8] here, [7] there"),
        ([good, saved(tmp_path / "names", config, norm_weight=None)], "norm.weight: nothing here, [7] there"),
        ([good, saved(tmp_path / "base", other)], "model.rope_base: checkpoint 10000.0, this run 500000.0"),
        ([saved(tmp_path / "int", config, norm_weight=torch.ones(7, dtype=torch.int32))], "I32, expected floating"),
        ([good, damaged], "damaged in bytes 0.."),
        ([good, good, "--weights", "1"], "found 1 numbers for 2 checkpoints, expected one for each"),
        ([good, good, "--weights", "1,-1"], "--weights 1,-1: expected finite numbers whose sum is not 0"),
        ([good, good, "--weights", "1,inf"], "expected finite numbers"),
        ([good, good, "--weights", "1e308,1e308"], "expected finite numbers"),
        ([good, good, "--weights", "1,2", "--weights", "2,1"], "--weights 2,1: found numbers twice, expected them"),
        ([good, good, "--weights", "old"], "--weights 'old': expected numbers separated by commas"),
        ([good, "--weights", "ema"], "has no averaged weights (role ema), it has master: expected one of a run with"),
        ([saved(tmp_path / "nan", config, norm_weight=torch.full((7,), torch.nan))], "norm.weight: the average has"),
        ([tmp_path / "nothing"], "holds no checkpoint; expected a save folder"),
        ([f"{good}/7"], "no checkpoint of step 7"),
    ]  # fmt: skip
    for arguments, message in rows:
        code, text = run(capsys, tmp_path / "out", *arguments)
        assert code == 2 and message in text, (arguments, text)
        assert not committed(LocalStorage(tmp_path / "out")) and not list(tmp_path.glob("out/data/*"))
    code, text = run(capsys, good, good)
    assert code == 2 and "holds checkpoints already: choose a folder without any" in text
    code, text = run(capsys, good / "1", good)  # without OUT, so that the first checkpoint is in its place
    assert code == 2 and "found checkpoint 0000000001-00001" in text and not (good / "1").exists(), text


def test_an_end_before_the_commit_leaves_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Interrupted, it removes what it wrote; killed, it leaves files that no reader takes for a checkpoint."""
    good = saved(tmp_path / "good", config_of(Layout(), None))

    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(write_alone.commit, "commit_votes", interrupt)
        assert run(capsys, tmp_path / "out", good, good)[0] == 130
        assert not list(tmp_path.glob("out/data/*"))
        patch.setattr(write_alone.catalog, "remove", interrupt)  # as if the process were gone
        assert run(capsys, tmp_path / "out", good, good)[0] == 130
    assert list(tmp_path.glob("out/data/*"))
    assert ckpt.main(["ls", str(tmp_path / "out")]) == 2
    assert run(capsys, tmp_path / "out", good, good)[0] == 0
    assert ckpt.main(["verify", str(tmp_path / "out")]) == 0


def test_weights_by_method() -> None:
    assert weights_of(4, "mean") == [1] * 4
    assert weights_of(4, "linear") == [1, 2, 3, 4]
    assert weights_of(2, "mean", [3, 1]) == [3, 1]
    with pytest.raises(ConfigError, match="found 3 numbers for 2"):
        weights_of(2, "mean", [1, 1, 1])


MEASURE = """
import sys
from pathlib import Path
import torch
from internlm_lite.checkpoint.manager import CheckpointManager
from internlm_lite.cli import ckpt
from internlm_lite.mesh.layout import LocalShard
from internlm_lite.mesh.mesh import single_process_mesh

def save(folder, rows):
    shape = (rows, 4096)
    piece = LocalShard("big", "master", shape, tuple((0, n) for n in shape), None, torch.ones(shape))
    CheckpointManager(folder, single_process_mesh(), config={}).save(1, "final", [piece], {})

def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))

folder = sys.argv[1]
save(folder + "/small", 1100)
save(folder + "/large", 8000)
assert ckpt.main(["merge", folder + "/first", *[folder + "/small"] * 4]) == 0
before = status("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
assert ckpt.main(["merge", folder + "/out", *[folder + "/large"] * 4]) == 0
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measures with Linux's /proc")
def test_memory_does_not_grow_with_the_model(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Four checkpoints of 131 MB: less than half of one is held."""
    folder = tmp_path_factory.mktemp("merge-memory")
    command = [sys.executable, "-c", MEASURE, str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) < 60 * 2**20
