"""How large the house is, room by room, and what no function in it may be. `make figures` prints it.

A room that outgrows its ceiling in tests/ceilings.json fails the test: make it smaller, or raise the ceiling in
the same change and say in its description what the lines are for.
"""

from __future__ import annotations

import ast
import json
from collections import Counter
from collections.abc import Iterator

import pytest

from tests.test_imports import PACKAGE, ROOT, Trees, circle_problems, direction_problems, length_problems, read_trees

CEILINGS = ROOT / "tests" / "ceilings.json"
CORE = ("mesh", "layers", "models", "optim", "pipeline", "generate", "batch", "errors", "units")
MOST_PARAMETERS = 6
MOST_LONG_SIGNATURES = 3


def room(module: str) -> str:
    """ "internlm_lite.apps.report.page" -> "apps.report", "internlm_lite.mesh.comm" -> "mesh"."""
    parts = module.split(".")
    return ".".join(parts[1 : 3 if parts[1:2] == ["apps"] else 2]) or PACKAGE


def lines_of_rooms(trees: Trees) -> dict[str, int]:
    """Lines of Python of the package by room."""
    lines: Counter[str] = Counter()
    for module in trees:
        if module.startswith(f"{PACKAGE}.") or module == PACKAGE:
            file = ROOT.joinpath(*module.split(".")).with_suffix(".py")
            lines[room(module)] += len(file.read_text("utf-8").splitlines())
    return dict(sorted(lines.items()))


def functions(trees: Trees) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for module, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield module, node


def long_signatures(trees: Trees) -> list[str]:
    """Functions with too many parameters, self and cls not counted."""
    found = []
    for module, function in functions(trees):
        parameters = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
        count = sum(parameter.arg not in ("self", "cls") for parameter in parameters)
        if count > MOST_PARAMETERS:
            found.append(f"{module}:{function.lineno} {function.name} has {count} parameters")
    return found


def positional_booleans(trees: Trees) -> list[str]:
    """Booleans of the core that a caller may pass without their name."""
    found = []
    for module, function in functions(trees):
        if room(module) not in CORE or (function.name.startswith("__") and function.name != "__init__"):
            continue
        for parameter in [*function.args.posonlyargs, *function.args.args]:
            if parameter.annotation is not None and ast.unparse(parameter.annotation) == "bool":
                found.append(f"{module}:{function.lineno} {function.name}({parameter.arg}: bool): make it keyword-only")
    return found


def repeated_names(trees: Trees) -> list[str]:
    """Names of modules and of classes that occur twice in the package."""
    modules, classes = Counter[str](), Counter[str]()
    for module, tree in trees.items():
        if module.startswith(f"{PACKAGE}.") and not module.startswith(f"{PACKAGE}.cli.") and "__" not in module:
            modules[module.rpartition(".")[2]] += 1
        if module.startswith(f"{PACKAGE}."):
            classes.update(node.name for node in tree.body if isinstance(node, ast.ClassDef))
    found = [f"module {name}.py stands {n} times" for name, n in modules.items() if n > 1]
    return found + [f"class {name} stands {n} times" for name, n in classes.items() if n > 1]


@pytest.fixture(scope="module")
def trees() -> Trees:
    return read_trees()


def test_no_room_outgrows_its_ceiling(trees: Trees) -> None:
    ceilings, lines = json.loads(CEILINGS.read_text("utf-8")), lines_of_rooms(trees)
    print("\n".join(f"{name:16s} {count:6d} of {ceilings.get(name, 0)}" for name, count in lines.items()))
    outgrown = {name: count for name, count in lines.items() if count > ceilings.get(name, 0)}
    assert not outgrown, f"outgrew their ceiling in {CEILINGS.name}: {outgrown}"
    assert set(ceilings) == set(lines), "tests/ceilings.json has rooms that do not exist, or lacks some"


def test_signatures_and_names(trees: Trees) -> None:
    assert positional_booleans(trees) == []
    assert repeated_names(trees) == []
    assert len(long_signatures(trees)) <= MOST_LONG_SIGNATURES, "\n".join(long_signatures(trees))


PLANTED = [
    (long_signatures, {"internlm_lite.data.a": "def f(self, a, b, c, d, *, e, f, g): ..."}),
    (positional_booleans, {"internlm_lite.mesh.a": "def f(a: int, b: bool): ..."}),
    (repeated_names, {"internlm_lite.mesh.a": "", "internlm_lite.data.a": ""}),
    (repeated_names, {"internlm_lite.mesh.a": "class A: ...", "internlm_lite.data.b": "class A: ..."}),
]


@pytest.mark.parametrize(("figure", "sources"), PLANTED, ids=lambda value: getattr(value, "__name__", None))
def test_what_is_planted_is_seen(figure, sources: dict[str, str]) -> None:
    assert figure({module: ast.parse(source) for module, source in sources.items()})


def main() -> None:
    """Print the figures; with --set, make the present sizes the ceilings."""
    import sys

    trees = read_trees()
    lines = lines_of_rooms(trees)
    if "--set" in sys.argv:
        CEILINGS.write_text(json.dumps(lines, indent=1) + "\n", "utf-8")
    for name, count in lines.items():
        print(f"{name:16s} {count:6d}")
    print(
        f"package without bench {sum(lines.values()) - lines['apps.bench']}, core {sum(lines.get(n, 0) for n in CORE)}"
    )
    checks = (
        length_problems,
        long_signatures,
        positional_booleans,
        repeated_names,
        direction_problems,
        circle_problems,
    )
    for check in checks:
        found = check(trees)
        print(f"{check.__name__}: {len(found)}", *found, sep="\n    ")


if __name__ == "__main__":
    main()
