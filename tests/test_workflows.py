"""Workflows, templates and CONTRIBUTING.md ask for what is there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from internlm_lite import __version__
from tests.cli import ROOT
from tests.test_guides import code, names

GITHUB = ROOT / ".github"
WORKFLOWS = sorted((GITHUB / "workflows").glob("*.yml"))
FORMS = [path for path in sorted((GITHUB / "ISSUE_TEMPLATE").glob("*.yml")) if path.name != "config.yml"]
MAKE = re.compile(r"\bmake((?: [a-z][a-z-]*\b(?!=))+)")
"""`make lint types TORCH=...`: its targets."""


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text("utf-8"))


def targets_named(text: str) -> set[str]:
    return {target for found in MAKE.findall(text) for target in found.split()}


def targets() -> set[str]:
    (phony,) = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    return set(phony.split())


def commands(workflow: Path) -> list[str]:
    jobs = load(workflow)["jobs"].values()
    return [step["run"] for job in jobs for step in job["steps"] if "run" in step]


def quoted(document: str) -> str:
    """What a document has as code, in prose or in blocks."""
    text = (ROOT / document).read_text("utf-8")
    return "\n".join([*names(text), *code(text)])


def help_lines() -> str:
    """Without what they say about each target."""
    return "\n".join(re.findall(r"make [a-z-]+\b(?!=)", (ROOT / "Makefile").read_text("utf-8").partition("\n\n")[0]))


def test_each_target_has_one_rule() -> None:
    rules = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    assert {target: rules.count(target) for target in targets()} == dict.fromkeys(targets(), 1)


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_make_what_there_is(workflow: Path) -> None:
    named = set().union(*(targets_named(command) for command in commands(workflow)))
    assert named and named <= targets()


def test_every_check_is_in_a_workflow() -> None:
    named = set().union(*(targets_named(command) for workflow in WORKFLOWS for command in commands(workflow)))
    assert {"lint", "types", "docs", "test-fast", "test", "faults", "chaos"} <= named


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_may_only_read_and_end_by_themselves(workflow: Path) -> None:
    content = load(workflow)
    assert content["permissions"] == {"contents": "read"}
    assert all(job["timeout-minutes"] <= 120 for job in content["jobs"].values())


@pytest.mark.parametrize(
    "text",
    [quoted("CONTRIBUTING.md"), quoted(".github/PULL_REQUEST_TEMPLATE.md"), quoted("README.md"), help_lines()],
    ids=["CONTRIBUTING.md", "pull requests", "README.md", "make help"],
)
def test_documents_make_what_there_is(text: str) -> None:
    assert (named := targets_named(text)) and named <= targets()


def test_help_names_every_target_for_people() -> None:
    assert targets() - targets_named(help_lines()) == {"help", "venv", "clean"}


def test_the_newest_torch_of_the_workflows_is_makes() -> None:
    (made,) = re.findall(r"^TORCH \?= (\S+)$", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    oldest = "torch" + re.findall(r'"torch>=([\d.]+)"', (ROOT / "pyproject.toml").read_text("utf-8"))[0].join(
        ["==", ".0"]
    )
    matrix = load(GITHUB / "workflows" / "worlds.yml")["jobs"]["worlds"]["strategy"]["matrix"]
    assert matrix["torch"] == [oldest, made]


@pytest.mark.parametrize("form", FORMS, ids=lambda path: path.stem)
def test_issue_forms_ask_for_the_doctor(form: Path) -> None:
    content = load(form)
    fields = [field for field in content["body"] if field["type"] != "markdown"]
    ids = [field["id"] for field in fields]
    assert content["name"] and content["description"] and len(set(ids)) == len(ids) > 1
    assert all(field["type"] in ("textarea", "dropdown", "input", "checkboxes") for field in fields)
    assert all(field["attributes"]["label"] for field in fields)
    assert any("`python tools/doctor.py --json`" in field["attributes"].get("description", "") for field in fields)
    assert (ROOT / "tools" / "doctor.py").is_file()


def test_other_files_parse() -> None:
    assert load(GITHUB / "ISSUE_TEMPLATE" / "config.yml")["blank_issues_enabled"] is True
    hooks = {hook["id"] for repo in load(ROOT / ".pre-commit-config.yaml")["repos"] for hook in repo["hooks"]}
    assert {"ruff-check", "ruff-format", "end-of-file-fixer", "codespell"} <= hooks
    citation = load(ROOT / "CITATION.cff")
    assert citation["version"] == __version__
    assert citation["cff-version"] == "1.2.0" and citation["title"] == "internlm_lite" and citation["authors"]


def test_contributing_quotes_the_line_that_reduces_a_gradient() -> None:
    (line,) = [line for line in code((ROOT / "CONTRIBUTING.md").read_text("utf-8")) if "reduce_scatter" in line]
    assert line.strip() in (ROOT / "internlm_lite" / "optim" / "reduce.py").read_text("utf-8")


def test_targets_are_found_in_commands() -> None:
    assert targets_named("make lint types TORCH=x; PYTHON=y make test-fast") == {"lint", "types", "test-fast"}
    assert targets_named("make PYTHON=python3.12") == set()
