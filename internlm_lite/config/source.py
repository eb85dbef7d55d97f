"""Runs a Python config file and keeps what it defines, lower-case names (sections) and JOB_NAME, with their lines.

    SEQ_LEN = 2048                      SEQ_LEN=4096 on the command line replaces 2048 before the file runs,
    data = dict(                        so that data.seq_len follows
        seq_len=SEQ_LEN,
    )
    values    {"data": {"seq_len": 4096}}
    origins   {"data": "configs/x.py:2", "data.seq_len": "configs/x.py:3"}

Values and origins of one file are a `Layer`; layers stack: base files, the file, the command line. Lines are read from
the syntax tree: dict(...), {...}, `|`, `**`, names of other dicts, item assignment and `.update(...)` are followed;
other keys, such as those of a function's result, get the line of the assignment.
"""

from __future__ import annotations

import ast
import os
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from internlm_lite.errors import ConfigError

DELETE = "_delete_"
"""Key of a dict that replaces the dict below it instead of merging into it."""

KeyPath = tuple[str, ...]
"""("data", "seq_len")"""


@dataclass
class ConfigFile:
    """One config file as it was run."""

    path: Path
    layer: Layer
    bases: list[Path]
    variables: set[str] = field(default_factory=set)
    """UPPER_CASE names that the file assigns."""


def run_file(path: Path, replacements: Mapping[str, ast.expr]) -> ConfigFile:
    """Run the file with the UPPER_CASE assignments in `replacements` replaced.

    Raises ConfigError naming file, line and cause when the file cannot be read or fails to run.
    """
    shown = _shown(path)
    tree = _parse(path, shown)
    lines = written_lines(tree)
    assignments = [node for node in ast.walk(tree) if isinstance(node, (ast.Assign, ast.AnnAssign, ast.AugAssign))]
    variables = {name for node in assignments for name in _stored(node) if is_variable(name)}
    tree = ast.fix_missing_locations(_Replace(replacements).visit(tree))
    namespace: dict[str, Any] = {"__name__": "__config__", "__file__": str(path)}
    try:
        exec(compile(tree, str(path), "exec"), namespace)
    except (Exception, SystemExit) as error:
        raise ConfigError(f"{shown}:{_line_of(error, str(path))}: {_cause(error)}") from error
    values = {name: value for name, value in namespace.items() if _is_key(name, value)}
    origins = {}
    for key in dotted(values):
        at = tuple(key.split("."))
        while at and at not in lines:
            at = at[:-1]
        origins[key] = f"{shown}:{lines[at]}" if at else shown
    bases = _bases(path, namespace.get("_base_"), f"{shown}:{lines.get(('_base_',), 1)}")
    return ConfigFile(path, Layer(values, origins), bases, variables)


def is_variable(name: str) -> bool:
    """UPPER_CASE names are the user's variables, lower-case names are keys."""
    return name.isupper()


def _shown(path: Path) -> str:
    """The path as messages show it: relative when the file is under the working directory."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith(os.pardir) else relative


def _parse(path: Path, shown: str) -> ast.Module:
    if path.is_dir():
        raise ConfigError(f"{shown}: found a folder, expected a Python config file")
    if path.suffix != ".py":
        raise ConfigError(f"{shown}: found the file name ending {path.suffix!r}, expected a Python config file, .py")
    try:
        return ast.parse(path.read_bytes(), filename=str(path))
    except OSError as error:
        raise ConfigError(f"{shown}: cannot read the config file: {error.strerror}; check the path") from error
    except (SyntaxError, ValueError) as error:
        line = f":{error.lineno}" if isinstance(error, SyntaxError) and error.lineno else ""
        raise ConfigError(f"{shown}{line}: {_cause(error)}") from error


def _line_of(error: BaseException, filename: str) -> int:
    """The line of the config file that was running; 1 when the file never ran (its compilation failed)."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == filename]
    return (lines[-1] if lines else getattr(error, "lineno", None)) or 1


def _cause(error: BaseException) -> str:
    if isinstance(error, SyntaxError):
        return f"not valid Python: {error.msg}"
    if isinstance(error, KeyError) and any(
        frame.name in ("__getitem__", "__missing__") and frame.filename.endswith(("os.py", "<frozen os>"))
        for frame in traceback.extract_tb(error.__traceback__)
    ):
        return f"the environment variable {error.args[0]} is not set; export it before starting"
    return f"the config file failed while running: {type(error).__name__}: {error}"


def _is_key(name: str, value: Any) -> bool:
    """Whether a top-level name is a config key: no module, function, class, _private name or UPPER_CASE variable."""
    if name.startswith("_") or isinstance(value, ModuleType) or callable(value):
        return False
    return not is_variable(name) or name == "JOB_NAME"


def _bases(path: Path, base: Any, where: str) -> list[Path]:
    names = [base] if isinstance(base, str) else base or []
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f'{where}: _base_: found {base!r}, expected a file name or a list of them, such as "base.py"')
    files = [path.parent / name for name in names]
    for file in files:
        if not file.exists():
            raise ConfigError(f"{where}: _base_: found no file {_shown(file)}; the path starts at this file's folder")
    return files


def _stored(node: ast.AST) -> list[str]:
    """The names that a statement assigns."""
    return [name.id for name in ast.walk(node) if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store)]


class _Replace(ast.NodeTransformer):
    """Replaces the values assigned to the replaced names; bodies of functions are unchanged."""

    def __init__(self, replacements: Mapping[str, ast.expr]) -> None:
        self.replacements = replacements

    def visit_Assign(self, node: ast.Assign) -> ast.stmt | list[ast.stmt]:
        match node.targets:
            case [ast.Name(id=name)] if name in self.replacements:
                node.value = ast.copy_location(self.replacements[name], node.value)
                return node
        return self._restored(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.stmt:
        if isinstance(node.target, ast.Name) and node.target.id in self.replacements:
            node.value = self.replacements[node.target.id]
        return node

    def visit_AugAssign(self, node: ast.AugAssign) -> ast.stmt | list[ast.stmt]:
        return self._restored(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.stmt:
        return node

    def _restored(self, node: ast.stmt) -> ast.stmt | list[ast.stmt]:
        """`A, B = ...` and `A += ...` are kept; a statement that sets the replaced names again is added after them."""
        again = [
            ast.copy_location(ast.Assign([ast.Name(name, ast.Store())], self.replacements[name]), node)
            for name in _stored(node)
            if name in self.replacements
        ]
        return [node, *again]


def written_lines(tree: ast.Module) -> dict[KeyPath, int]:
    """Line of each variable, section and key, of the last statement that writes it."""
    visitor = _Writer()
    visitor.visit(tree)
    return visitor.lines


class _Writer(ast.NodeVisitor):
    def __init__(self) -> None:
        self.lines: dict[KeyPath, int] = {}

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

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.Lambda) -> None:
        """Assignments inside a function or lambda are no keys of the file."""

    visit_Lambda = visit_FunctionDef

    def _assign(self, target: ast.expr, value: ast.expr) -> None:
        path = _path(target)
        if path is not None:
            self._write(path, value, target.lineno)

    def _write(self, path: KeyPath, value: ast.expr, line: int) -> None:
        inherited = self._below(value) if isinstance(value, ast.Name) else {}
        self.lines = {known: at for known, at in self.lines.items() if known[: len(path)] != path}
        self.lines[path] = line
        self.lines.update({path + inner: at for inner, at in inherited.items()})
        self._read(path, value)

    def _read(self, path: KeyPath, value: ast.expr) -> None:
        """Record the lines of the keys that the expression `value` writes below `path`."""
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

    def _read_call(self, path: KeyPath, call: ast.Call) -> None:
        for argument in call.args:
            self._read(path, argument)
        for keyword in call.keywords:
            if keyword.arg is None:
                self._read(path, keyword.value)
            else:
                self._write((*path, keyword.arg), keyword.value, keyword.lineno)

    def _below(self, name: ast.Name) -> dict[KeyPath, int]:
        return {known[1:]: at for known, at in self.lines.items() if known[0] == name.id and len(known) > 1}


def _path(target: ast.expr) -> KeyPath | None:
    """`a["b"]["c"]` -> ("a", "b", "c"); None unless it is a name with constant keys."""
    if isinstance(target, ast.Name):
        return (target.id,)
    if isinstance(target, ast.Subscript) and isinstance(target.slice, ast.Constant):
        path = _path(target.value)
        return None if path is None else (*path, str(target.slice.value))
    return None


@dataclass
class Layer:
    """Nested dicts of values, and for each dotted key where it was written."""

    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)

    def put(self, key: str, value: Any, origin: str) -> None:
        """Set a dotted key, creating sections on the way. Origins of the old value are removed."""
        *parents, name = key.split(".")
        section = self.values
        for depth, parent in enumerate(parents, 1):
            if not isinstance(section.get(parent), dict):
                section[parent] = {}
            self.origins.setdefault(".".join(parents[:depth]), origin)
            section = section[parent]
        self._forget(key)
        section[name] = value
        for inner in ("", *(f".{below}" for below in dotted(value))):
            self.origins[key + inner] = origin

    def get(self, key: str) -> Any:
        """The value of a dotted key; None when it is not set."""
        value: Any = self.values
        for name in key.split("."):
            value = value.get(name) if isinstance(value, dict) else None
        return value

    def has(self, key: str) -> bool:
        parent, _, name = key.rpartition(".")
        section = self.get(parent) if parent else self.values
        return isinstance(section, dict) and name in section

    def drop(self, key: str) -> tuple[Any, str]:
        """Remove a dotted key that is set; returns its value and origin."""
        value, origin = self.get(key), self.origin(key)
        parent, _, name = key.rpartition(".")
        del (self.get(parent) if parent else self.values)[name]
        self._forget(key)
        return value, origin

    def origin(self, key: str) -> str:
        """Where the key, or the nearest section around it, was written. "" for a section that was never written."""
        while key and key not in self.origins:
            key = key.rpartition(".")[0]
        return self.origins.get(key, "")

    def cover(self, upper: Layer) -> None:
        """Lay `upper` over this layer: dicts merge key by key, everything else is replaced."""
        self._merge(self.values, upper.values, "", upper)

    def _merge(self, below: dict[str, Any], above: dict[str, Any], prefix: str, upper: Layer) -> None:
        for name, value in above.items():
            if name == DELETE:
                continue
            key = prefix + str(name)
            merging = isinstance(value, dict) and isinstance(below.get(name), dict) and not value.get(DELETE)
            if not merging:
                self._forget(key)
                below[name] = {} if isinstance(value, dict) else value
            if key in upper.origins:
                self.origins[key] = upper.origins[key]
            if isinstance(value, dict):
                self._merge(below[name], value, f"{key}.", upper)

    def _forget(self, key: str) -> None:
        for known in [known for known in self.origins if known == key or known.startswith(f"{key}.")]:
            del self.origins[known]


def dotted(value: Any, prefix: str = "") -> Iterator[str]:
    """All dotted keys inside nested dicts, sections included; nothing for a plain value."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield f"{prefix}{name}"
            yield from dotted(inner, f"{prefix}{name}.")
