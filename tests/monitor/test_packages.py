"""Optional packages that are absent or too old."""

from __future__ import annotations

import importlib.util
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
    absent = ("tensorboard", "wandb")
    monkeypatch.setattr(packages, "find_spec", lambda name: None if name in absent else real(name))


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"tensorboard": True}, "pip install internlm_lite[tb]"),
        ({"wandb": {}}, "pip install internlm_lite[wandb]"),
    ],
)
def test_what_is_asked_for_and_absent_is_an_error(bare: None, config: dict[str, Any], expected: str) -> None:
    with pytest.raises(MissingPackageError, match="not installed") as error:
        check_packages(MonitorConfig(**config))
    assert str(error.value).endswith(expected) and error.value.exit_code == 2


def test_what_is_left_open_and_absent_is_off(bare: None) -> None:
    check_packages(MonitorConfig())
    assert not writes_tensorboard(MonitorConfig())


def test_what_is_there_is_used() -> None:
    check_packages(MonitorConfig(tensorboard=True, wandb={}))  # type: ignore[arg-type]
    assert writes_tensorboard(MonitorConfig()) and not writes_tensorboard(MonitorConfig(tensorboard=False))


def test_an_old_wandb(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "version", lambda name: "0.16.2")
    with pytest.raises(MissingPackageError, match=r"found wandb 0\.16\.2, expected 0\.31 or newer: pip install --upgr"):
        check_packages(MonitorConfig(wandb={}))  # type: ignore[arg-type]
