"""model.fp8 in whole runs: the loss stays with bf16's, and a resumed run repeats the bits, as there is no state."""

from __future__ import annotations

import statistics
from pathlib import Path

from internlm_lite.config.schema import Config
from internlm_lite.mesh.mesh import single_process_mesh
from tests.corpus import write_corpus
from tests.train.runs import curve, run_training, tiny

STEPS, SAVED_AT, LAST = 40, 30, 10


def config_of(folder: Path, *, fp8: bool, **ckpt: object) -> Config:
    return tiny(
        folder / "corpus",
        ckpt=ckpt,
        data={"total_steps": STEPS},
        lr_scheduler={"total_steps": STEPS},
        model={"dtype": "torch.bfloat16", "fp8": fp8, "checkpoint": 0.5},
    )


def test_losses_stay_with_bf16_and_a_resumed_run_repeats_them(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus")
    mesh, saves = single_process_mesh(), f"local:{tmp_path / 'saves'}"
    saving = {"enable_save_ckpt": True, "save_ckpt_folder": saves, "checkpoint_every": SAVED_AT, "async_upload": False}
    plain = curve(run_training(mesh, config_of(tmp_path, fp8=False), tmp_path / "bf16"))
    float8 = curve(run_training(mesh, config_of(tmp_path, fp8=True, **saving), tmp_path / "fp8"))
    ends = [statistics.mean(loss for loss, _ in found[-LAST:]) for found in (plain, float8)]
    assert plain != float8 and ends[1] < 0.75 * float8[0][0]
    assert abs(ends[1] / ends[0] - 1) < 0.01

    resumed = config_of(tmp_path, fp8=True, load_ckpt_folder=f"{saves}/{SAVED_AT}")
    assert curve(run_training(mesh, resumed, tmp_path / "resumed", "none")) == float8[SAVED_AT:]
