"""Every file and function that the documents name exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
REFERENCE = re.compile(r"`((?:[\w.-]+/)*[\w.-]+\.(?:py|sh|md))(?::([\w.]+))?`")
"""`path/file.py` or `path/file.py:function` or `path/file.py:Class.method`."""
LINK = re.compile(r"\]\(([\w./-]+)\)")
FOLDERS = (ROOT, ROOT / "internlm_lite", ROOT / "docs")


def names_in(file: Path) -> set[str]:
    """Functions, classes, and methods as Class.method."""
    names = set()
    for node in ast.parse(file.read_text("utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef)}
    return names


def missing(text: str) -> list[str]:
    """References of a document that lead nowhere. Paths may leave out the package's own folder."""
    problems = []
    for path, name in REFERENCE.findall(text):
        file = next((folder / path for folder in FOLDERS if (folder / path).is_file()), None)
        if file is None:
            problems.append(path)
        elif name and name not in names_in(file):
            problems.append(f"{path}:{name}")
    return problems


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_what_the_documents_name_exists(document: Path) -> None:
    text = document.read_text("utf-8")
    problems = missing(text) + [link for link in LINK.findall(text) if not (document.parent / link).exists()]
    assert not problems, f"{document.name} names what is not there: {', '.join(problems)}"


def test_where_has_an_answer_for_every_question() -> None:
    rows = [line for line in (ROOT / "docs" / "where.md").read_text("utf-8").splitlines() if line.startswith("| ")]
    questions = [row for row in rows if "?" in row]
    assert len(questions) > 40
    assert all(REFERENCE.search(row) for row in questions)


def test_what_does_not_exist_is_seen() -> None:
    assert missing("`internlm_lite/batch.py:Batch.to` `mesh/comm.py:all_reduce` `config.md`") == []
    assert missing("`internlm_lite/gone.py:f`") == ["internlm_lite/gone.py"]
    assert missing("`internlm_lite/batch.py:Batsch`") == ["internlm_lite/batch.py:Batsch"]
    assert missing("`internlm_lite/batch.py:Batch.too`") == ["internlm_lite/batch.py:Batch.too"]
