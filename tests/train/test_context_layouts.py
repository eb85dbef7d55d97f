"""Context parallelism in whole runs: loss, norm and weights of one process, and no leak between documents."""

from __future__ import annotations

import logging
import os
import random
from collections import Counter
from dataclasses import replace
from functools import cache
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from internlm_lite.batch import Batch
from internlm_lite.config.schema import Config
from internlm_lite.data.data_loader import open_training_data
from internlm_lite.data.order import Position
from internlm_lite.layers.context_parallel.exchanges import EXCHANGES
from internlm_lite.mesh.mesh import Mesh, build_mesh, single_process_mesh
from internlm_lite.train.own_rows import WholeRow, own_rows
from internlm_lite.train.trainer import BatchTask, Trainer
from tests.apps.planner.steps import random_batch, run_step, small
from tests.corpus import write_corpus
from tests.torches import HAS_ZBV
from tests.train.layout_runs import check_layouts_of_one_size
from tests.train.layouts import LIMIT, Keys, Layout, config_of, feasible
from tests.world import TIMEOUT, run_world

SAMPLE = int(os.environ.get("CONTEXT_RUNS", "10"))
"""`CONTEXT_RUNS=60 pytest tests/train/test_context_layouts.py` runs all."""
RUNS = 60
WINDOWS: Keys = (("model.sliding_window", 5), ("model.layer_types", ("sliding_attention", "full_attention")))
MODELS: dict[str, tuple[Keys, ...]] = {
    "window": ((), WINDOWS, (*WINDOWS, ("model.attention_softcap", 5.0))),
    "heads": ((), (("model.num_kv_attention_heads", 8),), (("model.num_attention_heads", 4),)),
    "dropout": (
        (),
        (("model.attention_dropout", 0.3), ("model.residual_dropout", 0.2), ("model.embedding_dropout", 0.1)),
    ),
}
"""Options that are keys of the model. A row of 32 tokens has documents of 1 to 32; a rank has 8, 16 or 32 of them."""
OPTIONS: dict[str, tuple[Any, ...]] = {
    "cp": (2, 4),
    "exchange": tuple(EXCHANGES),
    "dp": (1, 2),
    "tp": (1, 2),
    "sp": (False, True),
    "pipeline": ((1, None, 1), (2, "1f1b", 1), (2, "interleaved", 2), *[(2, "zbv", 2)] * HAS_ZBV, (4, "1f1b", 1)),
    "zero1": (-1, 1, 2),
    "zero_stage": (1, 2, 3),
    "reshard": (True, False),
    "checkpoint": (0, 0.5, 1, "selective"),
    "tied": (False, True),
    "micro_bsz": (1, 2),
    "rows": (4, 8),
    "bucket": (1 << 29, 1500),
    "rope": (None, "dynamic"),
    **MODELS,
}


def layout_of(choice: dict[str, Any]) -> Layout:
    pp, schedule, chunks = choice["pipeline"]
    keys = sum((choice[name] for name in MODELS), ())
    plain = {name: value for name, value in choice.items() if name not in (*MODELS, "pipeline")}
    return Layout(**plain, pp=pp, schedule=schedule, chunks=chunks, keys=keys, split_hidden=not choice["tied"])


@cache
def context_layouts() -> tuple[Layout, ...]:
    """Of five that fit the number of ranks, the one whose pairs of values have met least."""
    dice, met = random.Random(16), Counter[frozenset[tuple[str, int]]]()
    found: list[Layout] = []
    while len(found) < RUNS:
        ranks = (2, 4, 4, 8)[len(found) % 4]  # those of eight ranks take longest
        fits: list[tuple[int, dict[str, int], Layout]] = []
        while len(fits) < 5:
            one = {name: dice.randrange(len(values)) for name, values in OPTIONS.items()}
            layout = layout_of({name: OPTIONS[name][number] for name, number in one.items()})
            if layout.world == ranks and feasible(layout):
                fits.append((sum(met[frozenset(ends)] for ends in combinations(one.items(), 2)), one, layout))
        _, one, layout = min(fits, key=lambda fit: fit[0])
        found.append(layout)
        met.update(frozenset(ends) for ends in combinations(one.items(), 2))
    return tuple(found)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("context") / "corpus", documents=200)


@pytest.mark.parametrize("ranks", (2, 4, 8))
def test_every_layout_gives_the_figures_and_weights_of_one_process(ranks: int, corpus: Path, tmp_path: Path) -> None:
    layouts = [layout for layout in context_layouts()[:SAMPLE] if layout.world == ranks]
    if layouts:
        check_layouts_of_one_size(layouts, lambda layout: config_of(layout, corpus), LIMIT, tmp_path)


SHARDED = [
    Layout(cp=2, tp=2, sp=True, checkpoint=0.5, tied=True, split_hidden=False, zero_stage=3),
    Layout(cp=2, dp=2, zero1=2, bucket=1500, zero_stage=3, reshard=False),
    *[Layout(cp=2, pp=2, schedule="zbv", chunks=2, zero_stage=2)] * HAS_ZBV,
    Layout(cp=4, keys=(*WINDOWS, *MODELS["dropout"][1]), micro_bsz=2, zero_stage=3),
    Layout(cp=4, exchange="ring", checkpoint=1, zero_stage=2),
    Layout(cp=2, dp=2, exchange="ulysses", zero_stage=3),
]


def test_gradients_and_weights_that_are_shards_over_a_context(corpus: Path, tmp_path: Path) -> None:
    """ZeRO-2 and 3 share over data and context ranks alike."""
    check_layouts_of_one_size(SHARDED, lambda layout: config_of(layout, corpus), LIMIT, tmp_path)


class Perturbed:
    """A batch of one row, and the same with other tokens in one of its documents."""

    def __init__(self, mesh: Mesh, layout: Layout, corpus: Path, seed: int) -> None:
        self.config = config_of(layout, corpus)
        data = open_training_data(self.config.data, self.config.model.vocab_size, 0, 1, self.config.seed)
        self.batch = data.build(Position())
        boundaries = sorted(set(self.batch.cu_seqlens_host[0]))
        documents = list(pairwise(boundaries))
        self.span = documents[seed % len(documents)]
        tokens = self.batch.tokens.clone()
        tokens[0, slice(*self.span)] = (tokens[0, slice(*self.span)] + 1 + seed) % self.config.model.vocab_size
        self.other = replace(self.batch, tokens=tokens)


def hidden_of_rows(trainer: Trainer, config: Config, batch: Batch, mesh: Mesh) -> torch.Tensor:
    """This rank's tokens of the first row behind all layers, outside split layers."""
    rows = own_rows(config, mesh)(batch)
    one, loss_sum = torch.ones(()), torch.zeros((), dtype=torch.float64)
    task = BatchTask(trainer.stages, batch, rows, one, trainer.metrics, loss_sum)
    with torch.no_grad():
        return task.forward(0, 0, None)


def hidden_states(world: Mesh, layouts: list[Layout], corpus: Path) -> list[list[tuple[torch.Tensor, ...]]]:
    """For each layout, for each of three documents: numbers of this rank's tokens, hidden states of them, hidden
    states of them where the document has other tokens, and whether a token is of that document."""
    logging.disable(logging.WARNING)
    found = []
    for layout in layouts:
        mesh = build_mesh(layout.sizes, world.rank, world.device, TIMEOUT)
        seen = []
        for seed in range(3):
            case = Perturbed(mesh, layout, corpus, seed)
            trainer = Trainer(case.config, mesh)
            own = own_rows(case.config, mesh)(case.batch)[0].cut(torch.arange(case.batch.tokens.shape[1]))
            own = next(iter(trainer.stages.values())).tp_ctx.own_tokens(own, 0)
            states = [hidden_of_rows(trainer, case.config, batch, mesh) for batch in (case.batch, case.other)]
            seen.append((own, *states, (own >= case.span[0]) & (own < case.span[1])))
        found.append(seen)
    return found


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_a_document_changes_no_bit_of_another(exchange: str, corpus: Path) -> None:
    layouts = [
        Layout(cp=4, exchange=exchange, micro_bsz=2),
        Layout(cp=2, tp=2, sp=True, exchange=exchange),
        Layout(cp=4, exchange=exchange, micro_bsz=2, keys=WINDOWS),
    ]
    for layout, *ranks in zip(layouts, *run_world(hidden_states, 4, (layouts, corpus)), strict=True):
        for rows in zip(*ranks, strict=True):
            changed = 0
            for _, before, after, inside in rows:
                assert torch.equal(before[~inside], after[~inside]), f"{layout}: another document's tokens have changed"
                changed += int((before[inside] != after[inside]).any(-1).sum())
            assert changed == len(torch.cat([own[inside] for own, _, _, inside in rows]).unique()), layout


@pytest.mark.parametrize("dynamic", [False, True])
def test_lengths_of_documents_are_counted_where_a_rotation_asks(dynamic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    scaling = {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 8}
    config = small(model={"rope_scaling": scaling} if dynamic else {})
    asked: list[torch.Tensor] = []
    monkeypatch.setattr(WholeRow, "lengths", lambda _, positions: asked.append(positions))
    trainer = Trainer(config, single_process_mesh())
    run_step(trainer, random_batch(config, trainer.mesh))
    assert len(asked) == dynamic * config.data.micro_num
