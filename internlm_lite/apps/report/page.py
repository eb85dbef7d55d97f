"""The page as one self-contained HTML text: template, style, script, data, and a policy that blocks all else.

assets/page.html   with the marks <!--CSP--> <!--TITLE--> <!--STYLE--> <!--SCRIPT--> <!--PAYLOAD-->
assets/uPlot*, assets/style.css, assets/app/*.js in the order of their names
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from internlm_lite.apps.report.untrusted_files import printable
from internlm_lite.errors import StorageError

ASSETS = Path(__file__).with_name("assets")
_MARK = re.compile(r"<!--(CSP|TITLE|STYLE|SCRIPT|PAYLOAD)-->")
_IN_SCRIPT = str.maketrans({"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"})


@dataclass(frozen=True)
class Assets:
    """The parts of the page besides its data."""

    template: str
    style: str
    script: str

    @staticmethod
    def read(folder: Path = ASSETS) -> Assets:
        """Raises StorageError when the installation lacks a file."""
        try:
            style = [folder / "uPlot.min.css", folder / "style.css"]
            script = [folder / "uPlot.iife.min.js", *sorted((folder / "app").glob("*.js"))]
            return Assets(
                _text(folder / "page.html"), "\n".join(map(_text, style)), "\n".join(_text(path) for path in script)
            )
        except OSError as error:
            raise StorageError(f"cannot read {error.filename}: {error.strerror}; reinstall internlm_lite") from error

    def policy(self, live: bool) -> str:
        """Content security policy: allows only this style and script; a live page may call its own server."""
        return "; ".join(
            (
                "default-src 'none'",
                f"script-src {_hash(self.script)}",
                f"style-src {_hash(self.style)}",
                "img-src data:",
                f"connect-src {chr(39)}{'self' if live else 'none'}{chr(39)}",
                "base-uri 'none'",
                "form-action 'none'",
            )
        )


def render_page(payload: Mapping[str, Any], assets: Assets) -> str:
    """The HTML text. Values of `payload` cannot end its script element or start another."""
    parts = {
        "CSP": f'<meta http-equiv="Content-Security-Policy" content="{html.escape(assets.policy(payload["live"]))}">',
        "TITLE": html.escape(page_title(payload)),
        "STYLE": f"<style>{assets.style}</style>",
        "SCRIPT": f'<script type="module">{assets.script}</script>',
        "PAYLOAD": f'<script type="application/json" id="payload">{encode(payload)}</script>',
    }
    return _MARK.sub(lambda mark: parts[mark[1]], assets.template)


def encode(payload: Mapping[str, Any]) -> str:
    """JSON in ASCII without <, > and &, safe inside a script element."""
    return json.dumps(payload, allow_nan=False, separators=(",", ":")).translate(_IN_SCRIPT)


def page_title(payload: Mapping[str, Any]) -> str:
    names = [str(run["name"]) for run in payload["runs"]]
    return f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}" if names else "internlm_lite"


def write_report(payload: Mapping[str, Any], path: Path, assets: Assets | None = None) -> None:
    """Write the page to `path` atomically: readers see the old or the new page. Raises StorageError."""
    text = render_page(payload, assets or Assets.read())
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8", newline="\n")
        temporary.replace(path)
    except OSError as error:
        raise StorageError(
            f"cannot write {printable(path)}: {error.strerror}; make room, or write elsewhere"
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
