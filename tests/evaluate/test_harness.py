"""Tasks of lm_eval on our forward pass: the scores of lm_eval's own `hf` model on the same weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from internlm_lite.cli import convert
from internlm_lite.config.schema import Config
from internlm_lite.data.tokenizer import Tokenizer
from internlm_lite.errors import ConfigError
from internlm_lite.evaluate.answers import Answers
from internlm_lite.evaluate.encoding import TextEncoder
from internlm_lite.evaluate.harness import HarnessTasks, harness_model
from internlm_lite.evaluate.scorer import Scorer
from internlm_lite.generate.load_model import load_model
from internlm_lite.generate.prompts import end_ids
from internlm_lite.mesh.mesh import single_process_mesh
from tests.apps.convert.made import save_ours, small_tokenizer
from tests.evaluate.local_tasks import TASKS, write_tasks

ROWS = 200


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ours/, a random checkpoint, hf/, the same exported, small.model and tasks/."""
    folder = tmp_path_factory.mktemp("harness")
    tokenizer = small_tokenizer(folder)
    save_ours(folder / "ours", tokenizer=str(tokenizer.path), vocab_size=304)
    command = ["to-hf", folder / "ours", folder / "hf", "--model-type", "llama", "--dtype", "float32"]
    assert convert.main([str(word) for word in command]) == 0
    write_tasks(folder / "tasks")
    return folder


def our_answers(folder: Path) -> Answers:
    mesh = single_process_mesh()
    model, config = load_model(str(folder / "ours"), mesh)
    assert isinstance(config, Config) and config.data.tokenizer is not None
    tokenizer = Tokenizer(Path(config.data.tokenizer))
    scorer = Scorer(model, mesh, tokenizer, ROWS)
    return Answers(scorer, TextEncoder(tokenizer, config.data.seq_len), end_ids(tokenizer))


def scored(lm: Any, names: list[str], folder: Path) -> dict[str, dict[str, Any]]:
    """Metrics, and the answers to every request, of lm_eval's evaluation."""
    from lm_eval.evaluator import evaluate

    loaded = HarnessTasks(names, str(folder / "tasks"))._load()
    found = evaluate(lm=lm, task_dict=loaded, bootstrap_iters=0, log_samples=True)
    answers = {name: [sample["resps"] for sample in samples] for name, samples in found["samples"].items()}
    metrics = {
        name: {key: value for key, value in values.items() if isinstance(value, float)}
        for name, values in found["results"].items()
    }
    return {"answers": answers, "metrics": metrics}


def flat(answers: Any) -> list[Any]:
    return [item for part in answers for item in flat(part)] if isinstance(answers, list | tuple) else [answers]


@pytest.mark.parametrize("task", sorted(TASKS))
def test_scores_are_those_of_the_hf_model(task: str, made: Path) -> None:
    """hf puts BOS before a rolling text itself, so there its tokenizer must add none: ours has exactly one."""
    from lm_eval.models.huggingface import HFLM

    bos = task != "local_rolling"
    theirs = HFLM(str(made / "hf"), device="cpu", dtype="float32", batch_size=3, add_bos_token=bos, max_length=64)
    expected, found = scored(theirs, [task], made), scored(harness_model(our_answers(made)), [task], made)
    assert found["metrics"][task] == pytest.approx(expected["metrics"][task], rel=1e-4) and found["metrics"][task]
    ours, reference = flat(found["answers"][task]), flat(expected["answers"][task])
    assert len(ours) == len(reference) >= 7
    for one, other in zip(ours, reference, strict=True):
        assert one == (pytest.approx(other, rel=1e-4, abs=1e-4) if isinstance(other, float) else other)


def test_an_example_that_makes_no_question_is_one_error(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """lm_eval looks at one example when it loads a task. What our own forward pass raises stays what it is."""
    folder = write_tasks(tmp_path / "tasks")
    documents = (folder / "documents.jsonl").read_text().splitlines()
    broken = {**json.loads(documents[4]), "choices": None}
    (folder / "documents.jsonl").write_text("\n".join([*documents[:4], json.dumps(broken)]) + "\n")
    tasks = HarnessTasks(["local_choice"], str(folder))
    with pytest.raises(ConfigError, match=r"^evaluation.tasks: lm_eval fails on an example of local_choice \("):
        tasks.scores(our_answers(made), None)
    answers = our_answers(made)
    monkeypatch.setattr(answers, "log_likelihoods", lambda pairs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        HarnessTasks(["local_choice"], str(made / "tasks")).scores(answers, None)
