"""Hides secrets: in the values of a config, in command-line arguments, and in the text of config files.

A value is secret when the name it is given to says so ("token", "webhook", ...); in other strings, passwords inside
addresses are masked. In a file's text, names are variables, keys, attributes, arguments, dictionary entries, and other
arguments of the same call (`setdefault("WANDB_API_KEY", ...)`); a secret found once is masked wherever it occurs.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence
from typing import Any

from internlm_lite.config.schema import Config

MASK = "***"
_SECRET_WORDS = frozenset(
    {"secret", "token", "password", "passwd", "key", "signature", "credential", "credentials", "webhook"}
)
_IN_TEXT = (
    (re.compile(r"(://)[^/@\s]+@"), rf"\1{MASK}@"),  # scheme://user:password@host
    (re.compile(r"([?&][\w-]*(?:secret|token|password|key|signature|credential)[\w-]*=)[^&\s]+", re.I), rf"\1{MASK}"),
    (re.compile(r"(/(?:hook|services)/)\S+"), rf"\1{MASK}"),  # Feishu, Slack webhooks
)
_SHORTEST = 6
"""Characters of a secret that is masked wherever it occurs in a file; a shorter one is probably a word of its own."""


def is_secret_name(name: str) -> bool:
    return bool(_SECRET_WORDS & set(re.split(r"[^a-z]+", name.lower())))


def masked(values: Any, name: str = "") -> Any:
    """The same nested values with secrets as ***: whole values under such a name, and parts of addresses."""
    if isinstance(values, dict):
        return {key: masked(value, str(key)) for key, value in values.items()}
    if isinstance(values, list):
        return [masked(value, name) for value in values]
    if not isinstance(values, str):
        return values
    if is_secret_name(name):
        return MASK
    for pattern, replacement in _IN_TEXT:
        values = pattern.sub(replacement, values)
    return values


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
        tree = ast.parse(text)
    except (SyntaxError, ValueError):
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
        edits.append((begin, starts[string.end_lineno - 1] + string.end_col_offset, f'"{clean}"'))
        texts.add(content)
    for begin, end, new in sorted(edits, reverse=True):
        raw = raw[:begin] + new.encode() + raw[end:]
    result = raw.decode()
    for content in sorted(texts, key=len, reverse=True):
        if len(content) >= _SHORTEST:
            result = result.replace(content, MASK)
    return result


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
    name = getattr(target, "id", None) or getattr(target, "attr", None) or getattr(target, "value", None)
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
