"""What all programs share: each runs the package beside it, and takes the same times."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path

import pytest

import train
from tests.cli import ROOT
from tools import doctor

TOOLS = sorted((ROOT / "tools").glob("*.py"))
FIRST = "sys.path.insert(0, str(Path(__file__).resolve().parent.parent))"


def ours_before(source: str, statement: str) -> list[str]:
    """Imports of the package that stand above `statement`; all of them if it is missing."""
    imports = []
    for node in ast.parse(source).body:
        if ast.unparse(node) == statement:
            break
        if "internlm_lite" in ast.dump(node) and isinstance(node, ast.Import | ast.ImportFrom | ast.FunctionDef):
            imports.append(ast.unparse(node).partition("\n")[0])
    return imports


@pytest.mark.parametrize("tool", TOOLS, ids=lambda path: path.stem)
def test_a_tool_of_another_checkout_imports_its_own_package(tool: Path):
    """Also with a package installed from elsewhere."""
    assert ours_before(tool.read_text("utf-8"), FIRST) == []


def test_a_tool_without_it_is_seen():
    late = f"import sys\nfrom internlm_lite import units\n{FIRST}\n"
    assert ours_before(late, FIRST) == ["from internlm_lite import units"]
    assert ours_before("def f():\n    import internlm_lite.units", FIRST) == ["def f():"]


@pytest.mark.parametrize("parse", [train.parse_arguments, doctor.parse_arguments], ids=["train.py", "doctor"])
@pytest.mark.parametrize("value", ["nan", "inf", "0", "-5", "1e9", "soon"])
def test_a_timeout_is_a_number_of_seconds(
    parse: Callable[[list[str]], object], value: str, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit) as ended:
        parse(["--config", "x.py", "--timeout", value])
    assert ended.value.code == 2
    assert f"argument --timeout: found '{value}', expected seconds: a number > 0" in capsys.readouterr().err
