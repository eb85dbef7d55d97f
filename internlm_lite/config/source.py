"""Run a Python config file and keep what it defines: lower-case names (sections) and JOB_NAME.

SEQ_LEN=4096 on the command line:   SEQ_LEN = 2048  ->  SEQ_LEN = 4096   before the file runs, so that
                                    data = dict(seq_len=SEQ_LEN) follows
"""

from __future__ import annotations

import ast
import os
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from internlm_lite.config.layer import Layer, dotted
from internlm_lite.config.lines import written_lines
from internlm_lite.errors import ConfigError


@dataclass
class Source:
    """One config file as it was run."""

    path: Path
    layer: Layer
    bases: list[Path]
    variables: set[str] = field(default_factory=set)
    """UPPER_CASE names that the file assigns."""


def run_file(path: Path, replacements: Mapping[str, ast.expr]) -> Source:
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
    return Source(path, Layer(values, origins), bases, variables)


def is_variable(name: str) -> bool:
    """UPPER_CASE names are the user's own, lower-case names are keys."""
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
    """Modules, functions, classes, names with a leading _ and the user's variables are no keys."""
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
    """Gives assignments of replaced names their new value; functions are left alone."""

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
        """`A, B = ...` and `A += ...` run as they are, then replaced names get their value again."""
        again = [
            ast.copy_location(ast.Assign([ast.Name(name, ast.Store())], self.replacements[name]), node)
            for name in _stored(node)
            if name in self.replacements
        ]
        return [node, *again]
