"""tools/slurm.py: what it writes, what it refuses, and that a real Slurm takes it, to the time limit and beyond."""

from __future__ import annotations

import shlex
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from internlm_lite.apps.planner.sbatch import SlurmJob, nodes_of, sbatch_text, time_seconds
from internlm_lite.cli import slurm as tool
from internlm_lite.errors import ConfigError, MeshError
from tests.cli import ROOT
from tests.launch.test_slurm import await_line, texts
from tests.slurmlab import SlurmLab

JOB = SlurmJob(
    name="a",
    about="a: 1 x 8 GPUs",
    nodes=1,
    per_node=8,
    on_gpus=True,
    cpus_per_task=8,
    partition=None,
    account=None,
    time=None,
    lead_seconds=120,
    logs=Path("/logs"),
    folder=Path("/home/me"),
    repository=Path("/it's here"),
    arguments=("my config.py", "a.b='$(touch x)'", "x=`touch x`"),
)


def options(text: str) -> list[str]:
    return [line.removeprefix("#SBATCH --") for line in text.splitlines() if line.startswith("#SBATCH")]


@pytest.mark.parametrize(
    ("world", "per_node", "shape"), [(16, 8, (2, 8)), (8, 8, (1, 8)), (3, 8, (1, 3)), (12, 4, (3, 4)), (1, 8, (1, 1))]
)
def test_nodes(world, per_node, shape):
    assert nodes_of(world, per_node) == shape


@pytest.mark.parametrize(("world", "words"), [(12, "8 or 16, or --gpus-per-node 6"), (13, "multiple of it: 8 or 16")])
def test_half_a_node_is_refused(world, words):
    with pytest.raises(MeshError, match=words):
        nodes_of(world, 8)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 5400), ("90:30", 5430), ("1:02:03", 3723), ("2-3", 183600), ("2-3:4", 183840), ("2-3:4:5", 183845)],
)
def test_time_limits(text, seconds):
    assert time_seconds(text) == seconds


@pytest.mark.parametrize("text", ["", "1h", "1:2:3:4", "-1", "1-", "infinite"])
def test_what_is_no_time_limit(text):
    with pytest.raises(ConfigError, match="--time"):
        time_seconds(text)


def test_the_call_survives_any_character(tmp_path: Path):
    """bash, asked for the words it would run, gives back what went in."""
    call = sbatch_text(JOB).splitlines()[-1].removeprefix("exec bash ")
    done = subprocess.run(
        ["bash", "-c", f"printf '%s\\n' {call}"], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.splitlines() == ["/it's here/launch/slurm.sh", *JOB.arguments] == shlex.split(call)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"name": "a\n#SBATCH --wrap=x"}, "JOB_NAME"),
        ({"partition": "a b"}, "--partition"),
        ({"account": "$(x)"}, "--account"),
        ({"logs": Path("/a/%j")}, "--output"),
        ({"folder": Path("/a b")}, "the working folder"),
        ({"time": "3"}, "found 180 s, expected more than 180"),
    ],
)
def test_what_slurm_would_misread_is_refused(changes, words):
    with pytest.raises(ConfigError, match=words):
        sbatch_text(replace(JOB, **changes))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_20b_file(slurm: SlurmLab, here: Path, capsys):
    config = str(ROOT / "configs" / "20B_sft.py")
    code = tool.main(["--config", config, "--world-size", "16", "--partition", "main", "--time", "1-00:00:00"])
    out = capsys.readouterr().out
    assert code == 0, out
    assert out.splitlines()[-1] == f"sbatch {here}/slurm/20b_train.sbatch"
    assert "note: ckpt.enable_save_ckpt=False" in out
    text = (here / "slurm" / "20b_train.sbatch").read_text()
    assert "# 20b_train: 2 x 8 GPUs = dp 4 x tp 4 x pp 1; about 53.23 GiB on the fullest rank" in text
    assert options(text) == [
        "job-name=20b_train", "partition=main", "time=1-00:00:00", "nodes=2", "ntasks-per-node=8", "gpus-per-node=8",
        "cpus-per-task=8", f"chdir={here}", f"output={here}/slurm/slurm-%j.log", "open-mode=append", "requeue",
        "signal=B:USR1@120",
    ]  # fmt: skip
    assert text.splitlines()[-1] == f"exec bash {ROOT}/launch/slurm.sh {config}"
    tested = slurm.run("sbatch", "--test-only", "slurm/20b_train.sbatch", folder=here)
    assert tested.returncode == 0, tested.stderr
    assert "using 128 processors on nodes node1,node2 in partition main" in tested.stderr.replace(
        "node[1-2]", "node1,node2"
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--world-size", "12"], "MeshError: --world-size 12"),
        (["--world-size", "16", "parallel.tensor=3"], "model.num_attention_heads: found 40"),
        (["--nodes", "1", "data.train_folder='absent'"], "DataError"),
        (["--nodes", "2", "--time", "soon"], "ConfigError: --time 'soon'"),
    ],
)
def test_what_the_run_would_refuse_is_refused(here: Path, capsys, arguments, words):
    assert tool.main(["--config", str(ROOT / "configs" / "20B_sft.py"), *arguments]) == 2
    assert words in capsys.readouterr().err
    assert list(here.iterdir()) == []


def test_a_job_lives_past_its_time_limit(slurm: SlurmLab, folder: Path, monkeypatch, capsys):
    """The limit's signal reaches the ranks through the batch shell; they save; the job is put back and ends."""
    steps = folder / "steps"
    steps.write_text("100000")
    config = (folder / "config.py").read_text().replace("STEPS = 60", "STEPS = int(open('steps').read())")
    (folder / "config.py").write_text(config)
    monkeypatch.chdir(folder)
    arguments = ["--config", "config.py", "--nodes", "2", "--gpus-per-node", "1", "--cpus-per-task", "1"]
    arguments += ["--device", "cpu", "--time", "2", "--signal", "50", "--output", "out", "MICRO_NUM=1"]
    assert tool.main(arguments) == 0
    assert "note" not in capsys.readouterr().out
    job = slurm.submit("out/launch.sbatch", folder=folder)
    log = folder / "out" / f"slurm-{job}" / "rank-0.log"
    await_line(log, "step=5 ", job, slurm)
    slurm.run("scontrol", "update", f"JobId={job}", "TimeLimit=1")  # Slurm looks at limits twice a minute
    slurm.await_state(job, "PENDING", 100)
    batch = folder / "out" / f"slurm-{job}.log"
    assert "code 3: stopped; requeued" in batch.read_text(), texts(folder)
    assert "SIGUSR1: the run stops within two steps" in log.read_text()
    reached = int(log.read_text().rpartition(" step=")[2].split()[0])
    steps.write_text(str(reached + 20))
    slurm.start_now(job)
    ended = slurm.await_end(job)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), f"{ended}\n{texts(folder)}\n{slurm.logs()}"
    assert f"done: {reached + 20} steps" in log.read_text()
    assert slurm.processes() == {}
