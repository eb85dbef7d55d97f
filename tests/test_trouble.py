"""The messages in docs/trouble.md are those that the program prints."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROWS = re.findall(r"^\| `([^`]+)` \|", (ROOT / "docs/trouble.md").read_text(encoding="utf-8"), re.MULTILINE)


@pytest.fixture(scope="module")
def said() -> str:
    """All string literals of the package, one a line; what an f-string fills in is left out."""
    lines = []
    for file in [*ROOT.glob("internlm_lite/**/*.py"), *ROOT.glob("tools/*.py")]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "{}" for part in node.values]
                lines.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                lines.append(node.value)
    return "\n".join(lines)


def test_there_are_rows() -> None:
    assert len(ROWS) > 20


@pytest.mark.parametrize("message", ROWS)
def test_the_program_says_so(message: str, said: str) -> None:
    for words in message.split("…"):
        assert words.strip(" :()") in said, f"docs/trouble.md: nothing says {words.strip()!r}"
