"""Optional packages that are absent or too old."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from internlm_lite.config.schema import MonitorConfig
from internlm_lite.errors import MissingPackageError
from internlm_lite.monitor import packages
from internlm_lite.monitor.packages import check_packages, writes_tensorboard


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without any of them."""
    real = importlib.util.find_spec
    absent = ("tensorboard", "wandb", "mlflow")
    monkeypatch.setattr(packages, "find_spec", lambda name: None if name in absent else real(name))


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"tensorboard": True}, "pip install internlm_lite[tb]"),
        ({"wandb": {}}, "pip install internlm_lite[wandb]"),
        ({"mlflow": {}}, "pip install internlm_lite[mlflow]"),
    ],
)
def test_requested_package_is_missing(bare: None, config: dict[str, Any], expected: str) -> None:
    with pytest.raises(MissingPackageError, match="not installed") as error:
        check_packages(MonitorConfig(**config))
    assert str(error.value).endswith(expected) and error.value.exit_code == 2


def test_optional_package_is_missing(bare: None) -> None:
    check_packages(MonitorConfig())
    assert not writes_tensorboard(MonitorConfig())


def test_installed_package_is_used() -> None:
    check_packages(MonitorConfig(tensorboard=True, wandb={}))  # type: ignore[arg-type]
    assert writes_tensorboard(MonitorConfig()) and not writes_tensorboard(MonitorConfig(tensorboard=False))


def test_plain_folder_is_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a_mere_folder").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert not packages.is_installed("a_mere_folder") and not packages.is_installed("not_there_at_all")


def test_old_wandb(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "version", lambda name: "0.16.2")
    with pytest.raises(MissingPackageError, match=r"found wandb 0\.16\.2, expected 0\.31 or newer: pip install --upgr"):
        check_packages(MonitorConfig(wandb={}))  # type: ignore[arg-type]
