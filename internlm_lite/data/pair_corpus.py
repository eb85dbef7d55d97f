"""Pairs of paragraphs from manuals that Debian has in several languages, for an encoder-decoder.

    help        LibreOffice's help            installation, reference   Debian's installation guide and reference

    target/{train,valid,test}/<manual>/<manual>.de and .en      line by line

A page and its translation have the same elements; where they do not, the page is left out. A text that came before, on
either side, is left out, too. The split is a function of the source text (BLAKE2), so every machine makes the same one.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

from internlm_lite.errors import DataError

SHORTEST, LONGEST = 12, 400
"""Characters of a side."""
MOST_UNEQUAL = 2.5
"""How many times as long as the other one a side may be."""
HELD_OUT = 50
"""One of so many pairs is for validation, and one for the test."""
FEWEST_PAIRS = 1000
PARTS = ("train", "valid", "test")
_BLOCKS = frozenset(["p", "h1", "h2", "h3", "h4", "h5", "h6", "li", "dt", "dd", "td", "th", "div", "title", "caption"])
_SKIPPED = frozenset(["script", "style", "pre"])
_IN_NAMES = {"en": ("en-us", "en-US")}
"""Language -> how LibreOffice's package and folder call it, where that differs."""


@dataclass(frozen=True)
class Manual:
    """Where a manual is."""

    package: str
    """Debian package, with {package} for the language."""
    folder: str
    """Below the root of the unpacked package, with {folder} for the language."""
    pages: str
    """Pattern of the pages below it, with {language}."""

    def package_of(self, language: str) -> str:
        return self.package.format(package=_IN_NAMES.get(language, (language,))[0], language=language)

    def pages_of(self, root: Path, language: str) -> dict[str, Path]:
        """Name of a page, alike in all languages -> its file."""
        folder = root / self.folder.format(folder=_IN_NAMES.get(language, ("", language))[1], language=language)
        found = sorted(folder.rglob(self.pages.format(language=language)))
        return {path.relative_to(folder).as_posix().replace(f".{language}.", "."): path for path in found}


MANUALS = {
    "help": Manual("libreoffice-help-{package}", "usr/share/libreoffice/help/{folder}/text", "*.html"),
    "installation": Manual("installation-guide-amd64", "usr/share/doc/installation-guide-amd64/{language}", "*.html"),
    "reference": Manual("debian-reference-{language}", "usr/share/debian-reference", "*.{language}.html"),
}


def packages(languages: tuple[str, str]) -> list[str]:
    """The Debian packages of all manuals in both languages."""
    return sorted({manual.package_of(language) for manual in MANUALS.values() for language in languages})


def write_pairs(roots: Sequence[Path], target: Path, languages: tuple[str, str]) -> dict[str, Counter[str]]:
    """Write the pairs of all manuals below `roots`, into which packages were unpacked. Manual -> pairs of each part,
    and "left out": those that are not used.

    Raises DataError when there are fewer than FEWEST_PAIRS to train on.
    """
    seen: tuple[set[str], set[str]] = (set(), set())
    sizes = {}
    for name, manual in MANUALS.items():
        lines: dict[str, list[tuple[str, str]]] = {part: [] for part in PARTS}
        sizes[name] = Counter[str]()
        for pair in (pair for root in roots for pair in _pairs(manual, root, languages)):
            part = part_of(pair[0])
            if _is_useful(pair) and pair[0] not in seen[0] and pair[1] not in seen[1]:
                for texts, text in zip(seen, pair, strict=True):
                    texts.add(text)
                lines[part].append(pair)
                sizes[name][part] += 1
            else:
                sizes[name]["left out"] += 1
        _write(target, name, lines, languages)
    if sum(of_manual["train"] for of_manual in sizes.values()) < FEWEST_PAIRS:
        found = ", ".join(f"{name} {of_manual['train']}" for name, of_manual in sizes.items())
        raise DataError(
            f"found too few pairs of {' and '.join(languages)} to train on: {found}; expected {FEWEST_PAIRS}: give "
            f"folders into which the packages {', '.join(packages(languages))} were unpacked"
        )
    return sizes


def part_of(source: str) -> str:
    """The part of the corpus that a pair belongs to."""
    number = int.from_bytes(hashlib.blake2b(source.encode(), digest_size=8).digest(), "big") % HELD_OUT
    return {0: "valid", 1: "test"}.get(number, "train")


def _write(target: Path, name: str, lines: dict[str, list[tuple[str, str]]], languages: tuple[str, str]) -> None:
    for part, pairs in lines.items():
        for side, language in enumerate(languages):
            path = target / part / name / f"{name}.{language}"
            if pairs:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text("".join(f"{pair[side]}\n" for pair in pairs), "utf-8")


def _pairs(manual: Manual, root: Path, languages: tuple[str, str]) -> Iterator[tuple[str, str]]:
    """All paragraphs of the pages that both languages have and that have the same elements."""
    sources, targets = (manual.pages_of(root, language) for language in languages)
    for page in sorted(sources.keys() & targets.keys()):
        source, target = (_Paragraphs.of(side[page]) for side in (sources, targets))
        if [tag for tag, _ in source] == [tag for tag, _ in target]:
            yield from zip((text for _, text in source), (text for _, text in target), strict=True)


def _is_useful(pair: tuple[str, str]) -> bool:
    """Two texts that differ, with words, neither short nor long, nor one much longer than the other."""
    short, long = sorted(map(len, pair))
    readable = all(any(character.islower() for character in text) for text in pair)
    return readable and pair[0] != pair[1] and short >= SHORTEST and long <= min(LONGEST, MOST_UNEQUAL * short)


class _Paragraphs(HTMLParser):
    """Collects the text between the borders of block elements, with the innermost of them."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, str]] = []
        self._open, self._text, self._skipped = ["body"], [""], 0

    @classmethod
    def of(cls, path: Path) -> list[tuple[str, str]]:
        """(element, text with single spaces) of a page; none of one that is no UTF-8."""
        parser = cls()
        try:
            parser.feed(path.read_text("utf-8"))
        except (OSError, UnicodeDecodeError):
            return []
        parser.close()
        return parser.found

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self._skipped += tag in _SKIPPED
        if tag in _BLOCKS:
            self._flush()
            self._open.append(tag)
        elif tag == "br":
            self._text.append(" ")

    def handle_endtag(self, tag: str) -> None:
        self._skipped -= tag in _SKIPPED and self._skipped > 0
        if tag in _BLOCKS:
            self._flush()
            if tag in self._open:
                while self._open.pop() != tag:
                    pass

    def handle_data(self, data: str) -> None:
        if not self._skipped:
            self._text.append(data)

    def _flush(self) -> None:
        if text := " ".join("".join(self._text).split()):
            self.found.append((self._open[-1] if self._open else "body", text))
        self._text = []
