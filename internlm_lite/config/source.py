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
import signal
import stat
import threading
import traceback
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any, NoReturn

from internlm_lite.config.masking import masked
from internlm_lite.config.plain import one_line, plain, shown, shown_key
from internlm_lite.errors import ConfigError
from internlm_lite.units import human_bytes

DELETE = "_delete_"
"""Key of a dict that replaces the dict below it instead of merging into it."""

KeyPath = tuple[str, ...]
"""("data", "seq_len")"""


LONGEST_RUN_SECONDS = 60.0
_LARGEST_FILE, _MOST_LINES = 2**22, 20_000
_GIVEN = "__given__"
"""Variable of the running file that holds the values of the replaced assignments."""


@dataclass
class ConfigFile:
    """One config file as it was run."""

    path: Path
    layer: Layer
    bases: list[Path]
    variables: set[str]
    """UPPER_CASE names that the file assigns."""
    given: dict[str, Any]
    """The values of those that it has at its end: they replace the variables of its bases."""


def run_file(path: Path, replacements: Mapping[str, Any]) -> ConfigFile:
    """Run the file with the UPPER_CASE assignments in `replacements` replaced.

    Raises ConfigError naming file, line and cause when the file cannot be read or fails to run.
    """
    name = _name(path)
    try:
        return _run(path, name, replacements)
    except (ConfigError, KeyboardInterrupt):
        raise
    except BaseException as error:
        line = error.lineno or 1 if isinstance(error, SyntaxError) else _line_of(error, str(path))
        raise ConfigError(str(masked(one_line(f"{name}:{line}: {_cause(error)}")))) from error


def _run(path: Path, name: str, replacements: Mapping[str, Any]) -> ConfigFile:
    tree = ast.parse(_source(path, name), filename=str(path))
    _refuse_read_base(tree, path, name)
    written = written_lines(tree)
    assignments = [node for node in ast.walk(tree) if isinstance(node, (ast.Assign, ast.AnnAssign, ast.AugAssign))]
    variables = {name for node in assignments for name in _stored(node) if is_variable(name)}
    tree = ast.fix_missing_locations(_Replace(replacements).visit(tree))
    namespace: dict[str, Any] = {"__name__": "__config__", "__file__": str(path), _GIVEN: replacements}
    with _limited():
        exec(compile(tree, str(path), "exec"), namespace)
        values = {shown_key(key): plain(value) for key, value in namespace.items() if _is_key(key, value)}
    origins = {key: f"{name}:{written.line_of(key) or 1}" for key in dotted(values)}
    bases = _bases(path, namespace.get("_base_"), f"{name}:{written.line_of('_base_') or 1}")
    given = {variable: namespace[variable] for variable in variables & namespace.keys()}
    return ConfigFile(path, Layer(values, origins), bases, variables, given)


@contextmanager
def _limited() -> Iterator[None]:
    """The file cannot end the process without a word, nor run for ever."""
    ends = {name: getattr(os, name) for name in ("_exit", "abort")}
    timed = threading.current_thread() is threading.main_thread()
    try:
        for name in ends:
            setattr(os, name, _refuse_exit)
        if timed:
            handler = signal.signal(signal.SIGALRM, _refuse_to_wait)
            timer = signal.setitimer(signal.ITIMER_REAL, LONGEST_RUN_SECONDS)
        yield
    finally:
        if timed:
            signal.setitimer(signal.ITIMER_REAL, *timer)
            signal.signal(signal.SIGALRM, handler)
        for name, end in ends.items():
            setattr(os, name, end)


def _refuse_exit(*_: object) -> NoReturn:
    raise SystemExit("a config file must not end the process")


def _refuse_to_wait(*_: int | FrameType | None) -> NoReturn:
    raise SystemExit(f"it was still running after {LONGEST_RUN_SECONDS:g} s")


def is_variable(name: str) -> bool:
    """UPPER_CASE names are the user's variables, lower-case names are keys."""
    return name.isupper()


def _name(path: Path) -> str:
    """The path as messages show it: relative when the file is under the working directory."""
    relative = os.path.relpath(path)
    return one_line(str(path) if relative.startswith(os.pardir) else relative)


def _source(path: Path, name: str) -> bytes:
    if path.is_dir():
        raise ConfigError(f"{name}: found a folder, expected a Python config file")
    if path.suffix != ".py":
        raise ConfigError(f"{name}: found the file name ending {path.suffix!r}, expected a Python config file, .py")
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > _LARGEST_FILE:
            found = human_bytes(status.st_size) if stat.S_ISREG(status.st_mode) else "a pipe, device or socket"
            raise ConfigError(f"{name}: found {found}, expected a file of at most {human_bytes(_LARGEST_FILE)}")
        source = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{name}: cannot read the config file: {error.strerror}; check the path") from error
    if (lines := source.count(b"\n")) > _MOST_LINES:
        raise ConfigError(
            f"{name}:{_MOST_LINES}: found {lines} lines, expected at most {_MOST_LINES}: read data from a file"
        )
    return source


def _refuse_read_base(tree: ast.Module, path: Path, name: str) -> None:
    """mmengine's `with read_base(): from .x import *` is answered with the `_base_` that stands for it."""
    for block in (node for node in ast.walk(tree) if isinstance(node, ast.With)):
        if any(ast.unparse(item.context_expr).endswith("read_base()") for item in block.items):
            modules = [node for node in ast.walk(block) if isinstance(node, ast.ImportFrom)]
            bases = [_file_of(node, path.parent) for node in modules]
            raise ConfigError(
                f"{name}:{block.lineno}: found read_base(); write _base_ = {bases!r} instead of this block and its "
                "import; dicts are then merged key by key (_delete_=True in a dict replaces the one below), and "
                "UPPER_CASE variables of this file replace those of its bases: remove the ones that should not"
            )


def _file_of(node: ast.ImportFrom, folder: Path) -> str:
    """The file of an imported module, relative to `folder`, where it or a folder around it has such a file."""
    file = Path(*(node.module or "").split(".")).with_suffix(".py")
    if node.level:
        return os.path.join(*[os.pardir] * (node.level - 1), file)
    roots = [Path(os.path.abspath(folder)), *Path(os.path.abspath(folder)).parents]
    return next((os.path.relpath(root / file, folder) for root in roots if (root / file).is_file()), str(file))


def _line_of(error: BaseException, filename: str) -> int:
    """The line of the config file that was running; 1 when the file never ran (its compilation failed)."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == filename]
    return (lines[-1] if lines else None) or 1


def _cause(error: BaseException) -> str:
    if isinstance(error, SyntaxError):
        return f"not valid Python: {error.msg}"
    if isinstance(error, KeyError) and any(
        frame.name in ("__getitem__", "__missing__") and frame.filename.endswith(("os.py", "<frozen os>"))
        for frame in traceback.extract_tb(error.__traceback__)
    ):
        return f"the environment variable {error.args[0]} is not set; export it before starting"
    try:
        text = str(error)
    except Exception:  # noqa: BLE001  the file's own code runs
        text = "its message cannot be shown"
    hint = '; another config file is read by _base_ = "other.py"' if isinstance(error, ImportError) else ""
    return f"the config file failed while running: {type(error).__name__}: {text}{hint}"


def _is_key(name: str, value: Any) -> bool:
    """Whether a top-level name is a config key: no module, function, class, _private name or UPPER_CASE variable."""
    if name.startswith("_") or isinstance(value, ModuleType) or callable(value):
        return False
    return not is_variable(name) or name == "JOB_NAME"


def _bases(path: Path, base: Any, where: str) -> list[Path]:
    names = [base] if isinstance(base, str) else base or []
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise ConfigError(
            f'{where}: _base_: found {shown(base)}, expected a file name or a list of them, such as "base.py"'
        )
    files = [path.parent / name for name in names]
    for file in files:
        if not os.path.exists(file):
            raise ConfigError(f"{where}: _base_: found no file {_name(file)}; the path starts at this file's folder")
    return files


def _stored(node: ast.AST) -> list[str]:
    """The names that a statement assigns."""
    return [name.id for name in ast.walk(node) if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store)]


class _Replace(ast.NodeTransformer):
    """Replaces the values assigned to `names`; bodies of functions are unchanged."""

    def __init__(self, names: Container[str]) -> None:
        self.names = names

    def visit_Assign(self, node: ast.Assign) -> ast.stmt | list[ast.stmt]:
        match node.targets:
            case [ast.Name(id=name)] if name in self.names:
                node.value = _given(name)
                return node
        return self._restored(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.stmt:
        if isinstance(node.target, ast.Name) and node.target.id in self.names:
            node.value = _given(node.target.id)
        return node

    def visit_AugAssign(self, node: ast.AugAssign) -> ast.stmt | list[ast.stmt]:
        return self._restored(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.stmt:
        return node

    def _restored(self, node: ast.stmt) -> ast.stmt | list[ast.stmt]:
        """`A, B = ...` and `A += ...` are kept; a statement that sets the replaced names again is added after them."""
        again = [
            ast.Assign([ast.Name(name, ast.Store())], _given(name)) for name in _stored(node) if name in self.names
        ]
        return [node, *(ast.copy_location(statement, node) for statement in again)]


def _given(name: str) -> ast.expr:
    return ast.Subscript(ast.Name(_GIVEN, ast.Load()), ast.Constant(name), ast.Load())


@dataclass
class Written:
    """The line of the last statement that writes a variable, section or key, and those of the keys below it."""

    line: int = 0
    below: dict[str, Written] = field(default_factory=dict)

    def at(self, path: KeyPath) -> Written | None:
        found: Written | None = self
        for name in path:
            found = found and found.below.get(name)
        return found

    def line_of(self, key: str) -> int:
        """The line of a dotted key, or of the nearest section around it that is known; 0: none."""
        found = self
        for name in key.split("."):
            if name not in found.below:
                break
            found = found.below[name]
        return found.line


def written_lines(tree: ast.Module) -> Written:
    """The lines of everything that the file writes."""
    visitor = _Writer()
    visitor.visit(tree)
    return visitor.root


class _Writer(ast.NodeVisitor):
    """Follows assignments as Python does: a name shares the entries of the dict it stands for."""

    def __init__(self) -> None:
        self.root = Written()

    def visit_Assign(self, node: ast.Assign) -> None:
        for target in node.targets:
            self._assign(target, node.value)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self._assign(node.target, node.value)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        entry = self._entry(node.target)
        if entry is not None:
            self._read(entry, node.value)

    def visit_Call(self, node: ast.Call) -> None:
        if isinstance(node.func, ast.Attribute) and node.func.attr == "update":
            entry = self._entry(node.func.value)
            if entry is not None:
                self._read_call(entry, node)

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.Lambda) -> None:
        """Assignments inside a function or lambda are no keys of the file."""

    visit_Lambda = visit_FunctionDef

    def _entry(self, target: ast.expr) -> Written | None:
        path = _path(target)
        return self.root.at(path) if path else None

    def _assign(self, target: ast.expr, value: ast.expr) -> None:
        path = _path(target)
        entry = self.root.at(path[:-1])
        if not path:
            self.visit(target)
        elif entry is not None:
            self._write(entry, path[-1], value, target.lineno)

    def visit_Name(self, node: ast.Name) -> None:
        """A name that a loop, a tuple or `with` sets."""
        if isinstance(node.ctx, ast.Store):
            self.root.below[node.id] = Written(node.lineno)

    def _write(self, entry: Written, name: str, value: ast.expr, line: int) -> None:
        known = self.root.below.get(value.id) if isinstance(value, ast.Name) else None
        entry.below[name] = Written(line, known.below if known else {})
        if known is None:
            self._read(entry.below[name], value)

    def _read(self, entry: Written, value: ast.expr) -> None:
        """Record the lines of the keys that the expression `value` writes below `entry`."""
        if isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id == "dict":
            self._read_call(entry, value)
        elif isinstance(value, ast.Dict):
            for key, inner in zip(value.keys, value.values, strict=True):
                if key is None:
                    self._read(entry, inner)
                elif isinstance(key, ast.Constant) and isinstance(key.value, str):
                    self._write(entry, key.value, inner, key.lineno)
        elif isinstance(value, ast.BinOp) and isinstance(value.op, ast.BitOr):
            self._read(entry, value.left)
            self._read(entry, value.right)
        elif isinstance(value, ast.Name) and value.id in self.root.below:
            entry.below.update(self.root.below[value.id].below)

    def _read_call(self, entry: Written, call: ast.Call) -> None:
        for argument in call.args:
            self._read(entry, argument)
        for keyword in call.keywords:
            if keyword.arg is None:
                self._read(entry, keyword.value)
            else:
                self._write(entry, keyword.arg, keyword.value, keyword.lineno)


def _path(target: ast.expr) -> KeyPath:
    """`a["b"]["c"]` -> ("a", "b", "c"); () unless it is a name with constant keys."""
    if isinstance(target, ast.Name):
        return (target.id,)
    if isinstance(target, ast.Subscript) and isinstance(target.slice, ast.Constant):
        path = _path(target.value)
        return path and (*path, str(target.slice.value))
    return ()


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
        self._forget(key, section.get(name))
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
        self._forget(key, value)
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
                self._forget(key, below.get(name))
                below[name] = {} if isinstance(value, dict) else value
            if key in upper.origins:
                self.origins[key] = upper.origins[key]
            if isinstance(value, dict):
                self._merge(below[name], value, f"{key}.", upper)

    def _forget(self, key: str, value: Any) -> None:
        for inner in (key, *dotted(value, f"{key}.")):
            self.origins.pop(inner, None)


def dotted(value: Any, prefix: str = "") -> Iterator[str]:
    """All dotted keys inside nested dicts, sections included; nothing for a plain value."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield f"{prefix}{name}"
            yield from dotted(inner, f"{prefix}{name}.")
