"""Command-line overrides: `NAME=value` replaces a variable before the file runs, `section.key=value` a key after.

Values are Python literals, including dict(...) and 2**16; other text is a string: `data.train_folder=/data/x`,
`data.weights={'code': 2}`, `data.weights=dict(code=2)`.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from internlm_lite.config.keys import accepts_text
from internlm_lite.config.plain import plain, shown
from internlm_lite.config.source import Layer, is_variable
from internlm_lite.errors import ConfigError

COMMAND_LINE = "command line"


@dataclass
class Overrides:
    """The overrides of the command line, parsed."""

    variables: dict[str, Any]
    """UPPER_CASE name -> the value that replaces the one assigned."""
    layer: Layer
    """Keys set after the files have run."""


def parse_overrides(texts: Sequence[str]) -> Overrides:
    """Sort the overrides into variables and keys. Raises ConfigError for text that is no override."""
    wrong = [text for text in texts if not _is_override(text)]
    if wrong:
        raise ConfigError(
            "\n".join(
                f"{COMMAND_LINE}: found {shown(text)}, expected NAME=value or section.key=value" for text in wrong
            )
        )
    variables: dict[str, Any] = {}
    layer = Layer()
    for text in texts:
        key, _, written = text.partition("=")
        key, value = key.strip(), _value(key.strip(), written)
        if is_variable(key):
            variables[key] = value
        if not is_variable(key) or key == "JOB_NAME":
            layer.put(key, value, COMMAND_LINE)
    return Overrides(variables, layer)


def _is_override(text: str) -> bool:
    key, equals, _ = text.partition("=")
    return bool(equals) and all(part.isidentifier() for part in key.strip().split("."))


def _value(key: str, written: str) -> Any:
    """The literal's value; other text is a string. Numbers for keys that accept strings stay text: `skip_batches=7`."""
    try:
        value = ast.literal_eval(_Literals().visit(ast.parse(written.strip(), mode="eval")))
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return written
    value = plain(value)
    return written if accepts_text(key) and isinstance(value, (int, float)) else value


class _Literals(ast.NodeTransformer):
    """dict(a=1) -> {'a': 1} and 2**16 -> 65536, at any depth."""

    def visit_BinOp(self, node: ast.BinOp) -> ast.expr:
        self.generic_visit(node)
        match node:
            case ast.BinOp(ast.Constant(int() as left), ast.Pow(), ast.Constant(int() as right)) if 0 <= right <= 64:
                return ast.Constant(left**right)
            case ast.BinOp(ast.Constant(int() as left), ast.Mult(), ast.Constant(int() as right)):
                return ast.Constant(left * right)
        return node

    def visit_Call(self, node: ast.Call) -> ast.expr:
        self.generic_visit(node)
        match node:
            case ast.Call(func=ast.Name(id="dict"), args=[]) if all(word.arg for word in node.keywords):
                return ast.Dict([ast.Constant(word.arg) for word in node.keywords], [w.value for w in node.keywords])
        return node
