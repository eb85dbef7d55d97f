"""Files of text as users have them: compressed, in several encodings, damaged; and a tally of what is not used of them.

Bytes that are not UTF-8 are read as Windows-1252 (Latin-1) if that is likely, and refused otherwise; a byte order mark
says UTF-16 and UTF-32, which are recognised without one by their zero bytes too.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from internlm_lite.errors import DataError, MissingPackageError
from internlm_lite.units import escaped

LONGEST_RECORD_BYTES = 1 << 30
"""Longest line, and largest file that is read as a whole; a compressed one may hold any number of bytes."""
SHOWN_PLACES, MOST_KINDS = 3, 30
FEWEST_RECORDS = 1000
"""A share of records that may be bad is taken of at least this number, so that a few at the start end nothing."""
BYTE_ORDER_MARKS = {
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32-le",  # begins like the mark of UTF-16
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
HIGH_BYTES = re.compile(rb"[\x80-\xff]+")
NOT_ASCII = re.compile(r"[^\x00-\x7f]")


@dataclass(frozen=True)
class BadLimit:
    """How many records may be bad: a number, or a share."""

    count: int = 0
    share: float = 0.0

    def allows(self, bad: int, records: int) -> bool:
        return bad <= max(self.count, self.share * max(FEWEST_RECORDS, records))

    def __str__(self) -> str:
        return f"{100 * self.share:.4g}%" if self.share else str(self.count)


@dataclass
class Tally:
    """Counts what is left out or was read in doubt, with the first places. Only bad records have a limit."""

    limit: BadLimit
    records: int = 0
    bad: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    places: dict[str, list[str]] = field(default_factory=dict)

    def note(self, what: str, place: object, count: int = 1) -> None:
        if what not in self.counts and len(self.counts) >= MOST_KINDS:  # such as suffixes that are numbers
            what = "others, left out"
        self.counts[what] = self.counts.get(what, 0) + count
        places = self.places.setdefault(what, [])
        if len(places) < SHOWN_PLACES:
            places.append(str(place))

    def refuse(self, what: str, place: str) -> None:
        """Leave out a record. Raises DataError when too many are bad."""
        self.note(f"bad: {what}", place)
        self.records += 1
        self.bad += 1
        if not self.limit.allows(self.bad, self.records):
            raise DataError(
                f"{self.bad} of {self.records} records are bad, more than --max-bad-records {self.limit} allows: "
                f"{'; '.join(line for line in self.lines() if line.startswith('bad'))}; correct them, or allow more"
            )

    def lines(self) -> list[str]:
        """One line for each thing that was counted, such as `.pdf, left out: 2 (a.pdf, b.pdf)`."""
        lines = []
        for what, count in self.counts.items():
            more = ", ..." if count > len(self.places[what]) else ""
            line = f"{what}: {count} ({', '.join(self.places[what])}{more})"
            lines.append(escaped(line))
        return lines


class ZstdFile(io.RawIOBase):
    """The content of a .zst file of one or more frames. zstandard's own readers take a cut file for a whole one."""

    def __init__(self, path: Path) -> None:
        try:
            import zstandard
        except ImportError:
            text = f"{path}: reading .zst needs zstandard: pip install 'internlm_lite[zstd]'"
            raise MissingPackageError(text) from None
        self._path, self._zstandard = path, zstandard
        self._blocks, self._rest = self._decompress(), b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            block = next(self._blocks, None)
            if block is None:
                return 0
            self._rest = block
        n_bytes = min(len(buffer), len(self._rest))
        buffer[:n_bytes], self._rest = self._rest[:n_bytes], self._rest[n_bytes:]
        return n_bytes

    def _decompress(self) -> Iterator[bytes]:
        frame, at_end = self._zstandard.ZstdDecompressor().decompressobj(), True
        with self._path.open("rb") as file:
            while block := file.read(1 << 14):
                while block:
                    try:
                        yield frame.decompress(block)
                    except self._zstandard.ZstdError as error:
                        raise OSError(str(error)) from None
                    at_end = frame.eof
                    block = frame.unused_data
                    if at_end:
                        frame = self._zstandard.ZstdDecompressor().decompressobj()
        if not at_end:
            raise EOFError("compressed file ended in the middle of a frame")


DECOMPRESSORS: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": lambda path: io.BufferedReader(ZstdFile(path)),
}


def suffix_of(path: Path) -> str:
    """x.JSONL.gz -> .jsonl"""
    return Path(path.stem if path.suffix.lower() in DECOMPRESSORS else path).suffix.lower()


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Context in which errors of reading `path` are raised as DataError."""
    try:
        yield
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        why = str(getattr(error, "strerror", None) or error)
        raise DataError(f"{path}: {' '.join(why.split())}; correct or remove it") from None


@contextmanager
def opened(path: Path, encoding: str | None) -> Iterator[tuple[BinaryIO, str | None]]:
    """The decompressed bytes behind the byte order mark, and the encoding that the file shows, else `encoding`."""
    with DECOMPRESSORS.get(path.suffix.lower(), lambda path: path.open("rb"))(path) as stream:
        head = stream.peek(1 << 12)[: 1 << 12]
        for mark, found in BYTE_ORDER_MARKS.items():
            if head.startswith(mark):
                stream.read(len(mark))
                yield stream, found
                return
        yield stream, _wide_encoding(head) or encoding


def _wide_encoding(head: bytes) -> str | None:
    """UTF-16 has zero bytes at every second place where its text is mostly ASCII."""
    first, second = head[::2].count(0), head[1::2].count(0)
    if max(first, second) < len(head) * 0.35 or min(first, second) > len(head) * 0.05:
        return None
    return "utf-16-be" if first > second else "utf-16-le"


def is_wide(encoding: str | None) -> bool:
    """Whether a byte of a line feed may be part of another character."""
    return encoding is not None and codecs.lookup(encoding).name.startswith(("utf-16", "utf-32"))


def decode(content: bytes | bytearray, encoding: str | None, place: str, tally: Tally) -> str | None:
    """The text; None for bytes in an unknown encoding, which are refused. Doubts are noted."""
    try:
        return content.decode(encoding or "utf-8")
    except UnicodeDecodeError:
        replaced = content.decode(encoding or "utf-8", "replace")
    if encoding or 2 * replaced.count("\ufffd") <= len(NOT_ASCII.findall(replaced)):
        tally.note(f"damaged {encoding or 'UTF-8'}, damaged characters replaced by U+FFFD", place)
        return replaced
    runs = [len(run) for run in HIGH_BYTES.findall(content)]
    if 2 * sum(n_bytes for n_bytes in runs if n_bytes > 1) > sum(runs):  # accented letters stand alone
        tally.refuse("neither UTF-8 nor Latin-1 (--encoding names another)", place)
        return None
    tally.note("not UTF-8, read as Windows-1252 (Latin-1); --encoding names another", place)
    return content.decode("cp1252", "replace")


def text_lines(path: Path, encoding: str | None, tally: Tally) -> Iterator[tuple[str, str]]:
    """(path:line number, line) of the lines that can be decoded."""
    yield from ((place, line) for place, line in all_lines(path, encoding, tally) if line is not None)


def all_lines(path: Path, encoding: str | None, tally: Tally) -> Iterator[tuple[str, str | None]]:
    """(path:line number, line) of all lines; None for one that cannot be decoded, which is refused."""
    with opened(path, encoding) as (stream, found):
        if is_wide(found):
            lines: Iterator[str | bytes] = iter(io.TextIOWrapper(stream, found, errors="replace", newline="\n"))
        else:
            lines = iter(lambda: stream.readline(LONGEST_RECORD_BYTES), b"")
        for number, line in enumerate(lines, 1):
            place = f"{path}:{number}"
            text = line if isinstance(line, str) else decode(line, found, place, tally)
            if isinstance(line, str) and "\ufffd" in line:
                tally.note(f"damaged {found}, damaged characters replaced by U+FFFD", place)
            yield place, text


def whole_text(path: Path, encoding: str | None, tally: Tally) -> str | None:
    """The text of a file; None if it is refused."""
    with opened(path, encoding) as (stream, found):
        content = bytearray()
        while block := stream.read(1 << 20):
            content += block
            if len(content) > LONGEST_RECORD_BYTES:
                tally.refuse("more than 1 GiB in one document (JSON lines have no limit)", str(path))
                return None
    text = decode(content, found, str(path), tally)
    return None if text is None else text.replace("\r\n", "\n").replace("\r", "\n")
