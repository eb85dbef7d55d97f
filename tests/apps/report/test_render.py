"""report.html as a text: nothing in the data ends its element, nothing but our own style and script is let in."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
import stat
from html.parser import HTMLParser
from pathlib import Path

import pytest

from internlm_lite.apps.report.page import Assets, encode, page_title, render_page, write_report
from internlm_lite.apps.report.payload import make_payload
from internlm_lite.apps.report.run import RunReader
from internlm_lite.errors import StorageError
from tests.apps.report.small import line, run_folder

HOSTILE = [
    "</script><img src=x onerror=alert(1)>",
    "<!--<script>",
    "]]>&amp;&#60;",
    "\u2028\u2029\x00\ud800",
    "<!--STYLE--><!--PAYLOAD-->",
    "'\"\\",
]
ASSETS = Assets(
    "<!doctype html><html><head><!--CSP--><title><!--TITLE--></title><!--STYLE--></head>"
    "<body><!--PAYLOAD--><!--SCRIPT--></body></html>",
    "p { color: red }",
    "let a = 1;\nlet b = 2;",
)


class Elements(HTMLParser):
    """Start tags with their attributes, and the text of scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.inside = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.texts.append("")
        self.inside = True

    def handle_endtag(self, tag: str) -> None:
        self.inside = False

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.texts[-1] += data

    def of(self, tag: str) -> list[tuple[dict[str, str | None], str]]:
        return [
            (attributes, text) for (name, attributes), text in zip(self.tags, self.texts, strict=True) if name == tag
        ]


def hostile_payload(folder: Path, live: bool = False) -> dict:
    lines = [line(0, folders={name: [1, 2.0, 0.5] for name in HOSTILE})]
    run = RunReader(run_folder(folder, lines), HOSTILE[0]).read_all()
    return make_payload([("r0", run)], live)


def test_hostile_names_stay_inside_the_data(tmp_path: Path) -> None:
    payload = hostile_payload(tmp_path)
    text = render_page(payload, ASSETS)
    text.encode("utf-8")
    page = Elements(text)
    assert [tag for tag, _ in page.tags] == ["html", "head", "meta", "title", "style", "body", "script", "script"]
    (attributes, data), (_, script) = page.of("script")
    assert attributes == {"type": "application/json", "id": "payload"}
    assert not set(data) & set("<>&\u2028\u2029")
    assert json.loads(data) == payload
    assert list(json.loads(data)["runs"][0]["series"]["folders"]) == HOSTILE
    assert script == ASSETS.script
    assert page.of("title")[0][1] == HOSTILE[0]


def test_the_policy_names_the_very_texts_of_the_page(tmp_path: Path) -> None:
    page = Elements(render_page(hostile_payload(tmp_path), ASSETS))
    (meta, _), *_ = page.of("meta")
    assert meta["http-equiv"] == "Content-Security-Policy"
    policy = dict(part.split(" ", 1) for part in (meta["content"] or "").split("; "))
    for tag, key in (("style", "style-src"), ("script", "script-src")):
        digest = hashlib.sha256(page.of(tag)[-1][1].encode()).digest()
        assert policy[key] == f"'sha256-{base64.b64encode(digest).decode()}'"
    assert policy["default-src"] == policy["connect-src"] == "'none'"
    assert policy["img-src"] == "data:"


def test_a_live_page_may_ask_its_own_server_and_no_other() -> None:
    assert "connect-src 'self'" in ASSETS.policy(live=True)
    assert "unsafe" not in ASSETS.policy(live=True)


def test_our_own_assets_fit_the_template(tmp_path: Path) -> None:
    assets = Assets.read()
    for mark in ("CSP", "TITLE", "STYLE", "SCRIPT", "PAYLOAD"):
        assert assets.template.count(f"<!--{mark}-->") == 1
    for text in (assets.script, assets.style):
        assert not re.search(r"</(script|style)|<!--|\r", text, re.IGNORECASE)
    page = Elements(render_page(hostile_payload(tmp_path), assets))
    assert [text for _, text in page.of("style")] == [assets.style]
    assert page.of("script")[-1][1] == assets.script
    for tag, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on") or name in ("style", "src")], tag
        assert not (attributes.get("href") or "").startswith(("http", "//")), tag


def test_encoded_text_is_json_in_ascii() -> None:
    text = encode({"name": "数据</script>"})
    assert text == '{"name":"\\u6570\\u636e\\u003c/script\\u003e"}'
    assert json.loads(text) == {"name": "数据</script>"}


def test_titles() -> None:
    assert page_title({"runs": []}) == "internlm_lite"
    assert page_title({"runs": [{"name": "a"}, {"name": "b"}, {"name": "c"}]}) == "a and 2 more"
    assert html.escape("<b>") in render_page({"runs": [{"name": "<b>"}], "live": False}, ASSETS)


def test_a_report_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")
    before = path.open()
    write_report({"runs": [], "live": False}, path, ASSETS)
    assert before.read() == "old"
    before.close()
    assert path.read_text().startswith("<!doctype html>")
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.html"]
    assert stat.S_IMODE(path.stat().st_mode) & 0o600 == 0o600


def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"cannot write .*gone/report.html: No such file or directory; make room"):
        write_report({"runs": [], "live": False}, tmp_path / "gone" / "report.html", ASSETS)
    (tmp_path / "folder").mkdir()
    with pytest.raises(StorageError, match="cannot write"):
        write_report({"runs": [], "live": False}, tmp_path / "folder", ASSETS)
    assert [entry.name for entry in tmp_path.iterdir()] == ["folder"]
    with pytest.raises(StorageError, match=r"cannot read .*page.html.*reinstall internlm_lite"):
        Assets.read(tmp_path)
