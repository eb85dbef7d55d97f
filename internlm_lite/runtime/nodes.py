"""Slurm's compressed texts: node lists and tasks per node.

gpu[01-03,07],login1  ->  gpu01 gpu02 gpu03 gpu07 login1          rack[1-2]n[1-2]  ->  rack1n1 rack1n2 rack2n1 rack2n2
2(x2),1               ->  2 2 1
"""

from __future__ import annotations

import itertools
import re

from internlm_lite.errors import MeshError

MAX_NODES = 65_536
"""A longer list is a typing error, not a cluster."""

_ITEM = re.compile(r"(?:[A-Za-z0-9._-]+|\[[^\[\]]*\])+")
_PART = re.compile(r"[A-Za-z0-9._-]+|\[[^\[\]]*\]")
_RANGE = re.compile(r"(\d+)(?:-(\d+))?")
_COUNT = re.compile(r"(\d+)(?:\(x(\d+)\))?")


def expand_node_list(text: str) -> list[str]:
    """The node names of a Slurm node list, in its order; the leftmost bracket of a name varies slowest.

    A number keeps the width its range begins with: [08-10] is 08 09 10. Raises MeshError on anything else.
    """
    names: list[str] = []
    at = 0
    while True:
        item = _ITEM.match(text, at)
        if item is None:
            raise _bad(text, f"a node name is expected at {text[at : at + 20]!r}")
        names += _expand_item(text, item.group(), room=MAX_NODES - len(names))
        at = item.end()
        if at == len(text):
            return names
        if text[at] != ",":
            raise _bad(text, f"a comma is expected at {text[at : at + 20]!r}")
        at += 1


def expand_task_counts(text: str) -> list[int]:
    """Tasks on each node from SLURM_TASKS_PER_NODE: '2(x2),1' -> [2, 2, 1]. Raises MeshError."""
    counts: list[int] = []
    for item in text.split(","):
        match = _COUNT.fullmatch(item)
        repeat = int(match.group(2) or 1) if match else 0
        if match is None or len(counts) + repeat > MAX_NODES:
            raise MeshError(f"tasks per node {text!r}: found {item!r}, expected N or N(xREPEAT) such as '2(x2),1'")
        counts += [int(match.group(1))] * repeat
    return counts


def _expand_item(text: str, item: str, room: int) -> list[str]:
    choices = [_expand_bracket(text, part) if part[0] == "[" else [part] for part in _PART.findall(item)]
    total = 1
    for choice in choices:
        total *= len(choice)
    if total > room:
        raise _bad(text, f"more than {MAX_NODES} nodes")
    return ["".join(parts) for parts in itertools.product(*choices)]


def _expand_bracket(text: str, bracket: str) -> list[str]:
    numbers: list[str] = []
    for part in bracket[1:-1].split(","):
        match = _RANGE.fullmatch(part)
        if match is None:
            raise _bad(text, f"found {part!r} in {bracket}, expected a number or a range such as 01-03")
        first, last = match.group(1), match.group(2) or match.group(1)
        if int(last) < int(first) or int(last) - int(first) >= MAX_NODES:
            raise _bad(text, f"range {part} in {bracket} runs backwards or is longer than {MAX_NODES}")
        numbers += [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]
    return numbers


def _bad(text: str, problem: str) -> MeshError:
    return MeshError(f"node list {text!r}: {problem}; expected text such as gpu[01-03,07],login1")
