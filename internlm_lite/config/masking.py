"""Hides secrets: in the values of a config, in command-line arguments, and in the text of config files.

A value is secret when the name it is given to says so ("AK", "authTokens", "webhook", ...), or when it looks like one:
keys of known services, signed tokens, passwords in addresses and headers, and text as mixed as only random text is. In
a file's text, names are variables, keys, attributes, arguments, dictionary entries, and other arguments of the same
call (`setdefault("WANDB_API_KEY", ...)`); a secret found once is masked wherever it occurs, comments included.
"""

from __future__ import annotations

import ast
import io
import json
import re
import tokenize
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

from internlm_lite.config.schema import Config

MASK = "***"
_SECRET_WORD = re.compile(
    "(secret|token|password|passwd|passphrase|pass|pwd|key|signature|sig|credential|webhook|ak|sk|auth|authorization|"
    "cookie|jwt|bearer|apikey|accesskey|secretkey|privatekey|authtoken|accesstoken|apitoken)s?"
)
_ALSO_PROSE = ("key", "keys", "token", "tokens", "pass", "auth", "signature")
_WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
_KNOWN = "|".join(
    (
        r"(?:AKIA|ASIA|ABIA|LTAI|AKID|AKLT)[A-Za-z0-9]{12,}",  # AWS, Alibaba, Tencent, Volcano
        r"gh[pousr]_\w{16,}|github_pat_\w{16,}|gl(?:pat|dt|rt)-[\w-]{16,}",  # GitHub, GitLab
        r"xox[a-z]-[\w-]{8,}|xapp-[\w-]{8,}|[sr]k[-_][\w-]{16,}|hf_\w{16,}|wandb_v1_\w{16,}",  # Slack, OpenAI, ...
        r"AIza[\w-]{20,}|ya29\.[\w-]{8,}|npm_\w{20,}|pypi-[\w-]{16,}|dop_v1_\w{16,}|SG\.[\w-]{8,}\.[\w-]{8,}",
        r"\d{8,10}:[A-Za-z0-9_-]{30,}",  # Telegram
        r"eyJ[\w-]{6,}\.[\w-]{4,}(?:\.[\w-]*)?",  # JSON web token
    )
)
_IN_TEXT = (
    (re.compile(r"-----BEGIN [^-]*-----.*?(?:-----END [^-]*-----|$)", re.DOTALL), MASK),
    (re.compile(r"(://)[^/@\s]+@"), rf"\1{MASK}@"),  # scheme://user:password@host
    (re.compile(r"(/(?:hook|services|webhooks)/)\S+"), rf"\1{MASK}"),  # Feishu, Slack, Discord
    (re.compile(r"(\b(?:basic|bearer)\s+)[\w.~+/=-]{6,}", re.I), rf"\1{MASK}"),
    (re.compile(r"(\b(?:authorization|cookie|x-[\w-]*(?:key|token))\s*:\s*)[^\"'\n]+", re.I), rf"\1{MASK}"),
    (re.compile(rf"(?<![A-Za-z0-9])(?:{_KNOWN})"), MASK),
)
_PAIR = re.compile(r"""([A-Za-z_][\w.-]*)(["']?\s*=\s*|["']\s*:\s*)("[^"]*"|'[^']*'|[^\s,;&"'#)\]}]+)""")
_PAIR_IN_COMMENT = re.compile(_PAIR.pattern.replace(r"""["']\s*:""", r"""["']?\s*:"""))
_RUN = re.compile(r"[A-Za-z0-9+/_=-]{20,}")
_SHORTEST = 6
"""Characters of a secret that is masked wherever it occurs in a file; a shorter one is probably a word of its own."""


def is_secret_name(name: str) -> bool:
    """Whether one of the words in `name`, in snake or camel case, singular or plural, is that of a secret."""
    return any(_SECRET_WORD.fullmatch(word.lower()) for word in _WORDS.findall(name))


def masked(values: Any, name: str = "") -> Any:
    """The same nested values with secrets as ***: whole values under such a name, and parts of other text."""
    if isinstance(values, dict):
        secret = is_secret_name(name)
        return {key: masked(value, name if secret else str(key)) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return type(values)(masked(value, name) for value in values)
    if not isinstance(values, str):
        return values
    return MASK if is_secret_name(name) else _mask_text(values, _PAIR)


def _mask_text(text: str, pair: re.Pattern[str]) -> str:
    for pattern, replacement in _IN_TEXT:
        text = pattern.sub(replacement, text)
    text = pair.sub(lambda found: f"{found[1]}{found[2]}{MASK}" if _is_secret_pair(found) else found[0], text)
    return _RUN.sub(lambda found: MASK if any(map(_is_random, re.split(r"[^A-Za-z0-9]", found[0]))) else found[0], text)


def _is_secret_pair(found: re.Match[str]) -> bool:
    if '"' not in found[2] and "'" not in found[2] and ":" in found[2] and found[1].lower() in _ALSO_PROSE:
        return False
    return is_secret_name(found[1]) and not re.fullmatch(r"\d{1,5}|True|False|None|\.\.\.", found[3])


def _is_random(text: str) -> bool:
    """Whether letters and digits change as often as in random text. Hexadecimal text may be a hash, and is not."""
    kinds = ["0" if char.isdigit() else "A" if char.isupper() else "a" for char in text]
    changes = sum(first != second for first, second in pairwise(kinds))
    if len(set(kinds)) == 3:
        return len(text) >= 20 and changes >= 0.42 * len(text)
    is_hex = re.fullmatch("[0-9a-f]*|[0-9A-F]*", text)
    return len(text) >= 28 and not is_hex and kinds.count("0") >= 4 and changes >= 0.28 * len(text)


def secrets_of(config: Config) -> list[str]:
    """The values that `masked` hides. They must be hidden everywhere, also as the value of an environment variable."""

    def changed(value: Any, name: str = "") -> Iterator[str]:
        if isinstance(value, dict):
            for key, inner in value.items():
                yield from changed(inner, str(key))
        elif isinstance(value, list):
            for inner in value:
                yield from changed(inner, name)
        elif isinstance(value, str) and value and value != masked(value, name):
            yield value

    return list(changed(config.model_dump(mode="json")))


def mask_source(text: str) -> str:
    """The text of a config file with secrets as ***; unchanged if it has none; all of it *** if it cannot be parsed."""
    try:
        tree, comments = ast.parse(text), list(_comments(text))
    except (SyntaxError, ValueError, tokenize.TokenError):
        return f"# {MASK}: this file is not Python that can be read, so nothing of it is kept\n"
    secret = {id(string) for node in ast.walk(tree) for value in _secret_values(node) for string in _strings(value)}
    raw, edits, texts = text.encode(), [], set()
    starts = [0]
    for line in raw.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    for string in _strings(tree):
        content = _content(string)
        clean = MASK if id(string) in secret else masked(content)
        if clean == content or (id(string) in secret and not content):
            continue
        assert string.end_lineno is not None and string.end_col_offset is not None
        begin = starts[string.lineno - 1] + string.col_offset
        edits.append((begin, starts[string.end_lineno - 1] + string.end_col_offset, json.dumps(clean)))
        texts.add(content)
    for row, column, comment in comments:
        begin, clean = starts[row - 1] + column, _mask_text(comment, _PAIR_IN_COMMENT)
        if clean != comment:
            edits.append((begin, begin + len(comment.encode()), clean))
    for begin, end, new in sorted(edits, reverse=True):
        raw = raw[:begin] + new.encode() + raw[end:]
    result = raw.decode()
    for content in sorted(texts, key=len, reverse=True):
        if len(content) >= _SHORTEST:
            result = result.replace(content, MASK)
    return result


def _comments(text: str) -> Iterator[tuple[int, int, str]]:
    """(line, column in bytes, text) of each comment."""
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], len(token.line[: token.start[1]].encode()), token.string


def _secret_values(node: ast.AST) -> Iterator[ast.AST]:
    """Value nodes that `node` assigns to names of secrets."""
    yield from (value for name, value in _given(node) if _is_secret(name))


def _given(node: ast.AST) -> Iterator[tuple[ast.AST, ast.AST]]:
    """(target, value) of each assignment in `node`: variables, attributes, arguments, dictionary entries."""
    match node:
        case ast.Assign(targets=targets, value=value):
            yield from ((target, value) for target in targets)
        case ast.AnnAssign(target=target, value=ast.AST() as value):
            yield target, value
        case ast.AugAssign(target=target, value=value) | ast.NamedExpr(target=target, value=value):
            yield target, value
        case ast.Compare(left=left, comparators=others):
            yield from ((left, other) for other in others)
            yield from ((other, left) for other in others)
        case ast.FunctionDef(name=name):
            yield ast.Constant(name), node
            names = node.args.posonlyargs + node.args.args
            yield from zip(names[len(names) - len(node.args.defaults) :], node.args.defaults, strict=True)
        case ast.keyword(arg=str(name), value=value):
            yield ast.Constant(name), value
        case ast.Dict(keys=keys, values=values):
            yield from ((key, value) for key, value in zip(keys, values, strict=True) if key is not None)
        case ast.Call(args=arguments):
            texts = [argument for argument in arguments if isinstance(argument, ast.Constant)]
            yield from ((name, value) for name in texts for value in arguments if not _is_secret(value))


def _is_secret(target: ast.AST) -> bool:
    """Whether a variable, `x.name`, `x["name"]`, a tuple of these, or a string has the name of a secret."""
    if isinstance(target, ast.Tuple | ast.List):
        return any(map(_is_secret, target.elts))
    if isinstance(target, ast.Subscript):
        return _is_secret(target.slice)
    name = next((found for key in ("id", "attr", "arg", "value") if (found := getattr(target, key, None))), None)
    return isinstance(name, str) and is_secret_name(name)


def _strings(node: ast.AST) -> Iterator[ast.Constant | ast.JoinedStr]:
    """String literals in `node`; an f-string is one node."""
    if isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str | bytes)):
        yield node
        return
    for child in ast.iter_child_nodes(node):
        yield from _strings(child)


def _content(string: ast.Constant | ast.JoinedStr) -> str:
    parts: Sequence[ast.AST] = string.values if isinstance(string, ast.JoinedStr) else [string]
    values = [part.value if isinstance(part, ast.Constant) else "{}" for part in parts]
    return "".join(value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value) for value in values)
