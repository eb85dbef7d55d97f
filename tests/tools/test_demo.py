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


def test_no_training_is_removed_unasked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every arguments have a training of their own, which is found again."""
    commands: list[tuple] = []

    def run_command(*command: str | Path) -> None:
        commands.append(command)
        (saves := Path(str(command[-2]).partition("=local:")[2])).mkdir(parents=True, exist_ok=True)
        with (saves / "steps").open("a") as file:
            file.write(f"{command[-1]}\n")

    monkeypatch.setattr(demo, "run_command", run_command)
    monkeypatch.setattr(demo, "make_text", lambda folder: None)
    monkeypatch.setattr(demo, "make_tokens", lambda folder, vocab_size: None)
    monkeypatch.setattr(demo, "report", lambda *_: None)
    for line in ("STEPS=5", "STEPS=6", "STEPS=5", "STEPS=6 --fresh", "STEPS=7"):
        assert demo.main(["--folder", str(tmp_path), *line.split()]) == 0
    assert [command[-1] for command in commands] == ["STEPS=5", "STEPS=6", "STEPS=6", "STEPS=7"], "the third is done"
    homes = {home: (tmp_path / home / "ckpts" / "steps").read_text() for home in ("", "training-2", "training-3")}
    assert homes == {"": "STEPS=5\n", "training-2": "STEPS=6\n", "training-3": "STEPS=7\n"}
    (tmp_path / "trained.key").unlink()
    assert demo.main(["--folder", str(tmp_path), "STEPS=5"]) == 0
    assert (tmp_path / "ckpts" / "steps").read_text() == "STEPS=5\n" * 2, "an interrupted training goes on"
    assert commands[1][3:5] == ("--run-dir", tmp_path / "training-2" / "RUN")
    assert commands[1][5] == f"DEMO_FOLDER={tmp_path}"


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
