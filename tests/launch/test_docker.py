"""The images cannot be built here; what they take from the repository must be there, and fit it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.cli import ROOT

FILES = sorted((ROOT / "docker").glob("*.Dockerfile"))


def instructions(file: Path) -> list[tuple[str, str]]:
    """(KEYWORD, rest) with continued lines joined and comments left out."""
    lines = [line for line in file.read_text("utf-8").splitlines() if line and not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in joined.splitlines())]


def ignored(path: str) -> bool:
    patterns = (ROOT / ".dockerignore").read_text("utf-8").split()
    return any(Path(path).match(pattern.removeprefix("**/")) for pattern in patterns)


def test_there_are_two():
    assert [file.name for file in FILES] == ["cpu.Dockerfile", "cuda.Dockerfile"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_torch_version_is_makes(file: Path):
    (made,) = re.findall(r"^TORCH \?= (\S+)$", (ROOT / "Makefile").read_text("utf-8"), re.M)
    assert ("ARG", f"TORCH={made}") in instructions(file)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_what_is_copied_is_there(file: Path):
    copies = [rest.split() for word, rest in instructions(file) if word == "COPY"]
    assert copies[-1] == [".", "."]
    for source in (source for copy in copies[:-1] for source in copy[:-1]):
        assert (ROOT / source).is_file() and not ignored(source), source


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_version_is_there_before_the_dependencies_are_installed(file: Path):
    found = instructions(file)
    version = found.index(("COPY", "internlm_lite/__init__.py internlm_lite/"))
    assert version < next(at for at, (word, rest) in enumerate(found) if word == "RUN" and "make venv" in rest)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_instruction_is_known_and_from_comes_first(file: Path):
    words = [word for word, _ in instructions(file)]
    assert set(words) <= {"ARG", "FROM", "RUN", "COPY", "WORKDIR", "ENV", "CMD"}
    before = words[: words.index("FROM")]
    assert set(before) <= {"ARG"} and words.count("FROM") == 1


def test_no_secret_and_no_cache_travels():
    assert all(ignored(path) for path in (".git", ".venv", "RUN", "demo", "ckpts", "tokens", "text"))
