"""What all programs share: each runs the package beside it, and takes the same times."""

from __future__ import annotations

import ast
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from internlm_lite import __version__
from internlm_lite.cli import (
    ckpt,
    convert,
    dashboard,
    demo,
    doctor,
    evaluate,
    generate_text,
    inspect_data,
    new,
    pair_corpus,
    slurm,
    tokenize_text,
    train,
    write_report,
)
from internlm_lite.cli import main as cli
from internlm_lite.errors import ConfigError
from tests.cli import ROOT

TOOLS = sorted((ROOT / "tools").glob("*.py"))
TINY = str(ROOT / "configs/tiny.py")
TRAIN_TOKENIZER = ["train", "--input", "a", "--output", "b", "--vocab-size", "300"]
EARLY: list[tuple[ModuleType, str, str]] = [
    (ckpt, "adopt_s3_keys", "ls x"),
    (convert, "adopt_s3_keys", "to-hf a b"),
    (dashboard, "read_token", "x"),
    (demo, "load_config", ""),
    (doctor, "adopt_s3_keys", ""),
    (evaluate, "adopt_s3_keys", "--checkpoint x"),
    (generate_text, "adopt_s3_keys", "--checkpoint x"),
    (inspect_data, "load_config", "--config x"),
    (new, "measured", "--data x --hours 1 --output y"),
    (pair_corpus, "unpacked", "--output y"),
    (write_report, "read_runs", "x"),
    (slurm, "adopt_s3_keys", "--config x --nodes 1"),
    (tokenize_text, "sample_text", " ".join(TRAIN_TOKENIZER)),
    (tokenize_text, "Tokenizer", "encode --input a --output b --tokenizer c"),
]
"""Each tool, something that it calls, and a command line."""
FIRST = "sys.path.insert(0, str(Path(__file__).resolve().parent.parent))"


def ours_before(source: str, statement: str) -> list[str]:
    """Imports of the package that stand above `statement`; all of them if it is missing."""
    imports = []
    for node in ast.parse(source).body:
        if ast.unparse(node) == statement:
            break
        if "internlm_lite" in ast.dump(node) and isinstance(node, ast.Import | ast.ImportFrom | ast.FunctionDef):
            imports.append(ast.unparse(node).partition("\n")[0])
    return imports


@pytest.mark.parametrize("tool", TOOLS, ids=lambda path: path.stem)
def test_a_tool_of_another_checkout_imports_its_own_package(tool: Path):
    """Also with a package installed from elsewhere."""
    assert ours_before(tool.read_text("utf-8"), FIRST) == []


def test_a_tool_without_it_is_seen():
    late = f"import sys\nfrom internlm_lite import units\n{FIRST}\n"
    assert ours_before(late, FIRST) == ["from internlm_lite import units"]
    assert ours_before("def f():\n    import internlm_lite.units", FIRST) == ["def f():"]


@pytest.mark.parametrize("parse", [train.parse_arguments, doctor.parse_arguments], ids=["train.py", "doctor"])
@pytest.mark.parametrize("value", ["nan", "inf", "0", "-5", "1e9", "soon"])
def test_a_timeout_is_a_number_of_seconds(
    parse: Callable[[list[str]], object], value: str, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit) as ended:
        parse(["--config", "x.py", "--timeout", value])
    assert ended.value.code == 2
    assert f"argument --timeout: found '{value}', expected seconds: a number > 0" in capsys.readouterr().err


@pytest.mark.parametrize("tool", [train, doctor], ids=["train.py", "doctor"])
def test_options_of_old_launchers_are_checked(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.delenv("RANK", raising=False)
    line = ["--config", TINY, "--local-rank", "0", "--world-size=1", "--rank=0", "--local_rank=0"]
    assert vars(tool.parse_arguments(line))["local_rank"] == 0
    assert tool.main([*line, "--world_size", "8"]) == 2
    assert "found --world_size 8, but this process has world size 1 (no variable of" in capsys.readouterr().err


@pytest.mark.parametrize(
    "line",
    ["", "--help", "--version", "train --version", f"train --config {TINY} --print-config full"]
    + [f"{command} --help" for command in [*cli.COMMANDS, "ckpt ls"]],
)
def test_output_that_nobody_reads_is_no_error(
    line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as out:
        monkeypatch.setattr(sys, "stdout", out)
        try:
            assert cli.main(line.split()) == 128 + signal.SIGPIPE
        except SystemExit as ended:  # of argparse
            assert ended.code == 0
        print("what the interpreter flushes at exit")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("tool", "called", "line"), EARLY, ids=lambda value: getattr(value, "__name__", None))
def test_every_tool_ends_alike(
    tool: ModuleType, called: str, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    for error, code, said in ((KeyboardInterrupt(), 130, "interrupted"), (ConfigError("found x"), 2, "ConfigError: ")):

        def fail(*_: object, error: BaseException = error) -> None:
            raise error

        monkeypatch.setattr(tool, called, fail)
        assert tool.main(line.split()) == code
        told = capsys.readouterr().err
        assert told.startswith(said) and told.count("\n") == 1


def test_no_tool_is_forgotten():
    modules = {Path(tool.__file__ or "").stem for tool, _, _ in EARLY} | {"bench", "gpu_check"}
    commands = {command: module for command, (module, _) in cli.COMMANDS.items()}
    assert modules == set(commands.values()) - {"train", "show_plan", "init"}
    assert {tool.stem.replace("_", "-") for tool in TOOLS} == set(commands) - {"train", "init"}
    for tool in TOOLS:
        assert f"from internlm_lite.cli.{commands[tool.stem.replace('_', '-')]} import" in tool.read_text("utf-8")


@pytest.mark.parametrize(
    ("tool", "line", "told"),
    [
        (inspect_data, "--config x --dp 0", "--dp 0: expected at least 1"),
        (inspect_data, "--config x --show -1", "--show -1: expected at least 0"),
        (generate_text, "--checkpoint x --max-new-tokens 0", "--max-new-tokens 0: expected at least 1"),
        (tokenize_text, f"{' '.join(TRAIN_TOKENIZER)} --workers 0", "--workers 0: expected at least 1"),
        (tokenize_text, f"{' '.join(TRAIN_TOKENIZER)} --max-bytes 0", "--max-bytes 0: expected at least 1"),
        (tokenize_text, f"{' '.join(TRAIN_TOKENIZER)} --vocab-size 260", "--vocab-size 260: expected at least 261"),
    ],
)
def test_a_number_out_of_range_is_named(tool: ModuleType, line: str, told: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit, match="2"):
        tool.main(line.split())
    assert capsys.readouterr().err.endswith(f"error: {told}\n")


@pytest.mark.parametrize("tool", [train, doctor, slurm, inspect_data], ids=lambda tool: tool.__name__)
def test_changes_to_the_config_may_stand_anywhere(tool: ModuleType):
    size = ["--nodes", "1"] if tool is slurm else []
    arguments = tool.parse_arguments(["A=1", "--config", "x.py", "B=2", *size, "c.d=3"])
    assert arguments.overrides == ["A=1", "B=2", "c.d=3"]


@pytest.mark.parametrize(("name", "code"), [("nix", 2), ("--help", 0)])
def test_the_list_of_commands(name: str, code: int, capsys: pytest.CaptureFixture[str]):
    assert cli.main([name]) == code
    output = capsys.readouterr()
    assert "  ckpt          list, verify and remove checkpoints\n" in (output.err if code else output.out)
    assert ("found no command 'nix'" in output.err, output.out == "") == (bool(code), bool(code))


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_has_a_help(command: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit, match="0"):
        cli.main([command.replace("-", "_"), "--help"])
    assert f"usage: internlm-lite {command} " in capsys.readouterr().out


def test_help_and_a_wrong_config_need_no_torch(tmp_path: Path):
    (tmp_path / "bad.py").write_text("model = dict(hiden_size=1)")
    code = (
        "import sys; from internlm_lite.cli.main import main\n"
        "assert main(['--help']) == main(['--version']) == 0 and main(['train', '--config', 'bad.py']) == 2\n"
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True
    )
    assert done.returncode == 0 and b"hidden_size" in done.stderr, done.stderr


def test_the_version(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit, match="0"):
        train.main(["--version"])
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"internlm-lite {__version__}\n" * 2


def test_bench_says_where_it_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(cli, "find_spec", lambda name: None)
    assert cli.main(["bench", "--json"]) == 2
    assert capsys.readouterr().err == "bench: not part of the installed package; run it in a checkout\n"


def test_a_plan_is_that_of_a_dry_run(capsys: pytest.CaptureFixture[str]):
    common = ["--config", str(ROOT / "configs/tiny.py"), "--world-size", "4", "--json", "TOTAL_STEPS=7"]
    assert cli.main(["plan", *common]) == 0
    plan = capsys.readouterr().out
    assert cli.main(["train", "--dry-run", *common]) == 0
    assert capsys.readouterr().out == plan and json.loads(plan)


def test_init_keeps_what_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = tmp_path / "new"
    assert cli.main(["init", str(folder)]) == 0
    written = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    assert {"train.py", "configs/tiny.py", "configs/7B_sft.py", "launch/slurm.sh"} <= written
    assert all((folder / file).read_bytes() == (ROOT / file).read_bytes() for file in written)
    assert os.access(folder / "launch/slurm.sh", os.X_OK)
    (folder / "configs/tiny.py").write_text("mine")
    assert cli.main(["init", str(folder)]) == 0
    assert (folder / "configs/tiny.py").read_text() == "mine"
    assert f"kept  {folder / 'configs/tiny.py'}" in capsys.readouterr().out
