"""A layout that cannot be: every process says so by itself, before any process group exists."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from tests import cli

CONFIG = """
MODEL = dict(num_attention_heads=32, hidden_size=256, num_layers=12, vocab_size=1024, dtype="torch.bfloat16")
DATA = dict(seq_len=128, micro_bsz=1, micro_num=8, total_steps=2)
PARALLEL = dict()
model = dict(MODEL)
data = dict(DATA)
parallel = dict(PARALLEL)
"""

# (world, model, data, parallel, the one problem)
WRONG = {
    "33 heads over 4": (
        4,
        "num_attention_heads=33, hidden_size=264",
        "",
        "tensor=4",
        "model.num_attention_heads: found 33, expected a multiple of parallel.tensor 4; change one of them",
    ),
    "2 key/value heads over 4": (
        4,
        "num_kv_attention_heads=2",
        "",
        "tensor=4",
        "model.num_kv_attention_heads: found 2, expected a multiple of parallel.tensor 4; change one of them",
    ),
    "10 layers over 4 stages x 3 chunks": (
        4,
        "num_layers=10, num_chunks=3",
        "",
        "pipeline=dict(size=4)",
        "model.num_layers: found 10, expected at least parallel.pipeline.size 4 * model.num_chunks 3 = 12, "
        "a layer for each; change one of them",
    ),
    "interleaving 6 micro-batches over 4 stages": (
        8,
        "num_chunks=2",
        "micro_num=6",
        "pipeline=dict(size=4)",
        "data.micro_num: found 6, expected a multiple of parallel.pipeline.size 4, which interleaved chunks need; "
        "change one of them, or set model.num_chunks to 1",
    ),
    "1022 words over 4": (
        4,
        "vocab_size=1022",
        "",
        "tensor=4",
        "model.vocab_size: found 1022, expected a multiple of parallel.tensor 4; change one of them",
    ),
    "weights that come and go with 2 chunks": (
        4,
        "num_chunks=2",
        "",
        "zero_stage=3, pipeline=dict(size=2)",
        'parallel.zero_stage: found 3 with 2 chunks (interleaved), expected one, as with "1f1b"; set zero_stage to 2, '
        "or num_chunks to 1",
    ),
    "weights that come and go with zero bubble": (
        4,
        "num_chunks=2",
        "",
        'zero_stage=3, pipeline=dict(size=2, schedule="zbv")',
        'parallel.zero_stage: found 3 with 2 chunks (zbv), expected one, as with "1f1b"; set zero_stage to 2, or '
        "num_chunks to 1",
    ),
    "zero bubble with 3 chunks": (
        2,
        "num_chunks=3",
        "",
        "pipeline=dict(size=2, schedule='zbv')",
        'model.num_chunks: found 3, expected 2 with parallel.pipeline.schedule "zbv"; change one of them',
    ),
    "rows of 130 tokens over 4": (
        4,
        "",
        "seq_len=130",
        "tensor=4, sequence_parallel=True",
        "parallel.sequence_parallel: found True with rows of micro_bsz * seq_len = 130 tokens, expected a multiple of "
        "parallel.tensor 4; change one of them",
    ),
    "rows of 130 tokens over a context of 4": (
        4,
        "",
        "seq_len=130",
        "context=4",
        "parallel.context.size: found 4 with rows of micro_bsz * seq_len = 130 tokens, expected a multiple of "
        "parallel.context.size: each rank has the same number of tokens; change one of them",
    ),
    "rows of 132 tokens over a context of 4, cut over 2 again": (
        8,
        "",
        "seq_len=132",
        "context=dict(size=4, exchange='ring'), tensor=2, sequence_parallel=True",
        "parallel.sequence_parallel: found True with rows of micro_bsz * seq_len = 132 tokens, expected a multiple of "
        "parallel.context.size 4 * parallel.tensor 2 = 8; change one of them",
    ),
    "6 processes for 4 with a context": (
        6,
        "",
        "",
        "tensor=2, context=2",
        "parallel.tensor: one copy of the model takes 2 * parallel.pipeline.size 1 * parallel.context.size 2 = 4 "
        "processes; found 6 processes, expected a multiple of 4; start more (srun -n, torchrun --nproc_per_node, "
        "--world-size of a dry run), or change the layout",
    ),
    "3 of 8 ranks with the same weights": (
        8,
        "",
        "",
        "zero1=3, context=4",
        "parallel.zero1: found 3, expected a divisor of the data parallel size times context 8 (8 processes / 1 per "
        "model), -1 for all of it, or 1 for none; or start more (--world-size of a dry run)",
    ),
    "6 processes for 4": (
        6,
        "",
        "",
        "tensor=2, pipeline=2",
        "parallel.tensor: one copy of the model takes 2 * parallel.pipeline.size 2 = 4 processes; found 6 processes, "
        "expected a multiple of 4; start more (srun -n, torchrun --nproc_per_node, --world-size of a dry run), "
        "or change the layout",
    ),
}


def test_config_wrong_on_one_machine_is_reported_there(tmp_path: Path) -> None:
    """By the first of its ranks."""
    (tmp_path / "config.py").write_text(CONFIG.replace("PARALLEL = dict()", "PARALLEL = dict(tensor=0)"))
    said = {}
    for rank, local in ((2, 0), (3, 1)):
        environment = {"RANK": str(rank), "WORLD_SIZE": "4", "LOCAL_RANK": str(local), "LOCAL_WORLD_SIZE": "2"}
        agent = tmp_path / f"{rank}.json"
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "TORCHELASTIC_ERROR_FILE": str(agent)}
        log = tmp_path / f"{rank}.log"
        process = cli.start("train.py", "--config", "config.py", folder=tmp_path, log=log, environment=environment)
        ended = cli.ended(process, log, timeout_seconds=60)
        assert ended.code == 2, ended.output
        said[rank] = ended.output
        assert "ConfigError: " in agent.read_text(), "torchrun's summary has it of every rank"
    assert said[2].startswith(f"rank 2 on {socket.gethostname()}: ConfigError: ") and said[3] == ""


@pytest.mark.parametrize("name", WRONG)
def test_one_clear_error_before_any_process_group(name: str, tmp_path: Path) -> None:
    """One rank of the world is started, alone: waiting for the others would last until the time-out."""
    world, model, data, parallel, problem = WRONG[name]
    text = CONFIG.replace("dict(MODEL)", f"dict(MODEL, **dict({model}))").replace(
        "dict(DATA)", f"dict(DATA, **dict({data}))"
    )
    (tmp_path / "config.py").write_text(text.replace("PARALLEL = dict()", f"PARALLEL = dict({parallel})"))
    environment = {
        "RANK": "0",
        "WORLD_SIZE": str(world),
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1",
    }
    log = tmp_path / "output.log"
    arguments = ("--config", "config.py", "--device", "cpu")
    process = cli.start("train.py", *arguments, folder=tmp_path, log=log, environment=environment)
    ended = cli.ended(process, log, timeout_seconds=60)
    assert ended.code == 2, ended.output
    assert "Traceback" not in ended.output
    lines = [line for line in ended.output.splitlines() if line]
    assert len(lines) == 1 and lines[0].endswith(problem), ended.output
    assert not (tmp_path / "RUN").exists()
