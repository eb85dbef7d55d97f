"""Make a corpus of pairs, such as German and English, from manuals that Debian has in both languages.

    internlm-lite pair-corpus --output corpus                         on Debian or Ubuntu: apt-get download
    internlm-lite pair-corpus --output corpus --packages FOLDER ...   folders of .deb files, or with their usr/share

LibreOffice's help, Debian's installation guide and the Debian reference, aligned by paragraph, without repetitions:
corpus/{train,valid,test}/{help,installation,reference}/*.de and *.en, line by line, which tools/tokenizer.py reads with
--pair de en. Nothing is installed.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from internlm_lite.cli.options import new_parser
from internlm_lite.data.pair_corpus import PARTS, packages, write_pairs
from internlm_lite.errors import DataError
from internlm_lite.runtime.tool import run_tool


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = new_parser("pair-corpus", __doc__)
    add = parser.add_argument
    add("--output", type=Path, required=True, help="folder for train, valid and test; must not exist")
    add("--packages", type=Path, nargs="+", default=[], metavar="FOLDER", help="instead of apt-get download")
    add("--languages", nargs=2, default=["de", "en"], metavar=("SOURCE", "TARGET"), help="of the pairs (de en)")
    return parser.parse_args(argv)


@contextmanager
def unpacked(folders: Sequence[Path], wanted: Sequence[str]) -> Iterator[list[Path]]:
    """Roots with the files of packages: those of the .deb files in `folders` and the folders themselves; without
    folders, of the packages `wanted`, downloaded. Raises DataError."""
    with tempfile.TemporaryDirectory() as name:
        work, roots = Path(name), list(folders)
        if missing := [folder for folder in folders if not folder.is_dir()]:
            raise DataError(f"--packages {missing[0]}: found no folder, expected one with packages; correct the path")
        if not folders:
            _run(["apt-get", "download", *wanted], work)
        for archive in sorted(path for folder in folders or [work] for path in folder.glob("*.deb")):
            _run(["dpkg-deb", "-x", str(archive.resolve()), "files"], work)
        yield [*roots, work / "files"]


def _run(command: Sequence[str], folder: Path) -> None:
    """Raises DataError with the last line that the program wrote."""
    if shutil.which(command[0]) is None:
        raise DataError(f"found no {command[0]} here, expected Debian or Ubuntu; give unpacked packages by --packages")
    ended = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if ended.returncode:
        last = (ended.stderr.strip() or ended.stdout.strip()).rpartition("\n")[2]
        raise DataError(
            f"{' '.join(command[:2])} failed: {last}; run apt-get update, or give packages by --packages FOLDER"
        )


def work(arguments: argparse.Namespace) -> int:
    """Exit code."""
    output, languages = arguments.output, (arguments.languages[0], arguments.languages[1])
    if output.exists():
        raise DataError(f"--output {output} exists already; choose another folder, or remove it")
    with unpacked(arguments.packages, packages(languages)) as roots:
        sizes = write_pairs(roots, output, languages)
    for name, size in sizes.items():
        parts = ", ".join(f"{size[part]} {part}" for part in PARTS)
        print(f"  {name:<13} {parts} pairs; left out, mostly repetitions: {size['left out']}")
    inputs = " ".join(f"{output / 'train' / name}" for name, size in sizes.items() if size["train"])
    print(f"tokenise it: tools/tokenizer.py encode --pair {' '.join(languages)} --input {inputs} ...")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 2 no packages or too few pairs, 130 interrupted."""
    return run_tool(partial(work, parse_arguments(argv)))
