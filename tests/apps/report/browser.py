"""A real browser for the tests: Debian's chromium, driven by playwright, and axe-core to judge accessibility."""

from __future__ import annotations

import importlib.resources
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.installing import advice, install

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip


def find_chromium() -> str | None:
    return next((path for name in NAMES if (path := shutil.which(name))), None)


@contextmanager
def chromium() -> Iterator[Any]:
    """playwright's Browser. Skips, saying what is missing."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
    if find_chromium() is None:
        install("chromium")
    program = find_chromium()
    if program is None:
        pytest.skip(f"needs chromium: {advice('chromium')}")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=program, args=list(FLAGS), timeout=120_000)
        try:
            yield browser
        finally:
            browser.close()


def legend(name: str) -> str:
    """The selector of a folder's button in the legend."""
    return f'#legend button[title="{name}"]'


class Tab:
    """One page in a context of its own. `faults`: errors it had and requests it made to elsewhere."""

    def __init__(self, browser: Any, width: int = 1440, height: int = 1000, dark: bool = False, locale: str = "en-US"):
        self.context = browser.new_context(
            viewport={"width": width, "height": height},
            color_scheme="dark" if dark else "light",
            locale=locale,
            timezone_id="UTC",
            reduced_motion="reduce",  # a scroll that takes its time would make every click wait
        )
        self.page = self.context.new_page()
        self.page.set_default_timeout(60_000)
        self.faults: list[str] = []
        self.home = ""
        self.page.on("pageerror", lambda error: self.faults.append(f"error: {error}"))
        self.page.on("console", self._heard)
        self.page.on("dialog", self._asked)
        self.page.on("request", self._requested)

    def open(self, target: Path | str) -> Tab:
        """A file, or an address; returns when it is drawn."""
        url = target if isinstance(target, str) else target.as_uri()
        parts = urlsplit(url)
        self.home = f"{parts.scheme}://{parts.netloc}{'/' if parts.netloc else parts.path}"
        self.page.goto(url)
        self.until("document.documentElement.dataset.drawn")
        return self

    def reload(self) -> None:
        self.page.reload()
        self.until("document.documentElement.dataset.drawn")

    def until(self, expression: str, seconds: float = 60.0) -> None:
        """Waits for it to be true. playwright's own wait evaluates strings in the page, which the policy forbids."""
        end = time.monotonic() + seconds
        while not self.page.evaluate(expression):
            assert time.monotonic() < end, f"not within {seconds} s: {expression}"
            time.sleep(0.05)

    def settle(self) -> None:
        """Until a drawing that is under way is on the screen."""
        self.page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")

    @property
    def state(self) -> dict[str, Any]:
        return self.page.evaluate("page.state")

    def chart(self, title: str) -> dict[str, Any]:
        """A chart. Its lines are each one: as drawn, with the values that were measured, and their average if any."""
        self.settle()
        chart = next(chart for chart in self.page.evaluate("page.charts") if chart["title"] == title)
        measured: dict[str, list[float | None]] = {}
        for line in chart["lines"]:
            measured.setdefault(line["key"], line["values"])
        chart["lines"] = [
            {**line, "values": measured[line["key"]], "average": line["values"]}
            for line in chart["lines"][-len(measured) :]
        ]
        return chart

    def small_charts(self) -> list[dict[str, Any]]:
        self.settle()
        return [chart for chart in self.page.evaluate("page.charts") if chart["small"]]

    def rows(self) -> list[list[str]]:
        """The texts of the table of folders."""
        script = "(rows) => rows.map((row) => [...row.children].map((cell) => cell.innerText.trim()))"
        return self.page.eval_on_selector_all("#table tbody tr", script)

    def spills(self) -> int:
        """By how many pixels the page is wider than the window."""
        return self.page.evaluate("document.documentElement.scrollWidth - innerWidth")

    def violations(self) -> list[str]:
        """What axe-core finds serious or critical."""
        package = pytest.importorskip(
            "axe_playwright_python", reason="needs axe-core: pip install axe-playwright-python"
        )
        source = importlib.resources.files(package).joinpath("axe.min.js").read_text(encoding="utf-8")
        self.page.evaluate(source)
        found = self.page.evaluate("axe.run(document).then((result) => result.violations)")
        return [
            f"{item['impact']} {item['id']}: {node['html'][:160]} {node['failureSummary']}"
            for item in found
            if item["impact"] in ("serious", "critical")
            for node in item["nodes"]
        ]

    def picture(self, folder: Path, name: str, whole: bool = False) -> None:
        """A PNG among the artefacts; `whole`: of the full page, scrolled through once so that all of it is drawn."""
        if whole:
            self.page.evaluate(
                "async () => { for (let y = 0; y < document.body.scrollHeight; y += 500) {"
                " scrollTo({top: y, behavior: 'instant'}); await new Promise((done) => setTimeout(done, 20)); }"
                " scrollTo({top: 0, behavior: 'instant'}); }"
            )
        self.settle()
        self.page.screenshot(path=folder / f"{name}.png", full_page=whole)

    def press(self, selector: str, **options: Any) -> None:
        """A click on the first such element, and what it leads to."""
        self.page.locator(selector).first.click(**options)
        self.settle()

    def walk_to(self, selector: str) -> None:
        """By the tab key, as somebody without a mouse does."""
        for _ in range(80):
            if self.page.evaluate("(selector) => document.activeElement.matches(selector)", selector):
                return
            self.page.keyboard.press("Tab")
        raise AssertionError(f"the tab key does not reach {selector}")

    def close(self) -> None:
        self.context.close()

    def _heard(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.faults.append(f"console: {message.text}")

    def _asked(self, dialog: Any) -> None:
        self.faults.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    def _requested(self, request: Any) -> None:
        if not request.url.startswith((self.home, "data:")):
            self.faults.append(f"request: {request.url}")
