"""The page in a real browser: what it draws from run folders, logs and a dashboard.

Pictures go to the folder named by SCREENSHOTS, for somebody to look at.
"""

from __future__ import annotations

import math
import re
from datetime import timedelta
from pathlib import Path
from typing import Any

from internlm_lite.apps.report.log_reader import read_log
from internlm_lite.apps.report.page import write_report
from internlm_lite.apps.report.payload import make_payload, window
from internlm_lite.apps.report.run import RunReader
from tests.apps.report import made
from tests.apps.report.browser import Tab
from tests.apps.report.made import SIX, STEPS, dashboard, report
from tests.steps import read_metrics


def test_the_table_is_that_of_metrics_jsonl(tab: Tab, runs: Path, pictures: Path) -> None:
    tab.open(report(runs / "one"))
    lines = read_metrics(runs / "one/metrics.jsonl")
    tokens = {name: sum(line["folders"][name][0] for line in lines) for name in SIX}
    expected = []
    for name in SIX:
        last = [line["folders"][name] for line in lines[-window(len(lines)) :] if line["folders"][name][0]]
        loss = sum(figures[0] * figures[1] for figures in last) / sum(figures[0] for figures in last)
        share = tokens[name] / sum(tokens.values())
        expected.append([name, f"{100 * share:.1f} %", f"{loss:.4f}", f"{math.exp(loss):.4g}"])
    shown = [[row[0], row[2], row[4], f"{float(row[7]):.4g}"] for row in tab.rows()]
    assert shown == expected
    chart = tab.chart("loss")
    for line, name in zip(chart["lines"], SIX, strict=True):
        assert line["name"] == name
        assert line["values"] == [step["folders"][name][1] for step in lines]
        assert line["x"] == list(range(STEPS))
    tab.picture(pictures, "report", whole=True)


def test_a_live_append_shows(tab: Tab, tmp_path: Path, pictures: Path) -> None:
    run = made.make_run(tmp_path / "live", 50, end=None)
    with dashboard(run) as address:
        tab.open(address)
        tab.until("page.charts.some((chart) => chart.points === 50)")
        made.write_lines(run / "metrics.jsonl", made.step_lines(range(50, 60)))
        tab.until("page.charts.some((chart) => chart.points === 60)")
        assert "step 60 of 1,000" in tab.page.locator("#state").inner_text()
        assert tab.page.locator("#freshness").inner_text() == "live"
        tab.picture(pictures, "live")
        tab.close()  # before the server goes that it asks


def test_a_lost_connection_is_said(browser: Any, tmp_path: Path) -> None:
    tab = Tab(browser)
    with dashboard(made.make_run(tmp_path / "live", 20, end=None)) as address:
        tab.open(address)
        tab.until("document.querySelector('#freshness').innerText === 'live'")
    tab.until("document.querySelector('#freshness').innerText.includes('connection lost since')")
    tab.close()


def test_a_zoom_on_the_live_page_fetches_every_line_of_it(tab: Tab, tmp_path: Path) -> None:
    run = made.make_long_run(tmp_path / "long", 5000, SIX)
    with dashboard(run) as address:
        tab.open(f"{address}#zoom=1000,1400")
        tab.until("page.charts.some((chart) => chart.title === 'loss' && chart.points === 401)")
        assert tab.chart("loss")["lines"][0]["x"] == list(range(1000, 1401))
        tab.press("#controls button.plain")
        assert tab.chart("loss")["points"] == 1000
        tab.close()


def test_many_folders_and_steps_paint(tab: Tab, tmp_path: Path, pictures: Path, record_property: Any) -> None:
    tab.open(report(made.make_long_run(tmp_path / "long")))
    chart = tab.chart("loss")
    assert chart["points"] == 1000 and len(chart["lines"]) == len(made.MANY)
    assert len({(line["colour"], tuple(line["dash"])) for line in chart["lines"]}) == len(made.MANY)
    spent = tab.page.evaluate("performance.measure('draw', 'draw begins', 'draw ends').duration")
    record_property("milliseconds to draw", spent)
    print(f"33 folders x 50,000 steps drawn in {spent:.0f} ms")
    tab.picture(pictures, "many")


def test_a_resume_overlap_is_drawn_once(tab: Tab, tmp_path: Path) -> None:
    run = made.make_run(tmp_path / "resumed", 60, end=None)
    again = made.step_lines(range(40, 80), seg=1, offset=1.0)
    made.write_lines(run / "metrics.jsonl", again)
    made.write_lines(run / "events.jsonl", [{"time": made.time_of(60), "seg": 1, "event": "start", "step": 40}])
    tab.open(report(run))
    line = tab.chart("Loss")["lines"][0]
    assert line["x"] == list(range(80))
    assert line["values"][40:] == [step["loss"] for step in again]
    assert tab.page.locator("#state .restarts dd").inner_text() == "1"
    assert ["restart", 40] in [[mark["kind"], mark["x"]] for mark in tab.chart("Loss")["marks"]]


def test_runs_that_have_hardly_anything(tab: Tab, tmp_path: Path, pictures: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "metrics.jsonl").touch()
    tab.open(report(empty))
    assert "starting" in tab.page.locator("#state").inner_text()
    assert "No values yet" in tab.page.locator("#overlay").inner_text()
    tab.picture(pictures, "empty")

    tab.open(report(made.make_run(tmp_path / "step", 1, end=None)))
    assert tab.chart("loss")["points"] == 1
    tab.picture(pictures, "one-step")

    tab.open(report(made.make_run(tmp_path / "lone", 20, ("only",))))
    assert [row[0] for row in tab.rows()] == ["only"]

    nothing = made.step_lines(range(30))
    for line in nothing:
        line.update(dict.fromkeys([key for key in line if key not in ("seg", "time", "step", "folders")]))
        line["folders"] = {name: [0, None, 0.0] for name in line["folders"]}
    (tmp_path / "null").mkdir()
    made.write_lines(tmp_path / "null/metrics.jsonl", nothing)
    tab.open(report(tmp_path / "null"))
    assert [row[4] for row in tab.rows()] == ["–"] * len(SIX)


def test_of_many_runs_the_first_few_are_shown_until_others_are_chosen(tab: Tab, tmp_path: Path) -> None:
    folders = [made.make_run(tmp_path / f"run-{index}", 20, ("code",)) for index in range(6)]
    tab.open(report(*folders))
    assert [line["name"] for line in tab.chart("loss")["lines"]] == [f"code · run-{index}" for index in range(4)]
    for index in (5, 0, 1, 2, 3):
        tab.press(f'#controls input[data-focus="run:demo/run-{index}"]')
    assert [line["name"] for line in tab.chart("loss")["lines"]] == ["code · run-5"]
    tab.press('#controls input[data-focus="run:demo/run-5"]')  # the last one stays
    assert [line["name"] for line in tab.chart("loss")["lines"]] == ["code · run-5"]


def test_the_log_of_an_internlm_run(tab: Tab, tmp_path: Path, pictures: Path) -> None:
    log = Path(__file__).parents[2] / "monitor/data/seed.log"
    path = tmp_path / "report.html"
    write_report(make_payload([("r0", read_log(log).run)], live=False), path)
    tab.open(path)
    chart = tab.chart("loss")
    assert [(line["name"], line["x"], line["values"][0], line["values"][-1]) for line in chart["lines"]] == [
        (".git", [0, 1, 2, 3, 4, 5], 11.5552, 7.0646)
    ]
    assert len(tab.rows()) == 33
    tab.picture(pictures, "seed-log", whole=True)


def test_a_truncated_file_shows_what_is_whole(tab: Tab, tmp_path: Path) -> None:
    run = made.make_run(tmp_path / "cut", 30, end=None)
    text = (run / "metrics.jsonl").read_bytes()
    (run / "metrics.jsonl").write_bytes(text[: len(text) - 200])
    tab.open(report(run))
    assert tab.chart("loss")["points"] == 29


def test_hostile_names_are_text(tab: Tab, runs: Path, pictures: Path) -> None:
    tab.open(report(runs / "hostile"))
    assert [row[0] for row in tab.rows()] == list(made.HOSTILE)
    assert tab.page.locator("img, #table b, #legend b").count() == 0
    for name in made.HOSTILE:
        tab.page.locator("#legend button").nth(made.HOSTILE.index(name)).click()
        tab.settle()
        assert tab.state["only"] == [name]
    tab.page.locator("#legend button").nth(0).click()
    tab.reload()
    assert [line["name"] for line in tab.chart("loss")["lines"]] == [made.HOSTILE[0]]
    tab.picture(pictures, "hostile")


def test_several_runs_are_overlaid(tab: Tab, runs: Path, pictures: Path) -> None:
    tab.open(report(runs / "one", runs / "two", runs / "three"))
    lines = tab.chart("loss")["lines"]
    assert len(lines) == 3 * len(SIX)
    first = [line for line in lines if line["name"].startswith("code ")]
    assert [line["name"] for line in first] == ["code · one", "code · two", "code · three"]
    assert len({line["colour"] for line in first}) == 1 and len({tuple(line["dash"]) for line in first}) == 3
    assert first[0]["values"][299] is not None and first[2]["values"][219] is not None
    tab.picture(pictures, "runs", whole=True)
    tab.press("#controls label:has-text('two') input")
    assert len(tab.chart("loss")["lines"]) == 2 * len(SIX)
    assert "runs=demo%2Fone,demo%2Fthree" in tab.page.url
    tab.press("#config label input[type=checkbox]")
    assert [row.split("\t")[0] for row in tab.page.locator("#config tbody").inner_text().splitlines()] == ["adam.lr"]


def test_a_report_loads_itself_again(tab: Tab, tmp_path: Path) -> None:
    tab.page.clock.install()
    run = made.make_run(tmp_path / "training", 20, end=None)
    tab.open(report(run).as_uri() + "#tab=acc")
    tab.press("#freshness input")
    made.write_lines(run / "metrics.jsonl", made.step_lines(range(20, 30)))
    report(run)
    with tab.page.expect_navigation():
        tab.page.clock.fast_forward(31_000)
    tab.until("document.documentElement.dataset.drawn")
    assert tab.chart("accuracy")["points"] == 30
    assert tab.page.url.endswith("#tab=acc&reload=1")


def test_a_report_that_nobody_rewrites_says_so(tab: Tab, tmp_path: Path) -> None:
    """As a killed run leaves it that had paused for days; the report of one that ended may be as old as it likes."""
    now = made.START + timedelta(days=5)
    tab.page.clock.install(time=now)
    killed = made.make_run(tmp_path / "killed", 100, end=None)
    lines = [{**line, "time": now.isoformat()} for line in made.step_lines(range(100, 102))]
    made.write_lines(killed / "metrics.jsonl", lines)
    tab.open(report(killed, now=now))
    strip = tab.page.locator("#state .phase")
    assert strip.inner_text().split() == ["▶", "training"]
    saved = tab.page.locator("#state .last_checkpoint small")
    age = saved.inner_text()
    tab.page.clock.fast_forward("03:00:00")
    assert "silent" in strip.inner_text()
    assert re.search(r"report not rewritten for 3 h.*; it was training$", strip.inner_text())
    assert saved.inner_text() != age
    tab.open(report(made.make_run(tmp_path / "ended", 100), now=now))
    tab.page.clock.fast_forward("03:00:00")
    assert "not rewritten" not in tab.page.locator("#state").inner_text()


def test_a_run_that_cannot_be_shown_says_why(tab: Tab, tmp_path: Path) -> None:
    run = RunReader(made.make_run(tmp_path / "bad", 5), "demo/bad")
    run.error = "cannot read </script>: not a regular file"
    path = tmp_path / "report.html"
    write_report(make_payload([("r0", run)], live=False), path)
    tab.open(path)
    strip = tab.page.locator("#state .phase").inner_text()
    assert "cannot be shown" in strip and run.error in strip


def test_shares_of_a_long_run_add_up(tab: Tab, tmp_path: Path) -> None:
    lines = made.step_lines(range(3000))
    (tmp_path / "metrics.jsonl").touch()
    made.write_lines(tmp_path / "metrics.jsonl", lines)
    tab.open(report(tmp_path).as_uri() + "#tab=share")
    drawn = tab.chart("share of tokens")["lines"]
    bucket = [line["folders"] for line in lines[:6]]
    total = sum(figures[0] for folders in bucket for figures in folders.values())
    for line in drawn:
        assert math.isclose(line["values"][0], sum(f[line["name"]][0] for f in bucket) / total, rel_tol=1e-5)


def test_long_names_and_many_runs_keep_their_place(browser: Any, tmp_path: Path, pictures: Path) -> None:
    name = "a" * 240
    folders = [made.make_run(tmp_path / f"run-{index}", 120, (name, "code_from_the_web")) for index in range(4)]
    for shown in (folders[:1], folders):
        for width in (900, 400):
            tab = Tab(browser, width=width)
            tab.open(report(*shown))
            tab.settle()
            assert tab.spills() <= 0
            tab.picture(pictures, f"long-name-{len(shown)}-{width}")
            overlaps = tab.page.evaluate(
                "[...document.querySelectorAll('#legend button')].filter((button) => {"
                " const [text, value] = ['.text', '.value'].map((part) => button.querySelector(part)"
                ".getBoundingClientRect()); return value.width && text.right > value.left && text.bottom > value.top"
                " && value.bottom > text.top; }).length"
            )
            assert overlaps == 0
            assert tab.faults == []
            tab.close()
