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
from internlm_lite.cli.gpu_check import KINDS_OF_PROFILE, PREDICTED, main, predicted_and_measured
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
    *("perf:1b:liger", "perf:7b:compile+fp8"),
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


def test_predicted_stands_beside_measured() -> None:
    gpu = "NVIDIA H100 80GB HBM3"
    kinds = {"gemm": 172.0, "attention": 54.0, "elementwise": 73.4, "reduce, norm": 11.4, "optimizer": 15.3}
    kinds |= {"copy, cat, fill": 50.7, "other": 4.5}
    results = {
        "env": {"status": "ok", "value": {}},
        "perf:1b:eager": {"status": "ok", "value": {"gpu": gpu, "seconds": [9.0, 0.4, 0.3, 0.2]}},
        "perf:1b:bare": {"status": "ok", "value": {"gpu": gpu, "seconds": [9.0, 0.3]}},
        "perf:7b:eager": {"status": "TIMEOUT", "value": {}},
        "perf:1b:compile": {"status": "ok", "value": {"gpu": "NVIDIA L4", "seconds": [9.0, 0.3]}},
        "profile:1b:eager": {"status": "ok", "value": {"gpu": gpu, "kinds": kinds, "gaps": 10.7}},
    }
    step, unknown, *terms = predicted_and_measured(results, smoke=False)
    assert step.startswith("perf:1b:eager: predicted 3") and "measured 300.0 ms, ratio 0." in step
    assert unknown == "perf:1b:compile: no device file of NVIDIA L4"
    assert [line.partition(":eager ")[2].partition(":")[0] for line in terms] == [*KINDS_OF_PROFILE, "gaps"]
    assert "measured 140.0 ms" in terms[2]


def test_the_changes_are_printed_for_every_shape(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--predict", "a100"]) == 0
    head, _, *rows = capsys.readouterr().out.partition("\n\n")[0].splitlines()
    assert head.count("|") == 2 + len(PREDICTED) and len(rows) == 6
    assert all(row.count(" ms, ") >= 2 for row in rows)


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
    assert results["predicted"]["value"]["notes"]
    assert results["perf:1b:compile"]["value"]["norm"] == pytest.approx(
        results["perf:1b:eager"]["value"]["norm"], rel=1e-6
    )
