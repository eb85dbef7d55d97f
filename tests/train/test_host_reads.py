"""Where the host reads the device: through `mesh.comm` alone, where the watchdog sees that a rank waits.

tests/train/test_metrics_cost.py counts the reads of a step as it runs, also those that hide in `bool(tensor)`.
"""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

import internlm_lite

PACKAGE = Path(internlm_lite.__file__).parent
ROOMS = ("batch.py", "checkpoint/save", "generate", "layers", "mesh", "models", "monitor", "optim", "pipeline", "train")
READS = {"item", "tolist", "cpu", "numpy", "nonzero", "synchronize"}
ALLOWED = {
    ("mesh/comm.py", "read", "tolist"): 1,
    ("mesh/comm.py", "value", "tolist"): 1,  # of a tensor on the host
    ("mesh/comm.py", "value", "synchronize"): 1,
    ("layers/flash.py", "_difference", "item"): 1,  # at the start
    ("train/loop.py", "_checked", "nonzero"): 1,  # of a batch on the host
    ("checkpoint/save/staging.py", "wait_copied", "synchronize"): 1,  # in the writer thread
}


def reads(file: Path) -> Counter[tuple[str, str, str]]:
    """(file, function, method) of every call that reads a tensor's values, if its receiver is a tensor on a device."""
    found: Counter[tuple[str, str, str]] = Counter()

    def visit(node: ast.AST, function: str) -> None:
        if isinstance(node, ast.FunctionDef):
            function = node.name
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in READS:
            found[file.relative_to(PACKAGE).as_posix(), function, node.func.attr] += 1
        for child in ast.iter_child_nodes(node):
            visit(child, function)

    visit(ast.parse(file.read_text(encoding="utf-8")), "")
    return found


def test_the_device_is_read_through_comm_alone() -> None:
    files = [
        file for room in ROOMS for file in ((PACKAGE / room).rglob("*.py") if "." not in room else [PACKAGE / room])
    ]
    found = sum((reads(file) for file in sorted(files)), Counter())
    assert found == ALLOWED
