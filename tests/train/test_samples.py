"""Samples while training: the same training to the last bit, each step once, every layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from internlm_lite.config.schema import Config
from internlm_lite.data.tokenizer import Tokenizer, train_tokenizer
from internlm_lite.errors import DataError
from internlm_lite.faults.signals import StopSignals
from internlm_lite.mesh.mesh import Mesh, single_process_mesh
from internlm_lite.monitor.jsonl import read_objects
from internlm_lite.train import samples
from internlm_lite.train.build import build_run
from internlm_lite.train.loop import train
from tests.corpus import write_corpus
from tests.steps import read_metrics
from tests.torches import HAS_ZBV
from tests.train.runs import curve, run_training, tiny
from tests.train.test_resume import killed_after
from tests.world import run_world

PROMPTS = ["One run, one folder", "x"]
VOCAB = 512


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with corpus/ and small.model."""
    folder = tmp_path_factory.mktemp("samples")
    write_corpus(folder / "corpus")
    texts = (path.read_text() for path in Path(__file__).parent.glob("*.py"))
    train_tokenizer(texts, folder / "small.model", VOCAB, threads=1)
    return folder


def config_for(folder: Path, every: int | str | None, **sections: dict[str, Any]) -> Config:
    """`every` None: no prompts."""
    prompts = PROMPTS if every is not None else []
    return tiny(
        folder / "corpus",
        monitor={"sample_prompts": prompts, "sample_every": every or 0, "sample_tokens": 6},
        data={"tokenizer": str(folder / "small.model"), **sections.pop("data", {})},
        model={"vocab_size": VOCAB, **sections.pop("model", {})},
        **sections,
    )


def trained(mesh: Mesh, config: Config, folder: Path) -> tuple[list, torch.Tensor, list[dict[str, Any]]]:
    """(curve, state of the random generator at the end, samples) of one run."""
    torch.manual_seed(3)
    metrics = run_training(mesh, config, folder)
    return curve(metrics), torch.get_rng_state(), samples_in(folder)


def samples_in(folder: Path) -> list[dict[str, Any]]:
    return list(read_objects(folder / "samples.jsonl"))


def test_training_is_the_same_with_samples(data: Path, tmp_path: Path):
    plain = trained(single_process_mesh(), config_for(data, None), tmp_path / "plain")
    often = trained(single_process_mesh(), config_for(data, 3), tmp_path / "often")
    end = trained(single_process_mesh(), config_for(data, 0), tmp_path / "end")
    assert plain[0] == often[0] == end[0]
    assert torch.equal(plain[1], often[1])
    assert [(sample["step"], sample["prompt"]) for sample in often[2]] == [
        (step, prompt) for step in (3, 6, 8) for prompt in PROMPTS
    ]
    assert plain[2] == [] and [sample["step"] for sample in end[2]] == [8, 8]
    assert [sample["text"] for sample in end[2]] == [sample["text"] for sample in often[2][4:]]
    assert all(sample["seg"] == 0 and sample["time"][:2] == "20" for sample in often[2])
    assert often[2][0]["text"] != often[2][4]["text"], "another model by then"


@pytest.mark.parametrize(("skip", "steps"), [("", [2, 4, 6, 8]), ("0", [1, 3, 5, 7, 8]), ("1-2", [2, 4, 6, 8])])
def test_samples_after_each_pass_over_the_data(skip: str, steps: list[int], data: Path, tmp_path: Path) -> None:
    """Two batches each; a skipped batch counts, and one that ends a pass does with the next that is trained on."""
    config = config_for(data, "epoch", data={"micro_bsz": 16, "skip_batches": skip})
    assert [sample["step"] for sample in trained(single_process_mesh(), config, tmp_path)[2][::2]] == steps


def both(mesh: Mesh, config: Config, changed: Config, folder: Path) -> list:
    """Without and with samples, in one world."""
    return [trained(mesh, config, folder / "plain"), trained(mesh, changed, folder / "often")]


@pytest.mark.parametrize(
    ("size", "parallel", "model"),
    [
        (2, {}, {}),
        (2, {"pipeline": {"size": 2}}, {}),
        (2, {"context": {"size": 2}}, {}),
        (4, {"tensor": 2, "sequence_parallel": True}, {}),
        *[(2, {"pipeline": {"size": 2, "schedule": "zbv"}}, {"num_chunks": 2, "num_layers": 4})] * HAS_ZBV,
    ],
    ids=["dp2", "pp2", "cp2", "dp2 tp2", *["zbv"] * HAS_ZBV],
)
def test_training_is_the_same_with_samples_in_every_layout(
    size: int, parallel: dict[str, Any], model: dict[str, Any], data: Path, tmp_path: Path
):
    tensor, pipeline = parallel.get("tensor", 1), parallel.get("pipeline", {}).get("size", 1)
    context = parallel.get("context", {}).get("size", 1)
    rows = {"micro_num": 4 * tensor * pipeline * context // size}  # the same 4 rows a step in every layout
    plain, often = (config_for(data, every, data=rows, parallel=parallel, model=model) for every in (None, 3))
    ranks = run_world(both, size, (plain, often, tmp_path), tensor=tensor, pipeline=pipeline, context=context)
    (expected, _, none), (found, _, shown) = ranks[0]
    assert len(found) == 8 and found == expected and none == []
    assert [sample["step"] for sample in shown] == [3, 3, 6, 6, 8, 8]
    for (_, before, _), (_, after, _) in ranks:
        assert torch.equal(before, after)
    single = trained(single_process_mesh(), config_for(data, 3, model={**model, "num_chunks": 1}), tmp_path / "single")
    assert len(single[2]) == 6
    assert [sample["text"] for sample in shown[:2]] == [sample["text"] for sample in single[2][:2]]


def test_a_restart_shows_the_samples_of_the_steps_it_does(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    mesh, run = single_process_mesh(), tmp_path / "run"
    whole = trained(mesh, config_for(data, 2), tmp_path / "whole")
    saves = {"enable_save_ckpt": True, "save_ckpt_folder": f"local:{tmp_path}/saves", "async_upload": False}
    config = config_for(data, 2, ckpt={**saves, "checkpoint_every": 4})
    killed_after(7, mesh, config, run, monkeypatch)
    assert [sample["step"] for sample in samples_in(run)] == [2, 2, 4, 4, 6, 6]
    assert trained(mesh, config, run)[0] == whole[0]
    found = [(sample["seg"], sample["step"], sample["text"]) for sample in samples_in(run)[::2]]
    texts = {sample["step"]: sample["text"] for sample in whole[2][::2]}
    assert found == [(seg, step, texts[step]) for seg, step in ((0, 2), (0, 4), (0, 6), (1, 6), (1, 8))]
    before = (run / "samples.jsonl").read_bytes()
    assert [step["seg"] for step in read_metrics(run / "metrics.jsonl")] == [0] * 4 + [1] * 4
    again = build_run(config, mesh, run)
    assert again.start.step == 8
    again.checkpoints.close(wait=True)
    assert (run / "samples.jsonl").read_bytes() == before


class NoBos(Tokenizer):
    """Has no token to begin an empty prompt with."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.bos = None


def refused(mesh: Mesh, config: Config, folder: Path) -> str:
    with pytest.MonkeyPatch.context() as patch:
        if mesh.is_main:
            patch.setattr(samples, "Tokenizer", NoBos)
        with pytest.raises(DataError) as error:
            run_training(mesh, config, folder)
    return str(error.value)


def test_unusable_prompt_is_refused_on_all_ranks(data: Path, tmp_path: Path):
    config = config_for(data, 0, data={"micro_num": 2})
    config = config.model_copy(update={"monitor": config.monitor.model_copy(update={"sample_prompts": ["x", ""]})})
    errors = run_world(refused, 2, (config, tmp_path / "run"))
    assert errors[0].startswith("prompt 1 is empty") and errors[0] == errors[1]
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_sample_that_would_outgrow_the_learned_positions_is_refused_at_the_start(data: Path, tmp_path: Path):
    config = config_for(data, 4, model={"position": "learned", "max_position_embeddings": 32})
    prompts = {"sample_prompts": ["x" * 400]}
    config = config.model_copy(update={"monitor": config.monitor.model_copy(update=prompts)})
    with pytest.raises(
        DataError, match=r"prompt 0 has \d+ tokens, and 6 more are asked for: the model has 32 positions"
    ):
        run_training(single_process_mesh(), config, tmp_path)


def test_a_run_that_is_stopped_shows_no_last_samples(data: Path, tmp_path: Path):
    stop = tmp_path / "stop"
    stop.write_text("3")
    run = build_run(config_for(data, 2, ckpt={"stop_file_path": str(stop)}), single_process_mesh(), tmp_path, "none")
    assert train(run, StopSignals()).stopped_by == "stop file with 3"
    run.reporter.close()
    assert [sample["step"] for sample in samples_in(tmp_path)] == [2, 2]
