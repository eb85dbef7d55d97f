"""Scores and texts of many requests at a time and on several ranks: those of each alone."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from internlm_lite.config.schema import Config
from internlm_lite.errors import ConfigError, PeerLostError
from internlm_lite.evaluate.encoding import Window
from internlm_lite.evaluate.scorer import Scorer, cut
from internlm_lite.generate.request import Request
from internlm_lite.generate.sample import Sampling
from internlm_lite.layers.flash import AttentionBackend
from internlm_lite.mesh.mesh import Mesh, single_process_mesh
from internlm_lite.models.initialise import initialise
from internlm_lite.models.stages import WholeModel, build_stages, whole_model
from tests.models.small import VOCAB, documents, row_of, small_config, small_model
from tests.world import Leaves, run_world

LENGTHS = [7, 1, 12, 3, 9, 5, 12]
DRAWN = Sampling(temperature=3)
"""A random model repeats itself otherwise."""


def windows() -> list[Window]:
    """Odd in number, with the id 0 among those fed and scored, one twice and one that asks for less of the same."""
    found = [tuple(doc.tolist()) for doc in documents(LENGTHS, seed=5)]
    rows = [Window(doc, doc[: 1 + n % len(doc)]) for n, doc in enumerate(found)]
    rows = [Window((0, *row.tokens[1:]), (0, *row.targets[1:])) for row in rows]
    return [*rows, rows[2], Window(rows[2].tokens, (3,))]


def decode(ids: Any) -> str:
    return "".join(chr(97 + token % 26) for token in ids)


def scorer(model: WholeModel, mesh: Mesh, row_tokens: int = 1000) -> Scorer:
    return Scorer(model, mesh, SimpleNamespace(decode=decode), row_tokens)  # type: ignore[arg-type]


def alone() -> Scorer:
    mesh = single_process_mesh()
    return scorer(WholeModel({0: small_model()}, mesh), mesh)


@torch.no_grad()
def test_scores_are_sums_of_log_probabilities() -> None:
    model = small_model()
    found = scorer(WholeModel({0: model}, single_process_mesh()), single_process_mesh()).score(windows())
    for window, score in zip(windows(), found, strict=True):
        tokens, positions, _, attend = row_of([torch.tensor(window.tokens)])
        logits = model.logits(model.hidden(tokens, positions, attend))[-len(window.targets) :]
        targets = torch.tensor(window.targets)
        expected = logits.double().log_softmax(-1).gather(1, targets[:, None]).sum()
        assert score.log_probability == pytest.approx(float(expected), rel=1e-9)
        assert score.is_greedy == bool((logits.argmax(-1) == targets).all())


@pytest.mark.parametrize("row_tokens", [1, 10, 25, 1000])
def test_a_batch_scores_as_its_rows_alone(row_tokens: int) -> None:
    """There is no padding to score, and the id 0 is a token like others."""
    mesh, model = single_process_mesh(), WholeModel({0: small_model()}, single_process_mesh())
    single = [scorer(model, mesh).score([window])[0].log_probability for window in windows()]
    found = [score.log_probability for score in scorer(model, mesh, row_tokens).score(windows())]
    assert found == pytest.approx(single, rel=1e-12) and len(found) == len(windows())
    assert found[2] == found[-2] != found[-1]


def requests() -> list[Request]:
    prompts = [doc.tolist() for doc in documents(LENGTHS, seed=6)]
    return [Request(prompt, 9, seed=n) for n, prompt in enumerate(prompts)]


def test_texts_end_row_by_row() -> None:
    """Stop strings and end tokens end their own row, whatever runs beside it."""
    whole = alone().generate(requests(), DRAWN)
    strings = [("??", text[n : n + 2]) if n < 5 else () for n, text in enumerate(whole)]
    ends = frozenset(token for token in range(VOCAB) if chr(97 + token % 26) == whole[5][4])
    stopped = [
        replace(one, stop_strings=strings[n], stop_ids=ends if n >= 5 else frozenset())
        for n, one in enumerate(requests())
    ]
    expected = [cut(text, [*strings[n], *(whole[5][4] if n >= 5 else "")]) for n, text in enumerate(whole)]
    assert alone().generate(stopped, DRAWN) == expected
    assert [alone().generate([request], DRAWN)[0] for request in stopped] == expected
    assert len({len(text) for text in expected}) > 2


def test_cut() -> None:
    assert cut("one two three", ["three", "two"]) == "one "
    assert cut("one", []) == cut("one", ["two"]) == "one" and cut("one", ["one"]) == ""


LAYOUTS = [{"dp": 2}, {"dp": 3}, {"tp": 2}, {"pp": 2}, {"dp": 2, "tp": 2}, {"cp": 3}]


def built(mesh: Mesh, sizes: dict[str, int]) -> WholeModel:
    config = Config.model_validate(
        {
            "data": {"seq_len": 32, "total_steps": 1},
            "lr_scheduler": {"total_steps": 1},
            "model": small_config(num_layers=2).model_dump(),
            "parallel": {"tensor": sizes.get("tp", 1), "pipeline": {"size": sizes.get("pp", 1)}},
        }
    )
    stages = build_stages(config, mesh, AttentionBackend.SDPA)
    initialise(torch.nn.ModuleList(stages.values()), seed=7)
    return whole_model(config, mesh, stages)


def _lead(mesh: Mesh, sizes: dict[str, int]) -> Any:
    told = scorer(built(mesh, sizes), mesh, 25)
    found = told.lead(lambda: ([score.log_probability for score in told.score(windows())], told.score([]), 3))
    return found, told.lead(lambda: told.generate(requests(), DRAWN))


@pytest.mark.parametrize("sizes", LAYOUTS, ids=str)
def test_every_layout_answers_all_requests(sizes: dict[str, int]) -> None:
    """Nine windows and seven prompts on two or three ranks: no hang, nothing twice, nothing left out."""
    (expected, _, _), texts = _lead(single_process_mesh(), {})
    world = math.prod(sizes.values())
    options = {"tensor": sizes.get("tp", 1), "pipeline": sizes.get("pp", 1), "context": sizes.get("cp", 1)}
    for (scores, nothing, three), written in run_world(_lead, world, (sizes,), **options):
        assert scores == pytest.approx(expected, rel=1e-10) and len(scores) == len(windows())
        assert written == texts and nothing == [] and three == 3


def _fails(mesh: Mesh, where: str) -> Any:
    told = scorer(built(mesh, {}), mesh)
    if where == "rank 1":
        told._score_row = _raise if mesh.rank == 1 else told._score_row  # type: ignore[method-assign]
        try:
            told.lead(lambda: told.score(windows()))
        except Exception as error:
            return Leaves(type(error).__name__)
    try:
        told.lead(lambda: _raise())
    except Exception as error:
        return type(error).__name__, str(error)


def _raise(*arguments: Any) -> Any:
    raise ConfigError("found no such task") if not arguments else RuntimeError("out of memory")


def test_an_error_on_any_rank_ends_all() -> None:
    """Of rank 0 between its questions: the same on all. Of another rank in the middle: it ends, the others notice."""
    assert run_world(_fails, 2, ("rank 0",)) == [("ConfigError", "found no such task")] * 2
    assert run_world(_fails, 2, ("rank 1",), timeout_seconds=60) == [PeerLostError.__name__, "RuntimeError"]
