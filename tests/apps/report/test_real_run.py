"""What training writes is what the page shows."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from internlm_lite.apps.report.writer import ReportWriter
from internlm_lite.mesh.mesh import single_process_mesh
from tests.corpus import write_corpus
from tests.train.runs import STEPS, run_training, tiny


def test_a_trained_run_is_shown_as_it_was(tmp_path: Path) -> None:
    corpus, folder = write_corpus(tmp_path / "corpus"), tmp_path / "job" / "run"
    ckpt = {"enable_save_ckpt": True, "save_ckpt_folder": f"local:{tmp_path / 'saves'}", "checkpoint_every": 4}
    folder.mkdir(parents=True)
    writer = ReportWriter(folder, every_seconds=0.05)
    lines = run_training(single_process_mesh(), tiny(corpus, ckpt=ckpt), folder)
    writer.close()

    data = re.search(r'id="payload">(.*?)</script>', (folder / "report.html").read_text("utf-8"), re.DOTALL)
    assert data is not None
    (run,) = json.loads(data[1])["runs"]
    assert (run["name"], run["state"]["phase"], run["state"]["step"]) == ("job/run", "done", STEPS)
    assert run["series"]["step"] == [line["step"] for line in lines]
    assert run["series"]["loss"] == pytest.approx([line["loss"] for line in lines], rel=1e-6)
    assert run["series"]["num_consumed_tokens"] == [line["num_consumed_tokens"] for line in lines]
    for row in run["folders"]:
        figures = [line["folders"].get(row["name"], [0, None, 0.0]) for line in lines]
        assert row["tokens"] == sum(tokens for tokens, _, _ in figures)
        assert row["first_loss"] == next(loss for tokens, loss, _ in figures if tokens)
        assert run["series"]["folders"][row["name"]]["tokens"] == [tokens or None for tokens, _, _ in figures]
    assert len(run["folders"]) > 1
    assert sum(row["share"] for row in run["folders"]) == pytest.approx(1)
    assert run["state"]["last_checkpoint"]["step"] == STEPS
    assert [save["failed"] for save in run["checkpoints"]] == [None] * len(run["checkpoints"])
    assert (run["restarts"], run["bad_lines"], run["parsing"]) == ([], 0, False)
