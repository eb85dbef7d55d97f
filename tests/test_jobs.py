"""The three small jobs among the configs: their published numbers by one command each, and their tiny twins trained by
the commands at the head of the file."""

from __future__ import annotations

import ast
import json
import math
import shlex
import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from internlm_lite.cli import show_plan
from internlm_lite.monitor.jsonl import read_objects
from tests.cli import ROOT, run
from tests.steps import read_metrics

CONFIGS = ROOT / "configs"
XL, XL_LENGTHS = "gpt2_xl_accounting.py", "--lengths 1024,16384"


def plan(capsys: pytest.CaptureFixture[str], config: str, words: str) -> dict[str, Any]:
    assert show_plan.main(["--config", str(CONFIGS / config), "--json", *words.split()]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


@pytest.mark.parametrize(
    ("config", "words", "parameters", "decayed"),
    [
        ("llama_8m.py", "FOLDER=None", 8_483_616, 8_478_720),
        ("gpt2_124m.py", "FOLDER=None", 162_419_712, 162_419_712),
        ("gpt2_124m.py", "FOLDER=None SEQ_LEN=1024", 163_009_536, 163_009_536),
        ("gpt2_124m.py", "FOLDER=None SEQ_LEN=1024 TIED=True", 124_412_160, 124_412_160),
        ("gpt2_124m.py", "FOLDER=None SEQ_LEN=1024 TIED=True QKV_BIAS=True", 124_439_808, 124_439_808),
        ("translate_de_en.py", "FOLDER=None", 54_941_936, 0),
        (XL, "", 1_635_382_400 + 155_200, 1_635_382_400),
        (XL, "MLP_TYPE=swiglu", 2_126_902_400 + 155_200, 2_126_902_400),
    ],
)
def test_parameters(config: str, words: str, parameters: int, decayed: int, capsys: pytest.CaptureFixture[str]) -> None:
    found = plan(capsys, config, words)
    total = found["components"]["total"]
    assert (found["parameters_total"], total["parameters"], total["decayed"]) == (parameters, parameters, decayed)


def test_the_llama_costs_and_learns_as_published(capsys: pytest.CaptureFixture[str]) -> None:
    found = plan(capsys, "llama_8m.py", "FOLDER=None")
    assert found["components"]["flops_6n"] == [57_979_584]
    assert 3 * found["components"]["total"]["flops"][0] == 57_979_584 - 6 * 4_896, "norms multiply no matrices"
    known = {"0": 0, "500": 2.5e-4, "1000": 5e-4, "25750": 4.267767e-4, "50500": 2.5e-4, "100000": 0}
    assert {step: found["learning_rates"][step] for step in known} == pytest.approx(known, rel=1e-6)
    layout = found["layout"]
    assert (layout["micro_num"], layout["micro_bsz"], layout["seq_len"]) == (4, 8, 256)
    assert (found["tokens_per_step"], found["steps_total"]) == (8192, 100_000)


def test_a_person_sees_the_llamas_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    assert show_plan.main(["--config", str(CONFIGS / "llama_8m.py"), "--components", "FOLDER=None"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for number in ("8,483,616: 8,478,720 with weight decay, 4,896 without", "57,979,584 as 6 N + attention"):
        assert number in text
    assert "0.00025 in 500, 0.0005 in 1,000, 0.0004267767 in 25,750, 0.00025 in 50,500" in text


def test_the_account_of_the_xl_shape(capsys: pytest.CaptureFixture[str]) -> None:
    found = plan(capsys, XL, f"{XL_LENGTHS} --memory 80GB --tflops 9.75")
    total, rows = found["components"]["total"], {row["name"]: row for row in found["components"]["rows"]}
    forward = [n * flops for n, flops in zip(found["components"]["lengths"], total["flops"], strict=True)]
    d, layers, n = 1600, 48, 1024
    assert forward[0] == n * (layers * (24 * d * d + 4 * n * d) + 2 * 50_257 * d) == pytest.approx(3.5067e12, rel=1e-5)
    assert forward[1] == 16 * n * (layers * (24 * d * d + 4 * 16 * n * d) + 2 * 50_257 * d)
    assert rows["attention"]["flops"][1] / total["flops"][1] == pytest.approx(0.618, abs=1e-3)
    assert total["weights"] + total["gradients"] + total["optimizer"] == 16 * total["parameters"]
    (rank,) = found["ranks"]
    held = sum(rank["bytes"][name] for name in ("weights", "gradients", "optimizer"))
    assert 16 * total["parameters"] <= held < 16 * total["parameters"] + 2**17
    assert found["components"]["update_flops"] == 14 * 1_635_382_400 + 12 * 155_200
    # 3 forward passes a row, 1,024 rows a step, 400,000 steps at half of 19.5 TFLOP/s
    assert (
        found["days"]
        == pytest.approx(3 * forward[0] * 1024 * 400_000 / 9.75e12 / 86_400)
        == pytest.approx(5115.2, abs=0.1)
    )
    largest = found["largest_batch"]
    assert largest["micro_bsz"] == 8 and largest["peak"] <= 80e9 < largest["peak"] + largest["per_row"]
    # Of width d: inputs of the layer, of its second norm and of two projections; queries, keys and values, two of them
    # rotated; attention's output, as parts and joined; twice the 4 d of the feed-forward part.
    kept = layers * 4 * n * d * (1 + 1 + 2 + 3 + 2 + 2 + 8)
    assert largest["per_row"] == pytest.approx(kept, rel=0.03)


def test_the_account_with_a_gate(capsys: pytest.CaptureFixture[str]) -> None:
    total = plan(capsys, XL, "MLP_TYPE=swiglu")["components"]["total"]
    assert 1024 * total["flops"][0] == pytest.approx(4.5133e12, rel=1e-5)


def test_the_account_of_sgd(capsys: pytest.CaptureFixture[str]) -> None:
    found = plan(capsys, XL, "OPTIMIZER=sgd")
    total = found["components"]["total"]
    assert total["optimizer"] == 0 and total["weights"] + total["gradients"] == 8 * total["parameters"]
    assert found["components"]["update_flops"] == 2 * total["parameters"] + 2 * total["decayed"]


def commands(config: Path) -> list[list[str]]:
    """The words of the indented commands of the file's docstring."""
    text = ast.get_docstring(ast.parse(config.read_text("utf-8")), clean=False) or ""
    lines = [line for line in text.replace("\\\n", " ").splitlines() if line.startswith("    ")]
    return [words for line in lines for words in _separate(shlex.split(line, comments=True))]


def _separate(words: list[str]) -> Iterator[list[str]]:
    while "&&" in words:
        at = words.index("&&")
        yield words[:at]
        words = words[at + 1 :]
    yield words


def follow(config: str, folder: Path, *changes: str) -> list[str]:
    """Run the commands at the head of `config` in a checkout, training by `changes`; what they print."""
    for name in ("configs", "internlm_lite", "README.md"):
        (folder / name).symlink_to(ROOT / name)
    printed = []
    for words in commands(CONFIGS / config):
        if words[:2] == ["mkdir", "-p"]:
            (folder / words[2]).mkdir(parents=True)
        elif words[0] == "cp":
            shutil.copy(folder / words[1], folder / words[2])
        else:
            assert words[0] == "python", words
            program = words[1]
            more = changes if program == "train.py" else ("--workers=1",) if "encode" in words else ()
            ended = run(program, *words[2:], *more, folder=folder)
            assert ended.code == 0, f"{words}\n{ended.output}"
            printed.append(ended.output)
    return printed


def events(folder: Path, name: str) -> list[dict[str, Any]]:
    return [event for event in read_objects(folder / "events.jsonl") if event["event"] == name]


def test_the_tiny_llama(tmp_path: Path) -> None:
    printed = follow("llama_8m_tiny.py", tmp_path, "STEPS=24", "EVAL_EVERY=8", "EVAL_BATCHES=3", "WARMUP_STEPS=4")
    folder = tmp_path / "RUN/llama_8m_tiny/latest"
    trained = events(folder, "evaluation")
    assert [event["step"] for event in trained] == [-1, 7, 15, 23]
    for key in ("loss", "train_loss"):
        assert all(later[key] < earlier[key] for earlier, later in pairwise(trained)), key
    steps = read_metrics(folder / "metrics.jsonl")
    assert len(steps) == 24 and [step["lr"] for step in steps[:4]] == pytest.approx([1e-3, 2e-3, 3e-3, 4e-3])
    alone, text = printed[3], printed[4]
    assert f"evaluation after 24 steps: loss={trained[-1]['loss']:.4f}" in alone
    assert "def " in text
    saved = [(event["step"], event["saved"]) for event in events(folder, "checkpoint")]
    assert [step for step, kind in saved if kind == "best"] == [8, 16, 24] and (24, "final") in saved
    assert (folder / "report.html").is_file() and (folder / "loss.png").is_file()


def test_the_tiny_gpt2(tmp_path: Path) -> None:
    follow("gpt2_124m_tiny.py", tmp_path, "EPOCHS=2", "LEARNING_RATE=0.001")
    folder = tmp_path / "RUN/gpt2_124m_tiny/latest"
    meta = json.loads((tmp_path / "jobs/gpt2_124m_tiny/tokens/train/text/text.meta.json").read_text())
    held_out = json.loads((tmp_path / "jobs/gpt2_124m_tiny/tokens/valid/text/text.meta.json").read_text())
    text = (ROOT / "README.md").read_text("utf-8")
    cut = int(0.9 * len(text))
    assert meta["text_bytes"] == len(text[:cut].encode()) and held_out["text_bytes"] == len(text[cut:].encode())
    steps = read_metrics(folder / "metrics.jsonl")
    an_epoch = meta["tokens"] // 128
    assert len(steps) == 2 * an_epoch, "windows that do not overlap"
    samples = read_objects(folder / "samples.jsonl")
    assert [sample["step"] for sample in samples] == [an_epoch, 2 * an_epoch], "after each epoch"
    found = events(folder, "evaluation")
    assert found[0]["loss"] == pytest.approx(math.log(512), abs=0.15), "untrained: any token alike"
    assert found[0]["step"] == -1 and found[-1]["train_loss"] < found[0]["train_loss"] - 0.5
    assert found[-1]["loss"] < found[0]["loss"] - 0.5


@pytest.mark.parametrize("changes", [("STEPS=30",), ("STEPS=30", "OPTIMIZER=sgd", "LEARNING_RATE=0.5")])
def test_the_tiny_account_trains(changes: tuple[str, ...], tmp_path: Path) -> None:
    config = str(CONFIGS / "gpt2_xl_tiny.py")
    ended = run("train.py", "--config", config, "WARMUP_STEPS=3", *changes, folder=tmp_path)
    assert ended.code == 0, ended.output
    steps = read_metrics(tmp_path / "RUN/gpt2_xl_tiny/latest/metrics.jsonl")
    assert len(steps) == 30 and steps[-1]["loss"] < steps[0]["loss"] - 0.5
    if "OPTIMIZER=sgd" in changes:  # the line of a step has the rate of the next one
        assert [step["lr"] for step in steps[:4]] == pytest.approx([0.5 / n**0.5 for n in (2, 3, 4, 5)])


@pytest.mark.parametrize("config", sorted(path.name for path in CONFIGS.glob("*_tiny.py")))
def test_a_twin_says_its_size(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Commands at the head name files that exist, and the config's own folder."""
    words = [word for command in commands(CONFIGS / config) for word in command]
    name = config.removesuffix(".py")
    assert all((ROOT / word).exists() for word in words if word.startswith(("tools/", "configs/", "train.py")))
    assert all(word.startswith((f"jobs/{name}", f"RUN/{name}")) for word in words if word.startswith(("jobs/", "RUN/")))
