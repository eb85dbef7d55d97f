"""The demo's stages: skipped while nothing they depend on has changed."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from internlm_lite.cli import demo
from internlm_lite.config.load import load_config


def test_a_stage_is_current_until_what_it_depends_on_changes(tmp_path: Path) -> None:
    text = demo.Stage(tmp_path, "text", ["source"], 10)
    tokens = demo.Stage(tmp_path, "tokens", text.key, 4096)
    assert not text.is_current and not tokens.is_current
    text.record()
    tokens.record()
    assert text.is_current and tokens.is_current
    assert not demo.Stage(tmp_path, "text", ["changed"], 10).is_current
    changed = demo.Stage(tmp_path, "text", ["source"], 11)
    assert not demo.Stage(tmp_path, "tokens", changed.key, 4096).is_current


def test_checkpoints_of_another_corpus_or_model_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[tuple] = []
    monkeypatch.setattr(demo, "run_command", lambda *command: commands.append(command))
    (tmp_path / "ckpts").mkdir()
    demo.train(tmp_path, ["STEPS=5"], demo.Stage(tmp_path, "training", "a"))
    assert not (tmp_path / "ckpts").exists()
    (tmp_path / "ckpts").mkdir()
    demo.train(tmp_path, ["STEPS=5"], demo.Stage(tmp_path, "training", "a"))
    assert (tmp_path / "ckpts").exists(), "an interrupted training goes on from them"
    assert commands[0] == commands[1]
    assert commands[0][-2:] == (f"DEMO_FOLDER={tmp_path}", "STEPS=5")


def test_ctrl_c_leaves_the_training_time_to_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Popen(subprocess.Popen):
        """The first one who waits for it hears Ctrl-C."""

        heard = False

        def wait(self, timeout: float | None = None) -> int:
            if not self.heard:
                self.heard = True
                raise KeyboardInterrupt
            return super().wait(timeout)

    monkeypatch.setattr(subprocess, "Popen", Popen)
    with pytest.raises(KeyboardInterrupt):
        demo.run_command("init", tmp_path / "saved")
    assert (tmp_path / "saved" / "train.py").exists()


def test_a_stage_that_fails_ends_the_demo_with_its_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for ending, code in (("exit 6", 6), ("kill -9 $$", 1)):
        python = tmp_path / "python"
        python.write_text(f"#!/bin/sh\n{ending}\n")
        python.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(python))
        with pytest.raises(SystemExit) as ended:
            demo.run_command("train")
        assert ended.value.code == code


def test_the_report_says_how_far_the_loss_fell(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_folder = tmp_path / "RUN" / "demo" / "latest"
    run_folder.mkdir(parents=True)
    losses = [math.log(4096), 6.0, 4.0]
    lines = [json.dumps({"seg": 0, "step": step, "loss": loss}) for step, loss in enumerate(losses)]
    (run_folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (run_folder / "samples.jsonl").write_text(json.dumps({"step": 4, "prompt": "def f(", "text": "self):"}) + "\n")
    demo.report(tmp_path, 4096)
    printed = capsys.readouterr().out
    assert "def f(self):" in printed
    assert "training loss: 8.318 at the first step, 6.106 over the last 20, which is 73% of guessing evenly" in printed
    assert str(run_folder) in printed


def test_the_config_loads_and_fits_two_ranks() -> None:
    one = load_config(demo.CONFIG).config
    two = load_config(demo.CONFIG, ["MICRO_NUM=4"]).config
    assert one.data.micro_num == 2 * two.data.micro_num
    assert one.model.vocab_size % 128 == 0
    assert one.lr_scheduler.total_steps == one.data.total_steps
