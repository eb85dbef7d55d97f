"""The page's controls in a real browser: each changes what is shown, and the address remembers it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from internlm_lite.monitor.jsonl import read_objects
from tests.apps.report import made
from tests.apps.report.browser import Tab, legend
from tests.apps.report.made import SIX, STEPS, report
from tests.steps import read_metrics


def test_folders_are_isolated_and_the_address_remembers(tab: Tab, runs: Path) -> None:
    tab.open(report(runs / "one"))
    tab.press(legend("docs"))
    assert [line["name"] for line in tab.chart("loss")["lines"]] == ["docs"]
    assert tab.page.url.endswith("#only=docs")
    tab.press(legend("web"), modifiers=["Control"])
    assert [line["name"] for line in tab.chart("loss")["lines"]] == ["docs", "web"]
    tab.reload()
    assert [line["name"] for line in tab.chart("loss")["lines"]] == ["docs", "web"]
    tab.page.keyboard.press("Escape")
    assert len(tab.chart("loss")["lines"]) == len(SIX)
    tab.press('#table tr[data-name="maths"] td')
    assert tab.state["only"] == ["maths"]
    tab.press('#table tr[data-name="maths"] td')
    assert tab.state["only"] == []
    tab.press('#multiples figure[data-name="books"] button')
    assert tab.state["only"] == ["books"]


def test_a_click_on_a_line_isolates_its_folder(tab: Tab, runs: Path) -> None:
    tab.open(report(runs / "one"))
    chart = tab.chart("loss")
    box = tab.page.locator("#overlay .u-over").bounding_box()
    value, (low, high) = chart["lines"][2]["values"][150], chart["y"]
    x, y = 150 / (STEPS - 1) * box["width"], (high - value) / (high - low) * box["height"]
    tab.page.mouse.move(box["x"] + x, box["y"] + y)
    tab.settle()
    assert tab.page.locator("#overlay .where").inner_text() == f"web {value:.4f} · steps 150"
    tab.page.mouse.click(box["x"] + x, box["y"] + y)
    tab.settle()
    assert tab.state["only"] == ["web"]


def test_passes_over_the_data_with_tokens_above(tab: Tab, tmp_path: Path, pictures: Path) -> None:
    """Loss and perplexity of training and of evaluations, one of them before the first step."""
    run = made.make_run(tmp_path / "run")
    start = {"time": made.time_of(-1), "seg": 0, "event": "evaluation", "step": -1, "loss": 9.0, "train_loss": 9.1}
    first, *others = read_objects(run / "events.jsonl")
    made.write_lines(run / "events.jsonl", [first, {**start, "acc": 0.0, "folders": {}}, *others], "w")
    tab.open(report(run))
    tab.press('#controls button[data-focus="x:epoch"]')
    lines = read_metrics(run / "metrics.jsonl")
    unit = 500_000 * len(SIX)
    for title, key in (("Loss", "loss"), ("Perplexity", "perplexity")):
        train = tab.chart(title)["lines"][0]
        assert train["name"] == "training" and train["values"][-1] == pytest.approx(lines[-1][key], rel=1e-4)
    names = [line["name"] for line in tab.chart("Perplexity")["lines"]]
    assert names == ["training", "validation", "training, evaluated"]
    assert tab.chart("Loss")["x"][1] == pytest.approx(lines[-1]["num_consumed_tokens"] / unit)
    assert tab.page.locator("#training .chart").first.locator(".u-axis").count() == 3
    tab.picture(pictures, "epochs", whole=True)
    assert tab.faults == []


def test_smoothing_axes_and_tabs_change_the_chart_and_the_address(tab: Tab, runs: Path) -> None:
    lines = read_metrics(runs / "one/metrics.jsonl")
    tab.open(report(runs / "one"))
    for weight in (0.9, 0.5, 0.0):  # as it opens, and as it is set to
        if weight != 0.9:
            tab.page.locator("#controls input[type=range]").fill(str(weight))
        code = tab.chart("loss")["lines"][0]
        assert code["values"] == [line["folders"]["code"][1] for line in lines]
        assert code["average"] == pytest.approx(debiased(code["values"], weight))
        assert tab.page.url.endswith(f"#smooth={weight:g}") or weight == 0.9
    drawn = next(chart["lines"] for chart in tab.page.evaluate("page.charts") if chart["title"] == "loss")
    assert len(drawn) == len(SIX)
    tab.page.locator("#controls input[type=range]").fill("0.9")
    drawn = next(chart["lines"] for chart in tab.page.evaluate("page.charts") if chart["title"] == "loss")
    assert len(drawn) == 2 * len(SIX)  # the averages, and the values faint behind them
    assert [line["colour"].removesuffix("38") for line in drawn[: len(SIX)]] == [
        line["colour"] for line in drawn[len(SIX) :]
    ]
    for exact in ("Learning rate", "Loss scale", "Peak memory, GiB"):
        (line,) = tab.chart(exact)["lines"]
        assert line["average"] == line["values"]
    ends = {"tokens": lines[-1]["num_consumed_tokens"], "time": made.STEP_SECONDS * (STEPS - 1), "step": STEPS - 1}
    for x, end in ends.items():
        tab.press(f'#controls button[data-focus="x:{x}"]')
        assert tab.chart("loss")["x"][1] == pytest.approx(end)
    tab.press('#controls button[data-focus="x:tokens"]')
    tab.press('#controls button[data-focus="y:log"]')
    tab.press('#metric button[data-focus="tab:ppl"]')
    tab.reload()
    chart = tab.chart("perplexity")
    assert chart["log"] and len(chart["lines"]) == len(SIX)
    assert chart["lines"][1]["values"][0] == pytest.approx(math.exp(lines[0]["folders"]["docs"][1]), rel=1e-6)
    tab.press('#metric button[data-focus="tab:share"]')
    shares = [line["values"][-1] for line in tab.chart("share of tokens")["lines"][: len(SIX)]]
    assert sum(shares) == pytest.approx(1) and not tab.chart("share of tokens")["log"]


def test_the_slider_is_dragged_and_searches_are_typed(tab: Tab, runs: Path) -> None:
    tab.open(report(runs / "one"))
    box = tab.page.locator("#controls input[type=range]").bounding_box()
    drag(tab, box, 0.02, 0.8)
    assert tab.state["smooth"] == pytest.approx(0.79, abs=0.05)
    for place, key in (("#events", "find"), ("#config", "key")):
        field = tab.page.locator(f'{place} input[type="search"]')
        field.press_sequentially("lr")
        field.press("ArrowLeft")
        field.press_sequentially("x")
        tab.settle()
        assert field.input_value() == tab.state[key] == "lxr"


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
    tab.until(f"page.charts.filter((chart) => chart.small).length === {len(SIX)}")
    common = {tuple(chart["y"]) for chart in tab.small_charts()}
    assert len(common) == 1
    tab.press('#multiples-scale button[data-focus="scale:own"]')
    assert len({tuple(chart["y"]) for chart in tab.small_charts()}) == len(SIX)


def test_the_table_sorts(tab: Tab, runs: Path) -> None:
    tab.open(report(runs / "one"))
    tab.press('#table button[data-focus="sort:loss_now"]')
    losses = [float(row[4]) for row in tab.rows()]
    assert losses == sorted(losses)
    tab.press('#table button[data-focus="sort:loss_now"]')
    assert [float(row[4]) for row in tab.rows()] == losses[::-1]
    heads = tab.page.locator("#table th[aria-sort]")
    assert heads.count() == 1 and heads.get_attribute("aria-sort") == "descending"
    tab.press('#table button[data-focus="sort:loss_now"]')
    assert [row[0] for row in tab.rows()] == list(SIX)


def test_everything_works_by_keyboard(tab: Tab, runs: Path) -> None:
    tab.open(report(runs / "one"))
    keys = tab.page.keyboard
    keys.press("Tab")
    assert tab.page.evaluate("document.activeElement.className") == "skip"
    keys.press("Enter")
    assert tab.page.evaluate("document.activeElement.id") == "folders"
    tab.walk_to("#overlay .plot")
    keys.press("ArrowRight")
    keys.press("ArrowRight")
    line = read_metrics(runs / "one/metrics.jsonl")[1]
    assert tab.page.locator("#announce").inner_text().startswith(f"steps 1: code {line['folders']['code'][1]:.4f}")
    keys.press("+")
    tab.settle()
    assert tab.state["zoom"] != []
    keys.press("0")
    tab.walk_to(legend("web"))
    keys.press("Enter")
    tab.settle()
    assert tab.state["only"] == ["web"]
    tab.walk_to(legend("books"))
    keys.press("Shift+Enter")
    tab.settle()
    assert tab.state["only"] == ["web", "books"]
    keys.press("Escape")
    tab.walk_to('#table button[data-focus="sort:tokens_learnt"]')
    keys.press("Space")
    tab.settle()
    assert tab.state["sort"] == "tokens_learnt"
    assert tab.page.evaluate("document.activeElement.dataset.focus") == "sort:tokens_learnt"  # as it was


def test_samples_side_by_side(tab: Tab, runs: Path) -> None:
    tab.open(report(runs / "one"))
    panes = tab.page.locator("#samples .pane .text")
    assert "(step 60)" in panes.nth(0).inner_text() and "(step 300)" in panes.nth(1).inner_text()
    panes.nth(0).focus()
    tab.page.locator("#samples select").nth(1).select_option("120")
    tab.settle()
    assert "(step 120)" in panes.nth(0).inner_text()
    tab.press('#samples button[data-focus="right:-1"]')
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


def test_a_hash_that_somebody_bent_is_survived(tab: Tab, runs: Path) -> None:
    path = report(runs / "one").as_uri()
    for bent in (
        "#x=nonsense&tab=%3Cb%3E&zoom=9,1&smooth=7&only=nobody&sort=nothing",
        "#%",
        "#=&&only=%ZZ&theme=pink",
        "#zoom=NaN,1",
    ):
        tab.open(path + bent)
        assert len(tab.chart("loss")["lines"]) == len(SIX)
        tab.page.goto("about:blank")
