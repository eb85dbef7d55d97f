"""The page in a real browser. Pictures go to the folder named by SCREENSHOTS, for somebody to look at."""

from __future__ import annotations

import json
import math
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from internlm_lite.monitor.jsonl import read_metrics
from internlm_lite.report.log import read_log
from internlm_lite.report.page import ASSETS, write_report
from internlm_lite.report.payload import make_payload, window
from internlm_lite.report.run import RunReader
from internlm_lite.report.server import Dashboard
from internlm_lite.report.watch import Watch
from tests.report import made
from tests.report.browser import Tab, chromium

STEPS = 300


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = Path(os.environ.get("SCREENSHOTS") or tmp_path_factory.mktemp("pictures"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folders that several tests look at and none changes."""
    folder = tmp_path_factory.mktemp("RUN") / "demo"
    made.make_run(folder / "one", STEPS)
    made.make_run(folder / "two", STEPS, offset=0.3)
    made.make_run(folder / "three", 220, offset=-0.2)
    made.make_run(folder / "many", STEPS, made.MANY)
    made.make_run(folder / "hostile", STEPS, made.HOSTILE)
    return folder


@pytest.fixture
def tab(browser: Any) -> Iterator[Tab]:
    """A tab that must have had no error and asked nobody else, unless the test says so."""
    found = Tab(browser)
    yield found
    found.close()
    assert found.faults == []


def report(*folders: Path) -> Path:
    """report.html over those run folders, in the first."""
    readers = [(f"r{index}", RunReader(folder, f"demo/{folder.name}").read_all()) for index, folder in enumerate(folders)]
    path = folders[0] / f"report{len(folders)}.html"
    write_report(make_payload(readers, live=False), path)
    return path


@contextmanager
def dashboard(*folders: Path) -> Iterator[str]:
    """The address of a server over those folders."""
    watch = Watch(folders)
    with Dashboard(watch, 0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield server.address
        finally:
            server.shutdown()
            thread.join(10)
            watch.close()


def press(tab: Tab, selector: str, **options: Any) -> None:
    tab.page.locator(selector).first.click(**options)
    tab.settle()


def legend(name: str) -> str:
    return f'#legend button[title="{name}"]'


def test_the_table_is_that_of_metrics_jsonl(tab: Tab, runs: Path, pictures: Path) -> None:
    tab.open(report(runs / "one"))
    lines = read_metrics(runs / "one/metrics.jsonl")
    tokens = {name: sum(line["folders"][name][0] for line in lines) for name in made.SIX}
    expected = []
    for name in made.SIX:
        last = [line["folders"][name] for line in lines[-window(len(lines)) :] if line["folders"][name][0]]
        loss = sum(figures[0] * figures[1] for figures in last) / sum(figures[0] for figures in last)
        expected.append([name, f"{100 * tokens[name] / sum(tokens.values()):.1f} %", f"{loss:.4f}", f"{math.exp(loss):.4g}"])
    shown = [[row[0], row[2], row[4], f"{float(row[7]):.4g}"] for row in tab.rows()]
    assert shown == expected
    chart = tab.chart("loss")
    for line, name in zip(chart["lines"], made.SIX, strict=True):
        assert line["name"] == name
        assert line["values"] == [step["folders"][name][1] for step in lines]
        assert line["x"] == list(range(STEPS))
    tab.picture(pictures, "report", whole=True)


def test_folders_are_isolated_and_the_address_remembers(tab: Tab, runs: Path) -> None:
    tab.open(report(runs / "one"))
    press(tab, legend("docs"))
    assert [line["name"] for line in tab.chart("loss")["lines"]] == ["docs"]
    assert tab.page.url.endswith("#only=docs")
    press(tab, legend("web"), modifiers=["Control"])
    assert [line["name"] for line in tab.chart("loss")["lines"]] == ["docs", "web"]
    tab.reload()
    assert [line["name"] for line in tab.chart("loss")["lines"]] == ["docs", "web"]
    tab.page.keyboard.press("Escape")
    assert len(tab.chart("loss")["lines"]) == len(made.SIX)
    press(tab, '#table tr[data-name="maths"] td')
    assert tab.state["only"] == ["maths"]
    press(tab, '#table tr[data-name="maths"] td')
    assert tab.state["only"] == []
    press(tab, '#multiples figure[data-name="books"] button')
    assert tab.state["only"] == ["books"]


def test_smoothing_axes_and_tabs_change_the_chart_and_the_address(tab: Tab, runs: Path) -> None:
    lines = read_metrics(runs / "one/metrics.jsonl")
    tab.open(report(runs / "one"))
    tab.page.locator("#controls input[type=range]").fill("0.9")
    chart = tab.chart("loss")
    assert len(chart["lines"]) == 2 * len(made.SIX)  # the averages, and the values faint behind them
    raw, average = chart["lines"][0], chart["lines"][len(made.SIX)]
    assert raw["values"] == [line["folders"]["code"][1] for line in lines]
    assert average["values"] == pytest.approx(debiased(raw["values"], 0.9))
    assert "smooth=0.9" in tab.page.url
    for x, end in (("tokens", lines[-1]["num_consumed_tokens"]), ("time", made.STEP_SECONDS * (STEPS - 1)), ("step", STEPS - 1)):
        press(tab, f'#controls button[data-focus="x:{x}"]')
        assert tab.chart("loss")["x"][1] == pytest.approx(end)
    press(tab, '#controls button[data-focus="x:tokens"]')
    press(tab, '#controls button[data-focus="y:log"]')
    press(tab, '#metric button[data-focus="tab:ppl"]')
    tab.reload()
    chart = tab.chart("perplexity")
    assert chart["log"] and len(chart["lines"]) == 2 * len(made.SIX)
    assert chart["lines"][1]["values"][0] == pytest.approx(math.exp(lines[0]["folders"]["docs"][1]), rel=1e-6)
    press(tab, '#metric button[data-focus="tab:share"]')
    shares = [line["values"][-1] for line in tab.chart("share of tokens")["lines"][: len(made.SIX)]]
    assert sum(shares) == pytest.approx(1) and not tab.chart("share of tokens")["log"]


def debiased(values: list[float | None], weight: float) -> list[float | None]:
    total, missing, found = 0.0, 1.0, []
    for value in values:
        if value is None:
            found.append(None)
            continue
        total, missing = weight * total + (1 - weight) * value, missing * weight
        found.append(total / (1 - missing))
    return found


def test_zoom_is_shared_by_all_charts_and_reset_by_a_double_click(tab: Tab, runs: Path) -> None:
    tab.open(report(runs / "one"))
    box = tab.page.locator("#overlay .u-over").bounding_box()
    drag(tab, box, 0.25, 0.5)
    low, high = tab.state["zoom"]
    assert low == pytest.approx(0.25 * (STEPS - 1), abs=2) and high == pytest.approx(0.5 * (STEPS - 1), abs=2)
    assert {tuple(chart["x"]) for chart in tab.page.evaluate("page.charts")} == {(low, high)}
    tab.page.mouse.dblclick(box["x"] + 200, box["y"] + 100)
    assert tab.chart("loss")["x"] == [0, STEPS - 1]


def drag(tab: Tab, box: dict[str, float], begin: float, end: float) -> None:
    middle = box["y"] + box["height"] / 2
    tab.page.mouse.move(box["x"] + begin * box["width"], middle)
    tab.page.mouse.down()
    tab.page.mouse.move(box["x"] + end * box["width"], middle, steps=4)
    tab.page.mouse.up()
    tab.settle()


def test_small_charts_share_a_scale_or_have_their_own(tab: Tab, runs: Path) -> None:
    tab.open(report(runs / "one"))
    tab.page.locator("#multiples figure").last.scroll_into_view_if_needed()
    tab.until(f"page.charts.filter((chart) => chart.small).length === {len(made.SIX)}")
    common = {tuple(chart["y"]) for chart in tab.small_charts()}
    assert len(common) == 1
    press(tab, '#multiples-scale button[data-focus="scale:own"]')
    assert len({tuple(chart["y"]) for chart in tab.small_charts()}) == len(made.SIX)


def test_the_table_sorts(tab: Tab, runs: Path) -> None:
    tab.open(report(runs / "one"))
    press(tab, '#table button[data-focus="sort:loss_now"]')
    losses = [float(row[4]) for row in tab.rows()]
    assert losses == sorted(losses)
    press(tab, '#table button[data-focus="sort:loss_now"]')
    assert [float(row[4]) for row in tab.rows()] == losses[::-1]
    heads = tab.page.locator("#table th[aria-sort]")
    assert heads.count() == 1 and heads.get_attribute("aria-sort") == "descending"
    press(tab, '#table button[data-focus="sort:loss_now"]')
    assert [row[0] for row in tab.rows()] == list(made.SIX)


def test_everything_works_by_keyboard(tab: Tab, runs: Path) -> None:
    tab.open(report(runs / "one"))
    keys = tab.page.keyboard
    keys.press("Tab")
    assert tab.page.evaluate("document.activeElement.className") == "skip"
    walk_to(tab, "#overlay .plot")
    keys.press("ArrowRight")
    keys.press("ArrowRight")
    line = read_metrics(runs / "one/metrics.jsonl")[1]
    assert tab.page.locator("#announce").inner_text().startswith(f"steps 1: code {line['folders']['code'][1]:.4f}")
    keys.press("+")
    tab.settle()
    assert tab.state["zoom"] != []
    keys.press("0")
    walk_to(tab, legend("web"))
    keys.press("Enter")
    tab.settle()
    assert tab.state["only"] == ["web"]
    walk_to(tab, legend("books"))
    keys.press("Shift+Enter")
    tab.settle()
    assert tab.state["only"] == ["web", "books"]
    keys.press("Escape")
    walk_to(tab, '#table button[data-focus="sort:tokens"]')
    keys.press("Space")
    tab.settle()
    assert tab.state["sort"] == "tokens"
    assert tab.page.evaluate("document.activeElement.dataset.focus") == "sort:tokens"  # a table drawn anew keeps it


def walk_to(tab: Tab, selector: str) -> None:
    for _ in range(80):
        if tab.page.evaluate("(selector) => document.activeElement.matches(selector)", selector):
            return
        tab.page.keyboard.press("Tab")
    raise AssertionError(f"the tab key does not reach {selector}")


def test_a_live_append_shows_within_five_seconds(tab: Tab, tmp_path: Path, pictures: Path) -> None:
    run = made.make_run(tmp_path / "live", 50, end=None)
    with dashboard(run) as address:
        tab.open(address)
        tab.until("page.charts.some((chart) => chart.points === 50)")
        made.write_lines(run / "metrics.jsonl", made.step_lines(range(50, 60)))
        tab.until("page.charts.some((chart) => chart.points === 60)", seconds=5)
        assert "step 60 of 1,000" in tab.page.locator("#state").inner_text()
        assert tab.page.locator("#freshness").inner_text() == "live"
        tab.picture(pictures, "live")


def test_a_lost_connection_is_said(browser: Any, tmp_path: Path) -> None:
    tab = Tab(browser)
    with dashboard(made.make_run(tmp_path / "live", 20, end=None)) as address:
        tab.open(address)
        tab.until("document.querySelector('#freshness').innerText === 'live'")
    tab.until("document.querySelector('#freshness').innerText.includes('connection lost since')")
    tab.close()


def test_a_zoom_on_the_live_page_fetches_every_line_of_it(tab: Tab, tmp_path: Path) -> None:
    run = made.make_long_run(tmp_path / "long", 5000, made.SIX)
    with dashboard(run) as address:
        tab.open(f"{address}#zoom=1000,1400")
        tab.until("page.charts.some((chart) => chart.title === 'loss' && chart.points === 401)")
        assert tab.chart("loss")["lines"][0]["x"] == list(range(1000, 1401))
        press(tab, "#controls button.plain")
        assert tab.chart("loss")["points"] == 1000


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
        line["folders"] = dict.fromkeys(line["folders"], [0, None, 0.0])
    (tmp_path / "null").mkdir()
    made.write_lines(tmp_path / "null/metrics.jsonl", nothing)
    tab.open(report(tmp_path / "null"))
    assert [row[4] for row in tab.rows()] == ["–"] * len(made.SIX)


def test_the_log_of_an_internlm_run(tab: Tab, tmp_path: Path, pictures: Path) -> None:
    log = Path(__file__).parents[1] / "monitor/data/seed.log"
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


def test_a_hash_that_somebody_bent_is_survived(tab: Tab, runs: Path) -> None:
    path = report(runs / "one").as_uri()
    for bent in ("#x=nonsense&tab=%3Cb%3E&zoom=9,1&smooth=7&only=nobody&sort=nothing", "#%", "#=&&only=%ZZ&theme=pink", "#zoom=NaN,1"):
        tab.open(path + bent)
        assert len(tab.chart("loss")["lines"]) in (len(made.SIX), 2 * len(made.SIX))
        tab.page.goto("about:blank")


def test_several_runs_are_overlaid(tab: Tab, runs: Path, pictures: Path) -> None:
    tab.open(report(runs / "one", runs / "two", runs / "three"))
    lines = tab.chart("loss")["lines"]
    assert len(lines) == 3 * len(made.SIX)
    first = [line for line in lines if line["name"].startswith("code ")]
    assert [line["name"] for line in first] == ["code · one", "code · two", "code · three"]
    assert len({line["colour"] for line in first}) == 1 and len({tuple(line["dash"]) for line in first}) == 3
    assert first[0]["values"][299] is not None and first[2]["values"][219] is not None
    tab.picture(pictures, "runs", whole=True)
    press(tab, "#controls label:has-text('two') input")
    assert len(tab.chart("loss")["lines"]) == 2 * len(made.SIX)
    assert "runs=demo%2Fone,demo%2Fthree" in tab.page.url
    press(tab, "#config label input[type=checkbox]")
    assert [row.split("\t")[0] for row in tab.page.locator("#config tbody").inner_text().splitlines()] == ["adam.lr"]


def test_samples_side_by_side(tab: Tab, runs: Path) -> None:
    tab.open(report(runs / "one"))
    panes = tab.page.locator("#samples .pane .text")
    assert "(step 60)" in panes.nth(0).inner_text() and "(step 300)" in panes.nth(1).inner_text()
    panes.nth(0).focus()
    tab.page.locator("#samples select").nth(1).select_option("120")
    tab.settle()
    assert "(step 120)" in panes.nth(0).inner_text()
    press(tab, '#samples button[data-focus="right:-1"]')
    assert "(step 240)" in panes.nth(1).inner_text()
    tab.page.keyboard.press("ArrowLeft")
    tab.settle()
    assert "(step 60)" in panes.nth(0).inner_text() and "(step 180)" in panes.nth(1).inner_text()


def test_events_and_config_are_searched(tab: Tab, runs: Path) -> None:
    tab.open(report(runs / "one"))
    tab.page.locator('#events input[type="search"]').press_sequentially("milestone")
    tab.settle()
    assert set(tab.page.locator("#events td.event").all_inner_texts()) == {"checkpoint", "checkpoint_done"}
    assert "find=milestone" in tab.page.url
    tab.page.locator('#config input[type="search"]').fill("command line")
    tab.settle()
    assert tab.page.locator("#config tbody th").all_inner_texts() == ["adam.lr"]
    assert "tgs_down" in tab.page.locator("#events .alerts").inner_text()
    assert "no space left on the storage" in tab.page.locator("#checkpoints").inner_text()


def test_chinese(browser: Any, runs: Path, pictures: Path) -> None:
    tab = Tab(browser, locale="zh-CN").open(report(runs / "one"))
    assert tab.page.evaluate("document.documentElement.lang") == "zh-CN"
    assert "第 300 步，共 300 步" in tab.page.locator("#state").inner_text()
    tab.picture(pictures, "chinese", whole=True)
    press(tab, "#language")
    assert "step 300 of 300" in tab.page.locator("#state").inner_text() and "lang=en" in tab.page.url
    assert tab.faults == []
    tab.close()


def test_every_word_is_there_in_both_languages() -> None:
    sources = {path.name: path.read_text(encoding="utf-8") for path in sorted((ASSETS / "app").glob("*.js"))}
    words = dict(re.findall(r'^  (\w+): \["(.*)"\],$', sources["00-words.js"], re.MULTILINE))
    used = set(re.findall(r'\bt\("(\w+)"', "".join(sources.values())))
    used |= set(re.findall(r'data-(?:t|label|title)="(\w+)"', (ASSETS / "page.html").read_text(encoding="utf-8")))
    assert used <= set(words)
    assert all(len(pair.split('", "')) == 2 for pair in words.values())


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_accessibility(browser: Any, runs: Path, pictures: Path, dark: bool) -> None:
    for name, folders in (("one", ["one"]), ("two", ["one", "two"])):
        tab = Tab(browser, dark=dark).open(report(*[runs / folder for folder in folders]))
        press(tab, legend("docs"))
        assert tab.violations() == []
        tab.picture(pictures, f"{'dark' if dark else 'light'}-{name}", whole=True)
        assert tab.faults == []
        tab.close()


@pytest.mark.parametrize("locale", ["en-US", "zh-CN"])
def test_a_phone_scrolls_in_one_direction(browser: Any, runs: Path, pictures: Path, locale: str) -> None:
    for name in ("many", "hostile"):
        tab = Tab(browser, width=400, height=800, locale=locale).open(report(runs / name))
        tab.picture(pictures, f"phone-{name}-{locale}", whole=True)
        assert tab.spills() == 0
        assert tab.violations() == []
        assert tab.faults == []
        tab.close()


def test_it_prints(tab: Tab, runs: Path, pictures: Path) -> None:
    tab.open(report(runs / "one") .as_uri() + "#theme=dark")
    tab.page.pdf(path=pictures / "printed.pdf")
    tab.settle()
    assert tab.state["theme"] == "dark"


def test_only_one_name_is_left_on_window(tab: Tab, runs: Path) -> None:
    tab.open(report(runs / "one"))
    payload = json.loads(tab.page.locator("#payload").inner_text())
    assert payload["runs"][0]["name"] == "demo/one"
    tab.page.evaluate("() => { page.state.tab = 'acc'; }")
    assert tab.state["tab"] == "loss"
