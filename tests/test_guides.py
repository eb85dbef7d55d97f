"""The guides work as they are written, and the Chinese ones say what the English ones say."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import pytest

from internlm_lite.config.keys import field_of
from internlm_lite.config.load import check_config, load_config

ROOT = Path(__file__).parents[1]
GUIDES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAIRS = [
    ("README.md", "guide.zh.md"),
    ("docs/running.md", "running.zh.md"),
    ("docs/layouts.md", "layouts.zh.md"),
    ("docs/trouble.md", "trouble.zh.md"),
    ("docs/moving.md", "moving.zh.md"),
]
EXAMPLE = re.compile(r"cat > my_config.py <<'END'\n(.*?)\n    END\n", re.DOTALL)


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def code(text: str) -> list[str]:
    """Lines of the code blocks, without comments."""
    lines = [re.sub(r"(^|\s+)# .*", "", line[4:]).rstrip() for line in text.splitlines() if line.startswith("    ")]
    return [line for line in lines if line]


def names(text: str) -> set[str]:
    """What the prose and the tables quote: keys, files, tools, options, messages."""
    return set(re.findall(r"`([^`]+)`", " ".join(line for line in text.splitlines() if not line.startswith("    "))))


def outline(text: str) -> list[str]:
    """Levels of headings, rows of tables, and the first cell of those that begin with a number or a message."""
    return re.findall(r"^(?:#+ |\| (?:\d+|`[^`]+`) \||\|)", text, re.MULTILINE)


@pytest.mark.parametrize(("english", "chinese"), PAIRS)
def test_both_languages_say_the_same(english: str, chinese: str) -> None:
    ours, theirs = text_of(ROOT / english), text_of(ROOT / "docs" / chinese)
    assert code(theirs) == code(ours)
    assert names(theirs) == names(ours)
    assert outline(theirs) == outline(ours)


def test_the_chinese_reference_explains_every_section() -> None:
    sections = re.findall(r"^## `([^`]*)`(?:, a list of dicts)?$", text_of(ROOT / "docs/config.md"), re.MULTILINE)
    chinese = text_of(ROOT / "docs/config.zh.md")
    rows = re.findall(r"^\| `([^`]+)` \| .* \| (.*) \|$", chinese, re.MULTILINE)
    assert [section for section, _ in rows] == sections
    for section, keys in rows:
        named = re.findall(r"`([^`]+)`", keys)
        known = [field_of(key.replace("[i]", "[0]")) for key in named]
        assert (
            named and None not in known and all(key.startswith((f"{section}.", f"{section}[i].")) for key in named)
        ), keys


@pytest.mark.parametrize("path", GUIDES, ids=lambda path: path.name)
def test_rows_of_a_table_have_the_cells_of_its_head(path: Path) -> None:
    for above, line in pairwise(text_of(path).splitlines()):
        if above.startswith("|") and line:
            assert line.startswith("|"), f"a broken row: {line}"
            assert len(re.split(r"(?<!\\)\|", line)) == len(re.split(r"(?<!\\)\|", above)), line


@pytest.mark.parametrize("path", GUIDES, ids=lambda path: path.name)
def test_files_in_code_blocks_are_there(path: Path) -> None:
    files = re.findall(r"\b(?:configs|launch|tools)/\w+\.(?:py|sh)\b", "\n".join(code(text_of(path))))
    assert [file for file in files if not (ROOT / file).is_file()] == []


def test_the_example_of_a_config_loads(tmp_path: Path) -> None:
    found = EXAMPLE.search(text_of(ROOT / "README.md"))
    assert found is not None
    (tmp_path / "my_config.py").write_text(found[1].replace("\n    ", "\n").strip())
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    loaded = load_config(tmp_path / "my_config.py", ["STEPS=2000"])
    check_config(loaded, world_size=1)
    data, ckpt = loaded.config.data, loaded.config.ckpt
    assert (data.train_folder, data.total_steps, data.valid_every) == ("tokens/train", 2000, 0)
    assert ckpt.enable_save_ckpt and loaded.config.model.vocab_size == 8192
