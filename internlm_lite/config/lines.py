"""On which line of a config file each key was written, read from the syntax tree without running it.

    model = dict(            # ("model",): 1
        hidden_size=64,      # ("model", "hidden_size"): 2
    )
    model["num_layers"] = 2  # ("model", "num_layers"): 4

Follows dict(...), {...}, `|`, `**`, names of other dicts, item assignment and `.update(...)`. What it cannot follow
(a function that returns a dict) keeps the line of the assignment.
"""

from __future__ import annotations

import ast

Path = tuple[str, ...]


def written_lines(tree: ast.Module) -> dict[Path, int]:
    """Line of each variable, section and key, of the last statement that writes it."""
    visitor = _Writer()
    visitor.visit(tree)
    return visitor.lines


class _Writer(ast.NodeVisitor):
    def __init__(self) -> None:
        self.lines: dict[Path, int] = {}

    def visit_Assign(self, node: ast.Assign) -> None:
        for target in node.targets:
            self._assign(target, node.value)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self._assign(node.target, node.value)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        path = _path(node.target)
        if path is not None:
            self._read(path, node.value)

    def visit_Call(self, node: ast.Call) -> None:
        if isinstance(node.func, ast.Attribute) and node.func.attr == "update":
            path = _path(node.func.value)
            if path is not None:
                self._read_call(path, node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        """Nothing inside a function is a key of the file."""

    def visit_Lambda(self, node: ast.Lambda) -> None:
        """Nor inside a lambda."""

    def _assign(self, target: ast.expr, value: ast.expr) -> None:
        path = _path(target)
        if path is not None:
            self._write(path, value, target.lineno)

    def _write(self, path: Path, value: ast.expr, line: int) -> None:
        inherited = self._below(value) if isinstance(value, ast.Name) else {}
        self.lines = {known: at for known, at in self.lines.items() if known[: len(path)] != path}
        self.lines[path] = line
        self.lines.update({path + inner: at for inner, at in inherited.items()})
        self._read(path, value)

    def _read(self, path: Path, value: ast.expr) -> None:
        """Take over the keys that the expression `value` writes below `path`."""
        if isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id == "dict":
            self._read_call(path, value)
        elif isinstance(value, ast.Dict):
            for key, inner in zip(value.keys, value.values, strict=True):
                if key is None:
                    self._read(path, inner)
                elif isinstance(key, ast.Constant) and isinstance(key.value, str):
                    self._write((*path, key.value), inner, key.lineno)
        elif isinstance(value, ast.BinOp) and isinstance(value.op, ast.BitOr):
            self._read(path, value.left)
            self._read(path, value.right)
        elif isinstance(value, ast.Name):
            self.lines.update({path + inner: at for inner, at in self._below(value).items()})

    def _read_call(self, path: Path, call: ast.Call) -> None:
        for argument in call.args:
            self._read(path, argument)
        for keyword in call.keywords:
            if keyword.arg is None:
                self._read(path, keyword.value)
            else:
                self._write((*path, keyword.arg), keyword.value, keyword.lineno)

    def _below(self, name: ast.Name) -> dict[Path, int]:
        return {known[1:]: at for known, at in self.lines.items() if known[0] == name.id and len(known) > 1}


def _path(target: ast.expr) -> Path | None:
    """`a["b"]["c"]` -> ("a", "b", "c"); None for anything else than a name and constant keys."""
    if isinstance(target, ast.Name):
        return (target.id,)
    if isinstance(target, ast.Subscript) and isinstance(target.slice, ast.Constant):
        path = _path(target.value)
        return None if path is None else (*path, str(target.slice.value))
    return None
