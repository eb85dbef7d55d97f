"""The wheel, built, and installed where this checkout cannot be imported: what a user gets from `pip install`."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import venv
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

from internlm_lite import __version__
from tests.cli import ROOT

SOURCES = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "train.py", "configs", "launch", "internlm_lite")


def call(*command: str | Path, folder: Path) -> str:
    """Run to the end in `folder`, without this checkout on the path."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment |= {"OMP_NUM_THREADS": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    done = subprocess.run(
        [*map(str, command)], cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=600
    )
    output = done.stdout.decode()
    assert done.returncode == 0, f"{command}: code {done.returncode}\n{output}"
    return output


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from links to the files: a build leaves folders beside its sources."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for path in (path for name in SOURCES for path in (ROOT / name, *(ROOT / name).rglob("*"))):
        if path.is_file() and path.suffix != ".pyc":
            link = source / path.relative_to(ROOT)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path)
    isolation = ["--no-build-isolation"] if find_spec("setuptools") else []
    call(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", *isolation, "-w", out, source, folder=out)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def programs(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """bin/ of a new environment: the wheel, and the dependencies of this one, which are gigabytes."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    (packages,) = folder.glob("lib/python*/site-packages")
    # A plain .pth entry adds the folder, but does not run its .pth files: an editable install there stays unseen.
    (packages / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    install = ["install", "--quiet", "--no-deps", "--no-index", "--ignore-installed", wheel]
    call(sys.executable, "-m", "pip", "--python", folder / "bin/python", *install, folder=folder)
    return folder / "bin"


def test_what_is_in_it(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert tops == {"internlm_lite", f"internlm_lite-{__version__}.dist-info"}
    assert not [name for name in names if re.search(r"/bench/|(^|/)tests?[/_]", name)]
    assert {"internlm_lite/starter/configs/tiny.py", "internlm_lite/starter/launch/slurm.sh"} <= set(names)
    assert "internlm_lite/starter/train.py" in names and "internlm_lite/apps/report/assets/app/00-words.js" in names
    assert "internlm_lite/apps/attention_maps/maps.html" in names
    metadata = zipfile.ZipFile(wheel).read(f"internlm_lite-{__version__}.dist-info/METADATA").decode()
    assert re.search(r"^Provides-Extra: s3$", metadata, re.M) and re.search(r"^Requires-Dist: torch", metadata, re.M)


def test_from_init_to_a_trained_model(programs: Path, tmp_path: Path) -> None:
    command = programs / "internlm-lite"
    assert call(command, "--version", folder=tmp_path) == f"internlm-lite {__version__}\n"
    helped = call(programs / "python", "-m", "internlm_lite", "--help", folder=tmp_path)
    assert "\n  inspect-data " in helped
    where = call(programs / "python", "-c", "import internlm_lite as i; print(i.__file__)", folder=tmp_path)
    assert Path(where.strip()).is_relative_to(programs.parent)

    call(command, "init", ".", folder=tmp_path)
    assert "dp 4 x tp 1" in call(command, "plan", "--config", "configs/tiny.py", "--world-size", "4", folder=tmp_path)
    saved = ["TOTAL_STEPS=3", "ckpt.enable_save_ckpt=True", "ckpt.save_ckpt_folder=ckpts"]
    train = ["--config", "configs/tiny.py", "--device", "cpu", *saved]
    assert "done: 3 steps" in call(command, "train", *train, folder=tmp_path)
    assert (tmp_path / "RUN/tiny/latest/report.html").is_file()
    assert "good, every byte" in call(command, "ckpt", "verify", "ckpts", folder=tmp_path)
    resumed = call(programs / "python", "train.py", *train, "data.total_steps=4", folder=tmp_path)
    assert "done: 4 steps" in resumed
    launch = call(command, "slurm", "--config", "configs/tiny.py", "--nodes", "1", folder=tmp_path)
    assert "sbatch " in launch
    assert f"{tmp_path}/launch/slurm.sh" in (tmp_path / "slurm/tiny.sbatch").read_text()


def test_the_demo_starts(programs: Path, tmp_path: Path) -> None:
    asked = call(programs / "internlm-lite", "demo", "--help", folder=tmp_path)
    assert "where everything goes" in asked
    code = "from internlm_lite.cli import demo; print(demo.CONFIG.is_file(), demo.working_folder())"
    assert call(programs / "python", "-c", code, folder=tmp_path) == f"True {tmp_path}\n"
