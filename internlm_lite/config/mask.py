"""A config file's text without its secrets, for the copy in the run folder.

A string is secret where it is given to a name that says so: an assignment to such a variable, key or attribute, an
argument, a dictionary's entry, or a call that also holds such a name (`setdefault("WANDB_API_KEY", ...)`). In other
strings, parts of addresses are masked. What was secret once is masked wherever its text stands, comments included.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence

from internlm_lite.config.view import MASK, is_secret_name, masked

_SHORTEST = 6
"""Characters of a text that is masked wherever it stands: a shorter one is a word of its own."""


def mask_source(text: str) -> str:
    """The same text with *** for secrets; without any it comes back unchanged. What cannot be parsed is all masked."""
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
    """What `node` gives to a name that says it is a secret."""
    yield from (value for name, value in _given(node) if _is_secret(name))


def _given(node: ast.AST) -> Iterator[tuple[ast.AST, ast.AST]]:
    """(name or place, value that it gets)"""
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
    """Whether a variable, `x.name`, `x["name"]`, a tuple of such, or a text is a secret's name."""
    if isinstance(target, ast.Tuple | ast.List):
        return any(map(_is_secret, target.elts))
    if isinstance(target, ast.Subscript):
        return _is_secret(target.slice)
    name = getattr(target, "id", None) or getattr(target, "attr", None) or getattr(target, "value", None)
    return isinstance(name, str) and is_secret_name(name)


def _strings(node: ast.AST) -> Iterator[ast.Constant | ast.JoinedStr]:
    """String literals in `node`, those with fields as a whole."""
    if isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str | bytes)):
        yield node
        return
    for child in ast.iter_child_nodes(node):
        yield from _strings(child)


def _content(string: ast.Constant | ast.JoinedStr) -> str:
    parts: Sequence[ast.AST] = string.values if isinstance(string, ast.JoinedStr) else [string]
    values = [part.value if isinstance(part, ast.Constant) else "{}" for part in parts]
    return "".join(value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value) for value in values)
