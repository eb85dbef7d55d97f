"""What `make test-fast` leaves out."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from tests.conftest import HERE, SLOW_FIXTURES, SLOW_FOLDERS, pytest_collection_modifyitems


def marks(path: str, *fixtures: str) -> list[str]:
    found: list[str] = []
    item = SimpleNamespace(path=HERE / path, fixturenames=["tmp_path", *fixtures], add_marker=found.append)
    pytest_collection_modifyitems([item])  # type: ignore[list-item]
    return found


@pytest.mark.parametrize("path", ["launch/test_slurm.py", "apps/bench/test_bench.py", "train/deep/test_resume.py"])
def test_tests_are_slow_by_their_folder(path: str) -> None:
    assert marks(path) == ["slow"]


@pytest.mark.parametrize("fixture", sorted(SLOW_FIXTURES))
def test_tests_are_slow_by_what_they_ask_for(fixture: str) -> None:
    assert marks("report/test_page.py", fixture) == ["slow"]


def test_other_tests_are_fast(request: pytest.FixtureRequest) -> None:
    """Also where a folder above the repository has such a name."""
    assert marks("optim/test_zero.py") == [] and marks("test_train.py") == []
    assert request.node.get_closest_marker("slow") is None


def test_the_rule_names_what_there_is() -> None:
    folders = {path.name for path in HERE.rglob("*") if path.is_dir()}
    helpers = "".join(path.read_text("utf-8") for path in [HERE / "slurmlab.py", *HERE.rglob("conftest.py")])
    assert folders >= SLOW_FOLDERS
    assert [name for name in SLOW_FIXTURES if f"def {name}(" not in helpers] == []
