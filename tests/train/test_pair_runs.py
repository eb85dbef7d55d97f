"""Runs on pairs: figures and checkpoints of every epoch, and a resume to the bit."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from internlm_lite.config.schema import Config
from internlm_lite.errors import DataError
from internlm_lite.mesh.mesh import single_process_mesh
from internlm_lite.monitor.jsonl import read_objects
from tests.data.corpora import write_native
from tests.data.test_pairs import marked
from tests.train.runs import curve, run_training, tiny
from tests.train.test_resume import killed_after

EPOCHS = 3


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    for part, count in (("train", 70), ("valid", 9)):
        for name, seed in (("a.bin", count), ("a.source.bin", count + 1)):
            write_native(folder / part / "help" / name, marked(seed, count, 11))
    return folder


def config_of(root: Path, saves: Path, **changes: Any) -> Config:
    folders = {"train_folder": str(root / "train"), "valid_folder": str(root / "valid")}
    lengths = {"seq_len": 10, "source_seq_len": 11, "micro_bsz": 4, "micro_num": 2, "row_pairs": 5}
    when = {"valid_every": "epoch", "total_steps": 0, "epochs": EPOCHS}
    return tiny(
        None,
        data={**folders, **lengths, **when, **changes},
        model={"num_encoder_layers": 1, "vocab_size": 100, "residual_dropout": 0.1},
        ckpt={"enable_save_ckpt": True, "save_ckpt_folder": str(saves), "checkpoint_every": "epoch"},
        lr_scheduler={"total_steps": 99},
    )


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in read_objects(folder / "events.jsonl") if event["event"] == kind]


def test_every_epoch_has_its_figures_and_a_resume_is_exact(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """70 pairs by 5 are 14 rows, 7 steps an epoch."""
    whole = tmp_path / "whole"
    steps = run_training(single_process_mesh(), config_of(root, tmp_path / "saves"), whole)
    columns = [(step["epoch"], step["epoch_step"], step["accumulation_step"]) for step in steps]
    assert columns == [(step // 7, 2 * (step % 7 + 1), step % 7 + 1) for step in range(7 * EPOCHS)]
    assert all(step["tokens_per_second"] > 0 for step in steps)
    ends = [7 * epoch - 1 for epoch in range(1, EPOCHS + 1)]
    assert [event["step"] for event in events(whole, "evaluation")] == ends
    assert sum(step["folders"]["help"][0] for step in steps[:7]) == sum(len(one) - 1 for one in marked(70, 70, 11))
    saved = [(event["step"], event["saved"]) for event in events(whole, "checkpoint")]
    assert saved == [(7, "milestone"), (14, "milestone"), (21, "final")]
    config = config_of(root, tmp_path / "saves of cut")
    killed_after(10, single_process_mesh(), config, tmp_path / "cut", monkeypatch)
    assert curve(run_training(single_process_mesh(), config, tmp_path / "cut")) == curve(steps)


@pytest.mark.parametrize("pad_id", [0, 3])
def test_a_label_that_is_the_pad_is_refused(pad_id: int, tmp_path: Path) -> None:
    """Symbols of the built-in pairs are 1 to 7."""
    model = {"num_encoder_layers": 1, "vocab_size": 8}
    config = tiny(None, data={"total_steps": 1}, model=model, loss={"label_smoothing": 0.1, "pad_id": pad_id})
    refused = pytest.raises(DataError, match=r"of batch 0 are 3, which is loss.pad_id, expected none: it is")
    with refused if pad_id else nullcontext():
        run_training(single_process_mesh(), config, tmp_path)
