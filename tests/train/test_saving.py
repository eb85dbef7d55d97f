"""Saves that are put off until the next update is about to start: the same checkpoints, and what waits for what."""

from __future__ import annotations

import ast
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import internlm_lite
from internlm_lite.checkpoint.format import catalog
from internlm_lite.checkpoint.save.staging import Staging
from internlm_lite.checkpoint.storage.local import LocalStorage
from internlm_lite.errors import NumericsError
from internlm_lite.mesh import comm
from internlm_lite.mesh.mesh import single_process_mesh
from internlm_lite.optim.zero import HybridZeroOptimizer
from internlm_lite.train.checkpoints import Checkpoints
from internlm_lite.train.control import Control, Decision
from internlm_lite.train.saving import Saving
from internlm_lite.train.train_state import TrainState
from tests.corpus import write_corpus
from tests.gpu_queue import Gpu, gpu
from tests.steps import read_metrics
from tests.train.runs import curve, run_training, tiny
from tests.train.test_loop import logged, spikes_at

__all__ = ["gpu"]


def put_off(patch: pytest.MonkeyPatch) -> None:
    """As on a GPU."""
    patch.setattr(Saving, "can_wait", lambda self: self._due is not None and not self._due.decision.final)


@pytest.fixture(autouse=True)
def quick_storage(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every save has ended before the next step, however busy the machine is."""
    monkeypatch.setattr(Checkpoints, "report_finished", Checkpoints._wait)


def config(folder: Path, **sections: Any) -> Any:
    ckpt = {"enable_save_ckpt": True, "save_ckpt_folder": f"local:{folder}/saves", "checkpoint_every": 2}
    return tiny(folder.parent / "corpus", ckpt=ckpt, monitor={"log_every": 3}, **sections)


def saved(folder: Path) -> dict[int, Any]:
    """Step -> everything in its checkpoint but names and times."""
    storage, found = LocalStorage(folder / "saves"), {}
    for name in catalog.committed(storage):
        manifest = catalog.inspect(storage, name).manifest
        state = {**manifest.state, "run_folder": "", "reporter": manifest.state["reporter"]["metrics"]}
        files = sorted((folder / "saves" / name.folder).glob("*.safetensors"))
        found[name.step] = (manifest.kind, state, [file.read_bytes() for file in files])
    return found


def test_a_save_that_is_put_off_has_the_bits_of_its_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_corpus(tmp_path / "corpus")
    checkpoints, curves = [], []
    for name in ("at once", "put off"):
        folder = tmp_path / name
        curves.append(curve(run_training(single_process_mesh(), config(folder), folder / "run")))
        checkpoints.append(saved(folder))
        put_off(monkeypatch)
    assert sorted(checkpoints[0]) == [2, 4, 6, 8]
    assert checkpoints[0] == checkpoints[1] and curves[0] == curves[1]


@pytest.mark.parametrize("as_on_gpu", [False, True])
def test_a_skipped_update_defers_the_save(as_on_gpu: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_corpus(tmp_path / "corpus")
    spikes_at(3, monkeypatch)
    if as_on_gpu:
        put_off(monkeypatch)
    folder = tmp_path / "run"
    run_training(single_process_mesh(), config(folder, guard={"spike": "skip"}), folder)
    assert logged(folder, "checkpoint") == [("checkpoint", step) for step in (2, 5, 6, 8)]
    assert [e for e in logged(folder, "checkpoint", "spike") if e[0] == "spike"] == [("spike", 3)]


def test_a_rollback_after_a_step_whose_save_is_put_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_corpus(tmp_path / "corpus")
    spikes_at(3, monkeypatch)
    put_off(monkeypatch)
    folder = tmp_path / "run"
    run_training(single_process_mesh(), config(folder, guard={"spike": "rollback"}), folder)
    expected = [("checkpoint", 2), ("rollback", 3), ("checkpoint", 4), ("checkpoint", 6), ("checkpoint", 8)]
    assert logged(folder, "checkpoint", "rollback") == expected


def test_a_ruined_state_is_not_committed_and_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_corpus(tmp_path / "corpus")
    put_off(monkeypatch)
    begin = HybridZeroOptimizer.begin

    def ruin(self: HybridZeroOptimizer, micro_num: int) -> None:
        begin(self, micro_num)
        if self._skips.good_steps == 4:  # the save of these four steps is put off
            next(self.shards())[1]["exp_avg"][0] = torch.nan

    monkeypatch.setattr(HybridZeroOptimizer, "begin", ruin)
    folder = tmp_path / "run"
    with pytest.raises(
        NumericsError, match=r"step 3: exp_avg of \S+ holds NaN or infinity, so nothing is saved"
    ) as info:
        run_training(single_process_mesh(), config(folder), folder)
    assert info.value.exit_code == 7
    assert list(saved(folder)) == [2]
    assert [line["step"] for line in read_metrics(folder / "metrics.jsonl")] == [2], "no line is due since"


class FakeRun:
    """Enough of a run for `Saving`: the master weights of a simulated GPU, whose `checkpoints` copy them."""

    def __init__(self, gpu: Gpu) -> None:
        self.master = gpu.tensor(0.0)
        self.staging = Staging(None, torch.device("cuda"))
        self.mesh = SimpleNamespace(device=torch.device("cuda"), world=single_process_mesh().world)
        self.config = SimpleNamespace(ckpt=SimpleNamespace(async_upload=True))
        self.watchdog = SimpleNamespace(inside=lambda phase: nullcontext())
        self.trainer = SimpleNamespace(optimizer=SimpleNamespace(problem=self._problem))
        self.checkpoints = SimpleNamespace(
            contents=SimpleNamespace(moment=lambda state: SimpleNamespace(state=state)),
            manager=self.staging,
            save=self._save,
        )
        self.copies: list[torch.Tensor] = []

    def _problem(self) -> str | None:
        return None if comm.read(self.master.clone()) else "never"

    def _save(self, moment: Any, kind: str, *, blocking: bool) -> None:
        assert not blocking
        self.copies += self.staging.copy([self.master]) or ()


def test_the_device_has_work_while_the_host_saves(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Staging, "_lock", lambda self: None)
    run: Any = FakeRun(gpu)
    outcome: Any = SimpleNamespace(skips=SimpleNamespace(consecutive_skips=gpu.tensor(0.0).sum()))
    control: Any = SimpleNamespace(
        decision=Decision(save="snapshot"), defer_if_skipped=partial(Control.defer_if_skipped, None)
    )
    saving = Saving(run, control)
    for step in (1, 2, 3):
        gpu.launch(f"forward {step}")
        saving.before_update()
        if step == 2:
            assert gpu.ran == ["forward 1", "update 1"], "the host waits for the step that is saved, and no further"
        gpu.launch(f"update {step}", partial(run.master.fill_, step))
        if step == 1:
            saving.note(TrainState(step=step), outcome)
            assert saving.can_wait()
    gpu.main.synchronize()
    assert gpu.ran == ["forward 1", "update 1", "forward 2", "copy", "update 2", "forward 3", "update 3"]
    assert run.copies[0].tolist() == [1.0] and len(gpu.streams) == 2


def test_streams_are_made_once() -> None:
    """Memory of a stream that is made for each use is stranded: a large block returns only to its own stream."""
    makers = []
    texts = [file.read_text(encoding="utf-8") for file in Path(internlm_lite.__file__).parent.rglob("*.py")]
    for text in texts:
        for function in ast.walk(ast.parse(text)) if ".Stream(" in text else ():
            calls = ast.walk(function) if isinstance(function, ast.FunctionDef) else ()
            makers += [function.name for call in calls if isinstance(call, ast.Call) and _is_stream(call.func)]  # type: ignore[attr-defined]
    assert makers and set(makers) == {"__init__"}


def _is_stream(name: ast.expr) -> bool:
    return isinstance(name, ast.Attribute) and name.attr == "Stream"
