"""An encoder-decoder from its training to its text, figures and maps, by the commands that a user has."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import sacrebleu
import torch

from internlm_lite.cli import generate_text
from internlm_lite.config.schema import Config
from internlm_lite.data.tokenizer import Tokenizer
from internlm_lite.errors import DataError, MissingPackageError
from internlm_lite.evaluate import pair_task
from internlm_lite.evaluate.pair_task import PairTask
from internlm_lite.evaluate.task_suite import TaskSuite
from internlm_lite.layers.flash import AttentionBackend
from internlm_lite.mesh.mesh import Mesh, single_process_mesh
from internlm_lite.models.initialise import initialise
from internlm_lite.models.stages import build_stages, whole_model
from internlm_lite.monitor.jsonl import read_objects
from tests import cli
from tests.evaluate.number_words import numbers_config, write_numbers
from tests.train.runs import run_training
from tests.world import run_world


def asked(folder: Path, **more: Any) -> dict[str, Any]:
    return {"tasks": ["pairs"], "pairs_folder": str(folder / "test"), "pairs_sides": ["de", "en"], **more}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ckpts/ and run/ of a model that has learned its pairs."""
    folder = write_numbers(tmp_path_factory.mktemp("numbers"))
    config = numbers_config(
        folder,
        ckpt={"enable_save_ckpt": True, "save_ckpt_folder": str(folder / "ckpts"), "async_upload": False},
        evaluation=asked(folder, every=45, keep_best="pairs/chrf"),
        monitor={"sample_prompts": ["eins zwei", "neun acht sieben"], "tensorboard": False},
    )
    run_training(single_process_mesh(), config, folder / "run")
    return folder


def told(capsys: Any, run: Path, *arguments: str, code: int = 0) -> str:
    capsys.readouterr()
    assert generate_text.main(["--checkpoint", str(run / "ckpts"), "--max-new-tokens", "7", *arguments]) == code
    output = capsys.readouterr()
    return output.err if code else output.out


def lines(run: Path, side: str) -> list[str]:
    return (run / "test" / "numbers" / f"a.{side}").read_text("utf-8").splitlines()


def test_a_run_scores_and_shows_what_it_translates(run: Path) -> None:
    events = [event["tasks"]["pairs"] for event in read_objects(run / "run" / "events.jsonl") if "tasks" in event]
    assert len(events) == 2 and set(events[0]) == {"bleu", "chrf"} and events[-1]["chrf"] == pytest.approx(100)
    assert events[-1]["bleu"] == pytest.approx(100)
    samples = [(sample["prompt"], sample["text"]) for sample in read_objects(run / "run" / "samples.jsonl")]
    assert samples == [("eins zwei", "one two"), ("neun acht sieben", "nine eight seven")]


def test_sources_become_targets_line_by_line(capsys: Any, run: Path, tmp_path: Path) -> None:
    sources = ("--sources", str(run / "test" / "numbers" / "a.de"))
    for how in (("--greedy",), ("--beams", "3"), ("--greedy", "--chunk", "1", "--batch-size", "4")):
        assert told(capsys, run, *sources, *how).splitlines() == lines(run, "en")
    (tmp_path / "asked.jsonl").write_text('{"source": "drei acht"}\n{"source": "drei acht", "prompt": "three five"}\n')
    rows = told(capsys, run, "--requests", str(tmp_path / "asked.jsonl"), "--greedy", "--json").splitlines()
    first, begun = map(json.loads, rows)
    assert (first["source"], first["prompt"], first["text"], first["ended_by"]) == (
        "drei acht",
        "",
        "three eight",
        "stop",
    )
    assert begun["prompt"] == "three five" and begun["text"] == ""
    (alone,) = told(capsys, run, "--source", "drei acht", "--beams", "2", "--json").splitlines()
    assert json.loads(alone)["text"] == "three eight" and json.loads(alone)["score"] > -0.1


BAD = {
    "a prompt alone": (("--prompt", "one"), "prompt 0 has no source, and the model is an encoder-decoder: give what"),
    "a long source": (("--source", "eins " * 9), "source 0 has 11 tokens: the model was trained on 8"),
    "no file": (("--sources", "nowhere.de"), "nowhere.de: No such file or directory"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(case: str, capsys: Any, run: Path) -> None:
    arguments, found = BAD[case]
    said = told(capsys, run, *arguments, code=6 if case == "no file" else 2)
    assert found in said and said.count("\n") == 1


def test_maps_of_both_sides_are_written(capsys: Any, run: Path, tmp_path: Path) -> None:
    page = tmp_path / "maps.html"
    said = told(capsys, run, "--source", "eins acht", "--greedy", "--attention", str(page), "--layers", "0,1")
    assert said == f"20 maps of 4 source and 3 tokens: {page}\n"
    groups = json.loads(re.search(r'application/json">(.*?)</script>', page.read_text("utf-8")).group(1))  # type: ignore[union-attr]
    source, target = ["<s>", "eins", "acht", "</s>"], ["<s>", "one", "eight"]
    assert [(one["rows"], one["columns"], one["backward"]) for one in groups] == [
        (source, source, False),
        (target, target, True),
        (target, source, False),
    ]
    assert [len(one["names"]) for one in groups] == [4, 8, 8] and groups[2]["names"][5] == "cross layer 1, head 1"
    picture = tmp_path / "maps.png"
    told(capsys, run, "--source", "eins acht", "--greedy", "--attention", str(picture), "--heads", "1")
    assert picture.read_bytes().startswith(b"\x89PNG\r\n")


def test_the_tool_gives_the_figures_of_the_run(run: Path, tmp_path: Path) -> None:
    more = ("--tasks", "pairs", "--pairs", str(run / "test"), "de", "en", "--beams", "2", "--limit", "5")
    command = ("--checkpoint", str(run / "ckpts"), "--device", "cpu", "--output", "out.json", *more)
    ended = cli.run("tools/evaluate.py", *command, folder=tmp_path)
    assert ended.code == 0 and "pairs: 5 pairs; bleu nrefs:1|case:mixed|eff:no|tok:13a" in ended.output, ended.output
    figures = json.loads((tmp_path / "out.json").read_text())["weights"]["model"]["tasks"]["pairs"]
    assert figures == pytest.approx({"bleu": 100, "chrf": 100})


class Said:
    """Answers of a model."""

    def __init__(self, texts: list[str]) -> None:
        self.texts, self.asked = texts, list[Any]()

    def generate(self, requests: list[Any], how: Any) -> list[str]:
        self.asked = requests
        return self.texts


def task_of(folder: Path, **more: Any) -> PairTask:
    return PairTask(numbers_config(folder, evaluation=asked(folder, **more)), Tokenizer(folder / "en.json"))


def test_the_figures_are_sacrebleus(run: Path, tmp_path: Path) -> None:
    references = lines(run, "en")
    texts = [" ".join([*text.split()[1:], "nine"]) if n % 3 else text for n, text in enumerate(references)]
    said = Said(texts)
    found = task_of(run).scores(said)  # type: ignore[arg-type]
    assert found == {
        "bleu": sacrebleu.corpus_bleu(texts, [references]).score,
        "chrf": sacrebleu.corpus_chrf(texts, [references]).score,
    }
    assert 5 < found["bleu"] < 95 and len(said.asked) == len(references) and len(said.asked[0].source) > 2
    (tmp_path / "hyp.en").write_text("".join(f"{text}\n" for text in texts), "utf-8")
    command = [
        sys.executable,
        "-m",
        "sacrebleu",
        str(run / "test" / "numbers" / "a.en"),
        "-i",
        str(tmp_path / "hyp.en"),
    ]
    printed = subprocess.run(
        [*command, "-m", "bleu", "chrf", "-b", "-w", "4"], capture_output=True, text=True, check=True
    )
    assert [float(number) for number in re.findall(r"\d+\.\d+", printed.stdout)] == pytest.approx(
        [found["bleu"], found["chrf"]], abs=1e-4
    )
    assert task_of(run).scores(Said(references)) == pytest.approx({"bleu": 100, "chrf": 100})  # type: ignore[arg-type]


def test_long_sources_keep_their_end_and_what_is_missing_is_named(run: Path, monkeypatch: Any, caplog: Any) -> None:
    said = Said(lines(run, "en"))
    task_of(run, max_tokens=4).scores(said)  # type: ignore[arg-type]
    sources = [request.source for request in said.asked]
    assert max(map(len, sources)) == 4 and all((ids[0], ids[-1]) == (0, 1) for ids in sources)
    assert "sources have more than 4 tokens and are cut" in caplog.text
    assert {request.max_new_tokens for request in said.asked} == {3}
    with pytest.raises(DataError, match=r"nowhere is missing, expected a folder with text"):
        task_of(run, pairs_folder="nowhere")
    with pytest.raises(MissingPackageError, match=r"evaluation.pairs_sides: ja: sacrebleu says: "):
        monkeypatch.setitem(sys.modules, "MeCab", None)
        pair_task._metrics_of("ja")
    monkeypatch.setattr(pair_task, "find_spec", lambda name: None)
    with pytest.raises(MissingPackageError, match=r"needs sacrebleu, .*: pip install internlm_lite\[bleu\]"):
        task_of(run)


def scores_on(mesh: Mesh, config: Config) -> Any:
    stages = build_stages(config, mesh, AttentionBackend.SDPA)
    initialise(torch.nn.ModuleList(stages.values()), 7)
    return TaskSuite(config, mesh).scores(whole_model(config, mesh, stages))


def test_ranks_share_the_pairs(run: Path) -> None:
    """Of a model that says anything, so that figures depend on every text."""
    config = numbers_config(run, evaluation=asked(run, beams=2), model={"init_std": 0.5, "dtype": "torch.float64"})
    expected = scores_on(single_process_mesh(), config)
    assert 0 < expected["pairs"]["chrf"] < 50
    found = [one["pairs"] for one in run_world(scores_on, 2, (config,))]
    assert found == [pytest.approx(expected["pairs"])] * 2
