"""Step lines as columns: restarts, missing numbers, lines that are none."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from internlm_lite.apps.report.columns import Columns
from tests.apps.report.small import encoded, line


def columns_of(*values: dict) -> Columns:
    columns = Columns()
    columns.append(encoded(values))
    return columns


def test_figures_stand_in_columns() -> None:
    columns = columns_of(line(0, loss=3.0), line(1, loss=2.5))
    assert columns.step.tolist() == [0, 1]
    assert columns.scalars["loss"].tolist() == [3.0, 2.5]
    assert columns.scalars["grad_norm/0_default"].tolist() == [1.0, 1.0]
    assert columns.folders["code"].tolist() == [[10, 3.0, 0.5, 10], [10, 2.5, 0.5, 10]]
    assert columns.time[1] - columns.time[0] == 1.0


def test_a_restart_drops_the_tail_it_repeats() -> None:
    """Steps 0-7, then from step 5 on again: 5-8 of the later start count, and 6 and 7 of the first are gone."""
    first = [line(step, loss=1.0) for step in range(8)]
    columns = columns_of(*first, line(5, 1, loss=9.0))
    assert columns.step.tolist() == [0, 1, 2, 3, 4, 5]
    columns.append(encoded([line(step, 1, loss=9.0) for step in range(6, 9)]))
    assert columns.step.tolist() == list(range(9))
    assert columns.scalars["loss"].tolist() == [1.0] * 5 + [9.0] * 4
    assert columns.starts == {0: 0, 1: 5}


def test_a_key_or_folder_only_of_the_dropped_tail_leaves_no_number() -> None:
    columns = columns_of(line(0), line(1, mfu=0.4, folders={"gone": [1, 1.0, 1.0]}), line(1, 1), line(2, 1))
    assert columns.step.tolist() == [0, 1, 2]
    assert np.isnan(columns.scalars["mfu"]).all()
    assert np.isnan(columns.folders["gone"]).all()


def test_late_keys_and_folders_have_no_numbers_before() -> None:
    columns = columns_of(line(0), line(1, new=7, folders={"code": [1, 1.0, 0.1], "web": [2, 3.0, 0.2]}))
    assert columns.scalars["new"].tolist()[1] == 7
    assert math.isnan(columns.scalars["new"][0])
    assert np.isnan(columns.folders["web"][0]).all()


def test_null_nan_and_infinity_are_missing() -> None:
    columns = columns_of(line(0, loss=None), line(1, loss=math.nan), line(2, loss=math.inf), line(3, loss=1.5))
    assert columns.n == 4
    assert columns.bad == 0
    assert np.isnan(columns.scalars["loss"][:3]).all()
    assert columns.scalars["loss"][3] == 1.5


@pytest.mark.parametrize(
    "bad",
    [
        b'{"step": 3, "lo',
        b"[1]",
        b"\xff\xfe",
        b'{"step": "3"}',
        b'{"step": -1}',
        b'{"step": true}',
        b'{"loss": 1}',
        b'{"step": 3, "seg": "x"}',
        b"[" * 5000,
        b'{"seg":0,"step":1,"time":"x","loss":{"a":"b"},"folders":{"code":[1,2,3]}}',
        b'{"seg":0,"step":1,"time":5,"loss":1,"folders":{"code":[1,2]}}',
        b'{"seg":0,"step":1,"loss":1,"folders":{"code":7}}',
    ],
)
def test_a_bad_line_is_counted_and_left_out(bad: bytes) -> None:
    columns = Columns()
    columns.append([*encoded([line(0)]), bad, b"", *encoded([line(4)])])
    assert columns.step.tolist() == [0, 4]
    assert columns.bad == 1


def test_steps_rise_strictly_whatever_comes() -> None:
    columns = columns_of(line(0), line(2), line(2), line(1), line(3), line(1, 2), line(2, 1), line(2, 2))
    assert columns.step.tolist() == [0, 1, 2]
    assert columns.bad == 3


def test_tokens_seen_are_a_folders_fourth_figure() -> None:
    columns = columns_of(line(0, seen={"code": 25}), line(1, seen={"code": None}), line(2, seen=7))
    assert columns.folders["code"][:, 3].tolist()[::2] == [25, 10]
    assert np.isnan(columns.folders["code"][1, 3])
    assert set(columns.scalars) == {"loss", "grad_norm/0_default", "grad_norm/1_fp32", "num_consumed_tokens"}


@pytest.mark.parametrize(
    "poison",
    [
        {"step": 10**18}, {"step": 10**400}, {"step": 90}, {"step": 4, "seg": 5}, {"step": 4, "seg": 10**400},
        {"step": 4, "seg": 2}, {"step": 8, "mfu": {"a": "b"}}, {"step": 9, "folders": {"code": 7}},
    ],
)  # fmt: skip
def test_one_wrong_line_does_not_keep_out_those_after_it(poison: dict) -> None:
    columns = Columns()
    columns.start_segment(0, 0, 50)
    columns.append(encoded([line(0), line(1), poison, line(2), line(3), line(4, 1)]))
    assert columns.step.tolist() == [0, 1, 2, 3, 4]
    assert columns.bad == 1


def test_a_number_too_large_to_reckon_with_is_missing() -> None:
    columns = columns_of(line(0, loss=1e308), line(1, loss=-1e308), line(2, loss=10**400), line(3, loss=1e99))
    assert columns.step.tolist() == [0, 1, 3]
    assert np.isnan(columns.scalars["loss"][:2]).all()
    assert columns.bad == 1


def test_a_start_gives_up_the_tail_before_its_first_line_comes() -> None:
    columns = columns_of(*[line(step) for step in range(6)])
    columns.start_segment(0, 0, 50)
    columns.start_segment(1, 3, 50)
    assert columns.step.tolist() == [0, 1, 2]
    columns.append(encoded([line(6), line(3, 1), line(4, 1)]))
    assert (columns.step.tolist(), columns.bad) == ([0, 1, 2, 3, 4], 0)
    columns.start_segment(1, 3, 50)
    assert columns.n == 5


@given(st.lists(st.tuples(st.integers(0, 12), st.integers(1, 8)), max_size=5), st.integers(1, 40))
def test_each_start_gives_up_what_those_before_it_did_from_its_first_step_on(
    starts: list[tuple[int, int]], chunk: int
) -> None:
    """Each goes on from any step, for some steps, in files read in any pieces."""
    lines, kept = [], dict[int, float]()
    for seg, (first, count) in enumerate(starts):
        steps = {first + n: 100.0 * seg + n for n in range(count)}
        lines += [line(step, seg, loss=loss) for step, loss in steps.items()]
        kept = {step: loss for step, loss in kept.items() if step < first} | steps
    columns, texts = Columns(), encoded(lines)
    for at in range(0, len(texts), chunk):
        columns.append(texts[at : at + chunk])
    assert columns.step.tolist() == list(kept)
    assert columns.scalars.get("loss", np.zeros(0)).tolist() == list(kept.values())
    assert columns.bad == 0


def test_columns_grow_beyond_their_first_size() -> None:
    columns = columns_of(*[line(step, loss=float(step)) for step in range(3000)])
    columns.append(encoded([line(3000, late=1)]))
    assert columns.n == 3001
    assert columns.scalars["loss"][2999] == 2999.0
    assert columns.scalars["late"][3000] == 1
    columns.append(encoded([line(step) for step in range(3001, 9000)]))
    assert len(columns.scalars["late"]) == len(columns.folders["code"]) == 8999 + 1


def test_a_folder_that_a_line_does_not_name_had_no_tokens() -> None:
    columns = Columns()
    columns.declare(["never", "web"])
    code, web = {"code": [10, 2.0, 0.5]}, {"web": [4, 3.0, 0.25]}
    columns.append(encoded([line(0, folders=code), line(1, folders=web, seen={"web": 6}), line(2, folders={})]))
    columns.append(encoded([line(3, folders={**web, **code})]))
    assert (columns.n, columns.bad, list(columns.folders)) == (4, 0, ["never", "web", "code"])
    assert np.nansum(columns.folders["code"], axis=0).tolist() == [20, 4.0, 1.0, 20]
    assert np.isnan(columns.folders["web"][[0, 2]]).all()
    assert columns.folders["web"][[1, 3], 3].tolist() == [6, 4]
    assert np.isnan(columns.folders["never"]).all()
