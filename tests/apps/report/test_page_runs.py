"""The page of several runs, some of which failed before their first step, on a desk and on a phone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from internlm_lite.apps.report.payload import lookback, window
from tests.apps.report import made
from tests.apps.report.browser import Tab
from tests.apps.report.made import SIX, report

LONG = f"rank 3 on node-17, step 118: CUDA error: illegal access at /a/path/{'without_a_space/' * 12}x.py; see logs"


def failed(folder: Path, steps: int) -> Path:
    made.make_run(folder, steps, end=None)
    facts = {"time": made.time_of(steps), "seg": 0, "why": LONG, "step": steps}
    made.write_lines(
        folder / "events.jsonl",
        [{"event": "alarm", "what": "checkpoint failed", "checkpoint": "90", **facts}, {"event": "failed", **facts}],
    )
    return folder


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("job")
    return [
        failed(folder / "never", 0),
        failed(folder / "failed", 220),
        made.make_run(folder / "done", 300),
        failed(folder / "nor", 0),
    ]


def texts(tab: Tab, selector: str) -> list[str]:
    return [text.strip() for text in tab.page.locator(selector).all_inner_texts()]


def beyond_the_edge(tab: Tab, selector: str) -> list[str]:
    """Texts of such elements that are cut off, or are reached by scrolling sideways alone."""
    return tab.page.eval_on_selector_all(
        selector,
        "(found) => found.filter((item) => item.scrollWidth > item.clientWidth + 1"
        " || item.getBoundingClientRect().right > innerWidth).map((item) => item.innerText)",
    )


@pytest.mark.parametrize("width", [1440, 400])
def test_runs_by_activity_with_names_and_messages_in_full(
    browser: Any, job: list[Path], pictures: Path, width: int
) -> None:
    tab = Tab(browser, width=width).open(report(*job))
    assert texts(tab, "#state > article h2") == ["done", "failed"]
    assert texts(tab, "#state summary") == ["Runs without a step: 2"]
    assert texts(tab, "#controls .runs label") == ["done", "failed"]
    assert not tab.page.locator("#state details .why").first.is_visible()

    tab.press("#state summary")
    tab.reload()
    assert texts(tab, "#state details h2") == ["never", "nor"]
    assert texts(tab, "#state details .why") == [LONG] * 2
    assert beyond_the_edge(tab, "#state details .why") == []
    if width == 400:
        assert beyond_the_edge(tab, "#state .why, .alerts .what, #events td, #checkpoints td") == []
        assert any(LONG in text for text in texts(tab, "#events td"))
        assert any(LONG in text for text in texts(tab, "#checkpoints td"))

    table = {(row[0], row[1]): row[5] for row in tab.rows()}
    for name in SIX:
        values = [f"{run} {table[name, run]}" for run in ("done", "failed")]
        assert texts(tab, f'#legend button[title="{name}"] .value span') == values
    note = tab.page.locator("#table-note").inner_text()
    starts = {run: steps - 1 - lookback(steps) for run, steps in (("done", 300), ("failed", 220))}
    assert f"last lines ({window(300)})" in note
    assert f"up to step done {starts['done']}, failed {starts['failed']}" in note

    assert tab.page.locator("#language svg path").is_visible() and texts(tab, "#language") == [""]
    assert tab.spills() <= 0 and tab.violations() == []
    tab.picture(pictures, f"job-{width}", whole=True)

    colours = {line["name"]: (line["colour"], line["dash"]) for line in tab.chart("Learning rate")["lines"]}
    tab.press('#state details input[data-focus="run:demo/never"]')
    assert texts(tab, "#state > article h2") == ["done", "failed", "never"]
    again = {line["name"]: (line["colour"], line["dash"]) for line in tab.chart("Learning rate")["lines"]}
    assert colours == again
    tab.press("#language")
    assert texts(tab, "#language") == ["English"]
    assert tab.faults == []
    tab.close()


def test_when_no_run_has_a_step_all_are_shown(tab: Tab, job: list[Path]) -> None:
    tab.open(report(job[0], job[3]))
    assert texts(tab, "#state > article h2") == ["never", "nor"]
    assert tab.page.locator("#state details").count() == 0
