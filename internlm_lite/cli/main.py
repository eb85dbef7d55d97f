"""internlm-lite NAME [arguments]: the same as python tools/NAME.py [arguments], from any folder."""

from __future__ import annotations

import ast
import runpy
import sys
from pathlib import Path

TOOLS = Path(__file__).parent


def _summary(tool: Path) -> str:
    """First line of the tool's docstring."""
    docstring = ast.get_docstring(ast.parse(tool.read_text(encoding="utf-8"))) or ""
    return docstring.partition("\n")[0]


def main() -> None:
    tools = {tool.stem: tool for tool in sorted(TOOLS.glob("*.py")) if tool != Path(__file__)}
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name not in tools:
        asked_for_help = name in ("-h", "--help")
        lines = [f"  {tool:<14}{_summary(path)}" for tool, path in tools.items()]
        error = "" if asked_for_help else f"found no tool {name!r}; expected one of those below\n"
        stream = sys.stdout if asked_for_help else sys.stderr
        print(f"{error}usage: internlm-lite NAME [arguments]\n" + "\n".join(lines), file=stream)
        sys.exit(0 if asked_for_help else 2)
    sys.argv = [str(tools[name]), *sys.argv[2:]]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
