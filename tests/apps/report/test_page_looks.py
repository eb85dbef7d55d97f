"""The page in another language, in the dark, on a phone, on paper, for a screen reader."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from internlm_lite.apps.report.page import ASSETS
from tests.apps.report.browser import Tab, legend
from tests.apps.report.made import report


def test_chinese(browser: Any, runs: Path, pictures: Path) -> None:
    tab = Tab(browser, locale="zh-CN").open(report(runs / "one"))
    assert tab.page.evaluate("document.documentElement.lang") == "zh-CN"
    assert "第 300 步，共 300 步" in tab.page.locator("#state").inner_text()
    tab.picture(pictures, "chinese", whole=True)
    tab.press("#language")
    assert "step 300 of 300" in tab.page.locator("#state").inner_text() and "lang=en" in tab.page.url
    assert tab.faults == []
    tab.close()


def test_every_word_is_there_in_both_languages() -> None:
    sources = {path.name: path.read_text(encoding="utf-8") for path in sorted((ASSETS / "app").glob("*.js"))}
    pairs = re.findall(r'^  (\w+): \[\s*"(.+?)",\s*"(.+?)",?\s*\],$', sources["00-words.js"], re.MULTILINE)
    words = {key for key, _, _ in pairs}
    assert len(words) == len(pairs) == sources["00-words.js"].count("],\n")
    used = set(re.findall(r'\bt\("(\w+)"', "".join(sources.values())))
    used |= set(re.findall(r'data-(?:t|label|title)="(\w+)"', (ASSETS / "page.html").read_text(encoding="utf-8")))
    assert used <= words
    assert all(
        sorted(re.findall(r"{\d}", english)) == sorted(re.findall(r"{\d}", chinese)) for _, english, chinese in pairs
    )


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_nothing_serious_in_the_way_of_assistive_technology(
    browser: Any, runs: Path, pictures: Path, dark: bool
) -> None:
    tab = Tab(browser, dark=dark).open(report(runs / "one", runs / "two") if dark else report(runs / "one"))
    tab.press(legend("docs"))
    tab.picture(pictures, "dark" if dark else "light", whole=True)
    assert tab.violations() == []
    assert tab.faults == []
    tab.close()


@pytest.mark.parametrize(("locale", "name"), [("en-US", "many"), ("zh-CN", "hostile")])
def test_a_phone_scrolls_in_one_direction(browser: Any, runs: Path, pictures: Path, locale: str, name: str) -> None:
    tab = Tab(browser, width=400, height=800, locale=locale).open(report(runs / name))
    tab.picture(pictures, f"phone-{name}", whole=True)
    assert tab.spills() == 0
    assert tab.violations() == []
    assert tab.faults == []
    tab.close()


def test_it_prints(tab: Tab, runs: Path, pictures: Path) -> None:
    tab.open(report(runs / "one").as_uri() + "#theme=dark")
    tab.page.pdf(path=pictures / "printed.pdf")
    tab.settle()
    assert tab.state["theme"] == "dark"


def test_only_one_name_is_left_on_window(tab: Tab, runs: Path) -> None:
    tab.open(report(runs / "one"))
    payload = json.loads(tab.page.locator("#payload").inner_text())
    assert payload["runs"][0]["name"] == "demo/one"
    leaked = "() => ['drawPage', 'readHash', 'goTo'].filter((name) => name in window)"
    assert tab.page.evaluate(leaked) == []
    tab.page.evaluate("() => { page.state.tab = 'acc'; }")
    assert tab.state["tab"] == "loss"
