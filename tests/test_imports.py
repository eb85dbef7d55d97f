"""The rules of docs/architecture.md that a parser can see: where imports may point, and what no file may do.

Every check is a function `problems(...)` on syntax trees; for each there is also a test that it sees a planted offence.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "internlm_lite"
FLOORS = {
    1: {"errors", "units", "batch", PACKAGE},  # the package itself: its version
    2: {"config"},
    3: {"runtime"},
    4: {"mesh"},
    5: {"layers", "optim", "pipeline", "checkpoint", "monitor", "data", "faults"},
    6: {"models"},
    7: {"generate"},
    8: {"evaluate"},
    9: {"train"},
    10: {"apps.planner", "apps.convert", "apps.report", "apps.doctor", "apps.bench", "apps.attention_maps"},
    11: {"cli"},
    12: {"train.py", "tools", "__main__"},
}
TOP = FLOORS[11] | FLOORS[12] | {"apps.bench"}
FLOOR_OF = {wing: floor for floor, wings in FLOORS.items() for wing in wings}
PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
PICKLE_CALLS = {"torch.load", "torch.save", "pickle.load", "pickle.loads", "yaml.load", "yaml.unsafe_load"}
MUTATORS = {"append", "extend", "insert", "add", "update", "setdefault", "pop", "popitem", "clear", "remove", "discard"}
CONTAINERS = {"list", "dict", "set", "defaultdict", "OrderedDict", "Counter", "deque", "bytearray"}

Trees = dict[str, ast.Module]
"""Module name ("internlm_lite.mesh.comm", "internlm_lite.mesh.__init__", "tools.demo", "train") -> its syntax tree."""


def read_trees() -> Trees:
    files = [*ROOT.glob(f"{PACKAGE}/**/*.py"), *ROOT.glob("tools/*.py"), *ROOT.glob("train.py")]
    names = [".".join(file.relative_to(ROOT).with_suffix("").parts) for file in files]
    return {name: ast.parse(file.read_text("utf-8"), str(file)) for name, file in zip(names, files, strict=True)}


def wing(module: str) -> str:
    """The tenant of a floor that a module belongs to: "mesh", "errors", "tools", "train.py"."""
    parts = module.split(".")
    if parts[0] == PACKAGE:
        return ".".join(parts[1 : 3 if parts[1:2] == ["apps"] else 2]) or PACKAGE
    return "tools" if parts[0] == "tools" else f"{parts[0]}.py"


def imports(tree: ast.Module, modules: set[str]) -> Iterator[tuple[int, str]]:
    """(line, module) of every import of our own modules, wherever it stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            # `from internlm_lite.mesh import comm` names a module, `from internlm_lite.batch import Batch` does not
            names = [name if (name := f"{base}.{alias.name}") in modules else base for alias in node.names]
        else:
            continue
        for name in names:
            if name.split(".")[0] in {PACKAGE, "tools", "train", ""}:
                yield node.lineno, name


def direction_problems(trees: Trees) -> list[str]:
    """Imports that run up, sideways between wings of one floor, or are relative."""
    problems = []
    for module, tree in trees.items():
        here = wing(module)
        for line, target in imports(tree, set(trees)):
            there = wing(target)
            where = f"{module}:{line} imports {target}"
            if target.startswith("."):
                problems.append(f"{where}: relative; write the whole name")
            elif there not in FLOOR_OF or here not in FLOOR_OF:
                problems.append(
                    f"{where}: {there if there not in FLOOR_OF else here} has no floor in docs/architecture.md"
                )
            elif here == there and here != "tools":
                continue
            elif FLOOR_OF[there] >= FLOOR_OF[here]:
                problems.append(f"{where}: floor {FLOOR_OF[here]} may only import lower floors, not {FLOOR_OF[there]}")
    return list(dict.fromkeys(problems))


def circle_problems(trees: Trees) -> list[str]:
    """Import circles between modules, imports under TYPE_CHECKING and inside functions included."""
    arrows = {module: {name for _, name in imports(tree, set(trees))} & set(trees) for module, tree in trees.items()}
    done: set[str] = set()

    def walk(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [" -> ".join([*path[path.index(module) :], module])]
        if module in done:
            return []
        found = [circle for target in sorted(arrows[module]) for circle in walk(target, [*path, module])]
        done.add(module)
        return found

    return [circle for module in sorted(arrows) for circle in walk(module, [])]


def init_problems(trees: Trees) -> list[str]:
    """Packages whose __init__ holds more or less than one docstring line.

    The package itself has __version__ as well: users ask for it there, and pyproject.toml takes it from there.
    """
    problems = []
    for module, tree in trees.items():
        docstring = ast.get_docstring(tree, clean=False)
        others = [_assigned(node)[0] for node in tree.body[1:]]
        expected = [["__version__"]] if module == f"{PACKAGE}.__init__" else []
        if module.endswith(".__init__") and (docstring is None or "\n" in docstring or others != expected):
            problems.append(f"{module}: expected one line, a docstring, and nothing else")
    return problems


def _functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def _assigned(statement: ast.stmt) -> tuple[list[str], ast.expr | None]:
    """Plain names a statement binds, and the value."""
    if isinstance(statement, ast.Assign):
        return [target.id for target in statement.targets if isinstance(target, ast.Name)], statement.value
    if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
        return [statement.target.id], statement.value
    return [], None


def _is_container(value: ast.expr | None) -> bool:
    if isinstance(value, ast.Call):
        return ast.unparse(value.func).rpartition(".")[2] in CONTAINERS
    return isinstance(value, ast.List | ast.Dict | ast.Set | ast.ListComp | ast.DictComp | ast.SetComp)


def _mutated(node: ast.AST) -> str | None:
    """The plain name whose content `node` changes, if it changes one."""
    target: ast.expr | None = None
    if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store | ast.Del):
        target = node.value
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in MUTATORS:
        target = node.func.value
    elif isinstance(node, ast.AugAssign):
        target = node.target
    return target.id if isinstance(target, ast.Name) else None


def global_problems(trees: Trees) -> list[str]:
    """`global` statements, module-level containers that are no constants, and constants that a function changes."""
    problems = []
    for module, tree in trees.items():
        containers = set()
        for statement in tree.body:
            names, value = _assigned(statement)
            if _is_container(value):
                containers.update(names)
                problems += [
                    f"{module}:{statement.lineno} {name}: a mutable global; make it a CONSTANT or an attribute"
                    for name in names
                    if name != name.upper()
                ]
        for function in _functions(tree):
            for node in ast.walk(function):
                if isinstance(node, ast.Global):
                    problems.append(f"{module}:{node.lineno} global {', '.join(node.names)}")
                elif (name := _mutated(node)) in containers:
                    problems.append(f"{module}:{getattr(node, 'lineno', 0)} changes the module's {name}")
    return problems


def environment_problems(trees: Trees) -> list[str]:
    """Reads of environment variables outside runtime/dist_env.py; programs may hand os.environ on as a whole."""
    problems = []
    for module, tree in trees.items():
        if module == f"{PACKAGE}.runtime.dist_env":
            continue
        handed_on: set[int] = set()
        if wing(module) in TOP:
            for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
                handed_on.update(id(value) for value in [*call.args, *(keyword.value for keyword in call.keywords)])
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and ast.unparse(node) in {"os.environ", "os.getenv", "os.putenv"}:
                used = id(node) not in handed_on
            elif isinstance(node, ast.ImportFrom) and node.module == "os":
                used = not {"environ", "getenv", "putenv"}.isdisjoint(alias.name for alias in node.names)
            else:
                continue
            if used:
                problems.append(f"{module}:{node.lineno} {ast.unparse(node)}: belongs into runtime/dist_env.py")
    return problems


def pickle_problems(trees: Trees) -> list[str]:
    """Anything that reads or writes pickles."""
    problems = []
    for module, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Import) and (names := {alias.name for alias in node.names} & PICKLES):
                problems.append(f"{module}:{node.lineno} imports {', '.join(names)}")
            elif isinstance(node, ast.ImportFrom) and node.module in PICKLES:
                problems.append(f"{module}:{node.lineno} imports {node.module}")
            elif isinstance(node, ast.Call):
                allowed = [keyword for keyword in node.keywords if keyword.arg == "allow_pickle"]
                if ast.unparse(node.func) in PICKLE_CALLS:
                    problems.append(f"{module}:{node.lineno} {ast.unparse(node.func)} reads or writes pickles")
                elif any(not (isinstance(k.value, ast.Constant) and k.value.value is False) for k in allowed):
                    problems.append(f"{module}:{node.lineno} allow_pickle must stay False")
    return problems


def swallow_problems(trees: Trees) -> list[str]:
    """`except Exception: pass` and its kin: a wide net whose catch is thrown away."""
    problems = []
    for module, tree in trees.items():
        for node in ast.walk(tree):
            if not isinstance(node, ast.ExceptHandler):
                continue
            wide = node.type is None or ast.unparse(node.type) in {"Exception", "BaseException"}
            if wide and all(isinstance(statement, ast.Pass | ast.Continue) for statement in node.body):
                problems.append(f"{module}:{node.lineno} swallows every exception")
    return problems


def length_problems(trees: Trees, longest: int = 60) -> list[str]:
    """Functions that do not fit a screen."""
    return [
        f"{module}:{function.lineno} {function.name}: {lines} lines; expected at most {longest}"
        for module, tree in trees.items()
        for function in _functions(tree)
        if (lines := (function.end_lineno or 0) - function.lineno + 1) > longest
    ]


CHECKS: list[Callable[[Trees], list[str]]] = [
    direction_problems,
    circle_problems,
    init_problems,
    global_problems,
    environment_problems,
    pickle_problems,
    swallow_problems,
    length_problems,
]


@pytest.fixture(scope="module")
def trees() -> Trees:
    return read_trees()


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_house_keeps_its_rules(check: Callable[[Trees], list[str]], trees: Trees) -> None:
    problems = check(trees)
    assert not problems, "\n".join(problems)


OFFENCES: list[tuple[Callable[[Trees], list[str]], dict[str, str]]] = [
    (direction_problems, {"internlm_lite.mesh.comm": "from internlm_lite.optim import zero"}),
    (direction_problems, {"internlm_lite.data.data_loader": "import internlm_lite.checkpoint.format.manifest"}),
    (direction_problems, {"internlm_lite.generate.sample": "def f():\n    from internlm_lite.train import step"}),
    (direction_problems, {"internlm_lite.mesh.comm": "from .mesh import Group"}),
    (direction_problems, {"internlm_lite.extras.new": "from internlm_lite.errors import DataError"}),
    (direction_problems, {"tools.bench": "from tools import demo"}),
    (direction_problems, {"internlm_lite.errors": "from internlm_lite import units", "internlm_lite.units": ""}),
    (
        circle_problems,
        {
            "internlm_lite.data.a": "from internlm_lite.data.b import x",
            "internlm_lite.data.b": "if TYPE_CHECKING:\n    from internlm_lite.data import a",
        },
    ),
    (init_problems, {"internlm_lite.data.__init__": '"""Data."""\nfrom x import y'}),
    (init_problems, {"internlm_lite.data.__init__": ""}),
    (init_problems, {"internlm_lite.data.__init__": '"""Data."""\n__version__ = "1"'}),
    (init_problems, {"internlm_lite.__init__": '"""All."""'}),
    (init_problems, {"internlm_lite.__init__": '"""All."""\n__version__ = "1"\nfrom x import y'}),
    (global_problems, {"internlm_lite.data.a": "seen = []"}),
    (global_problems, {"internlm_lite.data.a": "SEEN: dict[str, int] = {}\ndef f():\n    SEEN['x'] = 1"}),
    (global_problems, {"internlm_lite.data.a": "SEEN = set()\ndef f():\n    SEEN.add(1)"}),
    (global_problems, {"internlm_lite.data.a": "N = 0\ndef f():\n    global N\n    N = 1"}),
    (environment_problems, {"internlm_lite.data.a": "import os\nx = os.environ['HOME']"}),
    (environment_problems, {"internlm_lite.data.a": "import os\nf(os.environ)"}),
    (environment_problems, {"internlm_lite.data.a": "from os import getenv"}),
    (environment_problems, {"train": "import os\nx = os.environ.get('HOME')"}),
    (pickle_problems, {"internlm_lite.data.a": "import pickle"}),
    (pickle_problems, {"internlm_lite.data.a": "from shelve import open"}),
    (pickle_problems, {"internlm_lite.data.a": "x = torch.load('f', weights_only=True)"}),
    (pickle_problems, {"internlm_lite.data.a": "x = np.load('f', allow_pickle=True)"}),
    (swallow_problems, {"internlm_lite.data.a": "try:\n    f()\nexcept Exception:\n    pass"}),
    (swallow_problems, {"internlm_lite.data.a": "for x in y:\n    try:\n        f()\n    except:\n        continue"}),
    (length_problems, {"internlm_lite.data.a": "def f():\n" + "    x = 1\n" * 60}),
]


@pytest.mark.parametrize(("check", "sources"), OFFENCES, ids=lambda value: getattr(value, "__name__", None))
def test_an_offence_is_seen(check: Callable[[Trees], list[str]], sources: dict[str, str]) -> None:
    assert check({module: ast.parse(source) for module, source in sources.items()})


def test_what_is_allowed_passes() -> None:
    sources = {
        "internlm_lite.__init__": '"""All."""\n__version__ = "1"',
        "internlm_lite.data.__init__": '"""Data."""',
        "internlm_lite.data.a": "from internlm_lite.data import b\nfrom internlm_lite.errors import DataError",
        "internlm_lite.data.b": "TABLE = {'x': 1}\ndef f():\n    seen = []\n    seen.append(TABLE['x'])",
        "internlm_lite.errors": "try:\n    f()\nexcept OSError:\n    pass",
        "internlm_lite.cli.main": "from internlm_lite import __version__",
        "train": "import os\nplace = read_dist_env(os.environ, launcher='auto')",
        "tools.demo": "from internlm_lite.train import loop\nimport internlm_lite.generate.decode",
    }
    trees = {module: ast.parse(source) for module, source in sources.items()}
    assert [problem for check in CHECKS for problem in check(trees)] == []
