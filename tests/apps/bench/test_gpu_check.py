"""Every section of the GPU check runs on the CPU with tiny shapes, so that the first minutes on a GPU are not lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from internlm_lite.apps.bench.gpu import variants
from internlm_lite.apps.bench.gpu.run_sections import PLAN, SECTIONS
from tests.cli import ROOT

ONE_OF_A_KIND = (
    *(
        "env",
        "gpu_tests",
        "attention",
        "syncs",
        "train_curves",
        "resume",
        "worlds:nccl",
        "ops",
        "attention_speed",
        "staging",
    ),
    *("perf:1b:eager", "perf:1b:bare+compiled", "perf:1b:compile", "profile:1b:eager"),
    "perf:1b:liger",
)


def test_every_section_and_variant_of_the_plan_is_known() -> None:
    for part in PLAN:
        section, *arguments = part.name.split(":")
        assert section in SECTIONS
        if section in ("perf", "profile"):
            assert set(arguments[1].split("+")) <= set(variants.VARIANTS)
    kinds = {part.name.split(":")[0] for part in PLAN}
    assert kinds == {name.split(":")[0] for name in ONE_OF_A_KIND}


def test_correctness_comes_first_then_what_is_compiled() -> None:
    alone = [part.alone for part in PLAN]
    assert alone == sorted(alone)
    speeds = [part.name for part in PLAN if part.alone]
    assert speeds[:2] == ["perf:1b:compile", "perf:7b:compile"]


def test_a_patch_that_replaces_nothing_is_refused() -> None:
    with pytest.raises(AttributeError):
        variants._put(variants, "moved_elsewhere", None)


def test_smoke(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "tools/gpu_check.py",
        "--smoke",
        "--out",
        str(tmp_path),
        "--only",
        ",".join(ONE_OF_A_KIND),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=850)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    results = json.loads((tmp_path / "gpu_check.json").read_text("utf-8"))
    assert {result["status"] for result in results.values()} == {"ok"} and len(results) >= len(ONE_OF_A_KIND)
    assert results["perf:1b:compile"]["value"]["norm"] == pytest.approx(
        results["perf:1b:eager"]["value"]["norm"], rel=1e-6
    )
