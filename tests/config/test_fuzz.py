"""Mutated 20B and 7B configs: each loads, or is refused with file and line, fast, and in printable lines.

FUZZ_SEED and FUZZ_COUNT choose other draws: FUZZ_SEED=7 FUZZ_COUNT=5000 pytest tests/config/test_fuzz.py
"""

import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from internlm_lite.config import source
from internlm_lite.config.load import check_config, load_config
from internlm_lite.config.render_config import print_config
from internlm_lite.errors import ConfigError

ROOT = Path(__file__).parents[2]
TEXTS = [(ROOT / "configs" / name).read_text(encoding="utf-8") for name in ("20B_sft.py", "7B_sft.py")]
SEED, COUNT = int(os.environ.get("FUZZ_SEED", "12")), int(os.environ.get("FUZZ_COUNT", "420"))
LONGEST_SECONDS = 5
"""Of this process' own time, so that a busy machine does not count."""

WRONG_VALUES = [
    "open(__file__)",
    "(i for i in range(3))",
    "__import__('threading').Lock()",
    "__import__('numpy').arange(10)",
    "type('K', (), {'__repr__': lambda self: 1 / 0})()",
    "type('K', (), {'__class__': property(lambda self: 1 / 0)})()",
    "type('S', (dict,), {'items': lambda self: 1 / 0})(a=open)",
    "10**5000",
    "-(10**5000)",
    "2**63",
    "float('nan')",
    "1j",
    "b'\\0'",
    "{1, 2}",
    "{open: {10**5000: 1}}",
    "[[[[]]]] * 30000",
    "'\\x1b[2J\\0' * 10**6",
    "'\\ud800'",
    "lambda: 1",
    "object",
    "1 / 0",
    "data",
    "globals()",
]
WRONG_STATEMENTS = [
    *(f"left = {value}" for value in WRONG_VALUES if value not in ("lambda: 1", "object")),
    "data['self'] = data",
    "d = {}; d['d'] = d['e'] = d; ckpt['s3'] = d",
    "a = ['x'] * 10\nfor _ in range(12): a = [a] * 10\ndata['weights'] = a",
    "d = x = {}\nfor _ in range(100000): d['a'] = d = {}\ndata['weights'] = x",
    "for i in range(100000): data[f'k{i}'] = i",
    "for i in range(30000): globals()[f'k{i}'] = i",
    "data['\\x1b[31m\\r\\n'] = 1",
    "data['x' * 10**7] = 1",
    "data['a.b'] = 1",
    "data[(1, 2)] = data[None] = 1",
    "data['skip_batches'] = '1-1000000000000'",
    "data['skip_batches'] = '1-' + '9' * 5000",
    "data['skip_batches'] = ','.join(map(str, range(10**5)))",
    "data['rampup_batch_size'] = '1 1 ' + '9' * 5000",
    "data['tokenizer'] = '/dev/zero'",
    "ckpt['stop_file_path'] = '/dev/zero'",
    "ckpt['save_ckpt_folder'] = 'local:a\\0b'",
    "data['train_folder'] = '\\x1b[2J'",
    "JOB_NAME = '\\x9b31m'",
    "model['num_layers'] = 10**12",
    "model['hidden_size'] = 2**60",
    "data['seq_len'] = 2**60",
    "data['micro_num'] = 1e300",
    "raise ValueError('x' * 10**7)",
    "raise ValueError('\\x1b[2J\\r\\n')",
    "class E(Exception):\n    def __str__(self): raise self\nraise E",
    "class B(BaseException): pass\nraise B('boo')",
    "def f(): return f()\nf()",
    "x = [0] * 10**12",
    "import sys; sys.exit(0)",
    "import os; os._exit(0)",
    "import os; os.abort()",
    "x = " + "(" * 5000 + "1" + ")" * 5000,
    "x = " + "1+" * 50000 + "1",
    "x = " + "-" * 50000 + "1",
    "x = a" + ".a" * 50000,
    "x = 1\n" * 100_000,
    "_base_ = 'x' * 10000",
    "_base_ = ['/dev/zero', open(__file__)]",
    "_base_ = 'a\\0b.py'",
    "with read_base():\n    from .x import *",
]

Mutation = Callable[[str, random.Random], str]


def statement(text: str, draw: random.Random) -> str:
    return text + draw.choice(WRONG_STATEMENTS) + "\n"


def value(text: str, draw: random.Random) -> str:
    """Another value for one key. `cudnn_*` and the like take any truth value no better than the rest."""
    keys = [*re.finditer(r"^    (\w+)=(.*?),(  #.*)?$", text, re.MULTILINE)]
    key = draw.choice(keys)
    return f"{text[: key.start(2)]}{draw.choice(WRONG_VALUES)}{text[key.end(2) :]}"


def name(text: str, draw: random.Random) -> str:
    """One key misspelt."""
    key = draw.choice([*re.finditer(r"^    (\w+)=", text, re.MULTILINE)])
    at = draw.randrange(key.start(1), key.end(1))
    return f"{text[:at]}{draw.choice(['zq', 'é', '_9x'])}{text[at:]}"


def bytes_(text: str, draw: random.Random) -> str:
    """Characters lost, added or doubled anywhere: the file may still load."""
    for _ in range(draw.randint(1, 4)):
        at, length = draw.randrange(len(text)), draw.choice([1, 1, 2, 30, 500])
        new = draw.choice(["", "", "\0", "\x1b", "(", "'", "\n", " ", "=", text[at : at + length] * 2])
        text = text[:at] + new + text[at + length :]
    return text


REFUSED: tuple[Mutation, ...] = (statement, value, name)


def outcome(path: Path) -> str | None:
    """The error that the config at `path` gives; None if it loads."""
    try:
        loaded = load_config(path)
        check_config(loaded, 8)
        print_config(loaded, "full")
    except ConfigError as error:
        return str(error)
    return None


@pytest.mark.timeout(600)
def test_mutated_configs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path, draw, faults = Path("c.py"), random.Random(SEED), []
    for number in range(COUNT):
        mutation = draw.choice((*REFUSED, bytes_))
        text = mutation(draw.choice(TEXTS), draw)
        path.write_text(text, encoding="utf-8")
        before = time.process_time()
        try:
            error, crash = outcome(path), ""
        except Exception as other:
            error, crash = None, f"{type(other).__name__}: {other}"[:300]
        lines = (error or "").split("\n")
        fault = crash or {
            error is None and mutation in REFUSED: "loads",
            error is not None and not any(re.match(r"c\.py:\d+: ", line) for line in lines): "no file and line",
            not all(line.isprintable() for line in lines): "a control character",
            len(lines) > 110 or max(map(len, lines)) > 2100: "too long",
            time.process_time() - before > LONGEST_SECONDS: "too slow",
        }.get(True)
        if fault:
            faults.append(f"case {number}, {mutation.__name__}: {fault}: {(error or '')[:200]}: {text[-200:]!r}")
    assert not faults, "\n".join(faults)


def test_what_ends_or_blocks_a_process_is_refused(tmp_path: Path) -> None:
    """In one process of its own: os._exit, and a pipe that nobody writes to, as a config and as a tokenizer."""
    os.mkfifo(tmp_path / "pipe.py")
    (tmp_path / "exit.py").write_text(TEXTS[0] + "import os\nos._exit(0)\n")
    (tmp_path / "reads.py").write_text(TEXTS[0] + "data['tokenizer'] = 'pipe.py'\n")
    code = (
        "import faulthandler; faulthandler.dump_traceback_later(45, exit=True)\n"
        "from internlm_lite.cli.train import main\n"
        "for name in ('pipe', 'exit', 'reads'): print(main(['--config', name + '.py', '--print-config', 'diff']))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60, env=os.environ
    )
    assert run.stdout.split() == ["2", "2", "2"], run.stderr
    assert "exit.py:127: the config file failed while running: SystemExit: a config file must not end" in run.stderr
    assert "pipe.py: found a pipe, device or socket" in run.stderr and "Traceback" not in run.stderr


def test_endless_config_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(source, "LONGEST_RUN_SECONDS", 0.2)
    Path("c.py").write_text("import time\ntry:\n    while True: time.sleep(0.01)\nexcept Exception: pass\n")
    assert "c.py:3: the config file failed while running: SystemExit: it was still running" in (
        outcome(Path("c.py")) or ""
    )
