"""What the tests of the page share: one browser, some run folders, a folder for pictures."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.apps.report import made
from tests.apps.report.browser import Tab, chromium


@pytest.fixture(scope="module")  # its event loop must not outlive the modules that use it
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = Path(os.environ.get("SCREENSHOTS") or tmp_path_factory.mktemp("pictures"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folders that several tests look at and none changes."""
    folder = tmp_path_factory.mktemp("RUN") / "demo"
    made.make_run(folder / "one", made.STEPS)
    made.make_run(folder / "two", made.STEPS, offset=0.3)
    made.make_run(folder / "three", 220, offset=-0.2)
    made.make_run(folder / "many", made.STEPS, made.MANY)
    made.make_run(folder / "hostile", made.STEPS, made.HOSTILE)
    return folder


@pytest.fixture
def tab(browser: Any) -> Iterator[Tab]:
    """A tab that must have had no error and asked nobody else, unless the test says so."""
    found = Tab(browser)
    yield found
    found.close()
    assert found.faults == []
