"""Slurm's node lists and task counts."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from internlm_lite.errors import MeshError
from internlm_lite.runtime.nodes import expand_node_list, expand_task_counts


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("login1", ["login1"]),
        ("gpu[01-03,07],login1", ["gpu01", "gpu02", "gpu03", "gpu07", "login1"]),
        ("rack[1-2]n[01-02]", ["rack1n01", "rack1n02", "rack2n01", "rack2n02"]),
        ("n[8-11]", ["n8", "n9", "n10", "n11"]),
        ("n[098-101]-ib", ["n098-ib", "n099-ib", "n100-ib", "n101-ib"]),
        ("a,b[1,3],c-d.example[7]", ["a", "b1", "b3", "c-d.example7"]),
        ("HOST-10-140-60-[69,95]", ["HOST-10-140-60-69", "HOST-10-140-60-95"]),
        ("[1-2]", ["1", "2"]),
    ],
)
def test_expands(text, names):
    assert expand_node_list(text) == names


@pytest.mark.parametrize(
    "text",
    ["", ",", "a,", ",a", "a,,b", "gpu[1-2", "gpu1-2]", "gpu[]", "gpu[1-]", "gpu[-2]", "gpu[a-b]", "gpu[3-1]",
     "gpu[1,]", "gpu[[1-2]]", "a b", "(null)", "gpu[1-999999999]", "r[1-300]n[1-300]", "gpu[1--2]", "gpu [1]"],
)  # fmt: skip
def test_bad_text(text):
    with pytest.raises(MeshError, match="node list") as caught:
        expand_node_list(text)
    assert repr(text) in str(caught.value)


def compress(prefix: str, numbers: list[int], width: int) -> str:
    """A Slurm-like node list of the sorted numbers: ranges of neighbours in one bracket."""
    parts = []
    for _, run in itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0]):
        run = [number for _, number in run]
        first, last = f"{run[0]:0{width}d}", f"{run[-1]:0{width}d}"
        parts.append(first if len(run) == 1 else f"{first}-{last}")
    return f"{prefix}[{','.join(parts)}]"


@given(
    st.lists(
        st.tuples(
            st.from_regex(r"[a-z][a-z-]{0,5}", fullmatch=True),
            st.lists(st.integers(0, 2000), min_size=1, max_size=30, unique=True).map(sorted),
            st.integers(1, 5),
        ),
        min_size=1,
        max_size=4,
    )
)
def test_round_trip(groups):
    text = ",".join(compress(*group) for group in groups)
    names = [f"{prefix}{number:0{width}d}" for prefix, numbers, width in groups for number in numbers]
    assert expand_node_list(text) == names


@given(st.text(alphabet="ab01-,[]() x", max_size=20))
def test_any_text(text):
    try:
        names = expand_node_list(text)
    except MeshError:
        return
    assert names and all(name and not set(name) & set("[], ") for name in names)


@pytest.mark.parametrize(("text", "counts"), [("2", [2]), ("2(x2)", [2, 2]), ("2(x2),1", [2, 2, 1]), ("8,4", [8, 4])])
def test_task_counts(text, counts):
    assert expand_task_counts(text) == counts


@pytest.mark.parametrize("text", ["", "x", "2(2)", "2(x)", "2,", "2(x99999999)"])
def test_bad_task_counts(text):
    with pytest.raises(MeshError, match="tasks per node"):
        expand_task_counts(text)
