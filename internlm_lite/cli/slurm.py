"""Write a batch file for Slurm from a config: as many nodes as its layout needs, refused where the run would be.

    internlm-lite slurm --config configs/20B_sft.py --world-size 16 --partition P --time 1-00:00:00
    sbatch slurm/20b_train.sbatch

The job saves and stops before its time limit, goes back into the queue and goes on; so it does when a rank dies.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from internlm_lite.apps.planner.plan import make_plan
from internlm_lite.apps.planner.report import RunPlan
from internlm_lite.apps.planner.sbatch import SlurmJob, nodes_of, sbatch_text
from internlm_lite.cli.options import add_config, check_at_least, new_parser
from internlm_lite.cli.starter import working_folder
from internlm_lite.config.load import LoadedConfig, check_config, load_config
from internlm_lite.errors import ConfigError, StorageError
from internlm_lite.runtime.dist_env import adopt_s3_keys
from internlm_lite.runtime.tool import run_tool
from internlm_lite.units import human_bytes


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = new_parser("slurm", __doc__)
    add = parser.add_argument
    add_config(parser)
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument("--world-size", type=int, metavar="N", help="ranks")
    size.add_argument("--nodes", type=int, metavar="N", help="nodes, all of them full")
    add("--gpus-per-node", type=int, default=8, metavar="N", help="GPUs, and so ranks, of a node (8)")
    add("--cpus-per-task", type=int, default=8, metavar="N", help="CPU cores of a rank (8)")
    add("--partition", help="Slurm's partition (default: the cluster's)")
    add("--account", help="Slurm's account (default: yours)")
    add("--time", metavar="LIMIT", help="1-12:00:00, 90, ... (default: the partition's)")
    add("--signal", type=int, default=120, metavar="SECONDS", help="save and stop that long before the limit (120)")
    add("--output", type=Path, default=Path("slurm"), metavar="FOLDER", help="the file, and the job's logs (slurm)")
    add("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: no GPUs, --gpus-per-node processes a node")
    arguments = parser.parse_intermixed_args(argv)
    check_at_least(parser, arguments, world_size=1, nodes=1, gpus_per_node=1, cpus_per_task=1, signal=1)
    return arguments


def plan_of(loaded: LoadedConfig, world_size: int, device: str) -> RunPlan:
    """The plan of the run. Raises the same errors as the run: invalid config, layout or data."""
    check_config(loaded, world_size)
    return make_plan(loaded.config, world_size, None, device)


def job_of(arguments: argparse.Namespace, loaded: LoadedConfig, plan: RunPlan, nodes: int, per_node: int) -> SlurmJob:
    sizes = plan.sizes
    on_gpus = arguments.device == "cuda"
    peak = human_bytes(max(rank.bytes.peak for rank in plan.ranks))
    return SlurmJob(
        name=loaded.config.JOB_NAME,
        about=f"{loaded.config.JOB_NAME}: {nodes} x {per_node} {'GPUs' if on_gpus else 'processes'} = "
        f"{sizes.axes}; about {peak} on the fullest rank",
        nodes=nodes,
        per_node=per_node,
        on_gpus=on_gpus,
        cpus_per_task=arguments.cpus_per_task,
        partition=arguments.partition,
        account=arguments.account,
        time=arguments.time,
        lead_seconds=arguments.signal,
        logs=arguments.output.absolute(),
        folder=Path.cwd(),
        repository=working_folder(),
        arguments=(str(arguments.config), *arguments.overrides, *([] if on_gpus else ["--device", "cpu"])),
    )


def write(job: SlurmJob) -> Path:
    """Write the batch file; returns its path. Raises ConfigError, StorageError."""
    if not (job.repository / "launch" / "slurm.sh").is_file():
        raise ConfigError(f"found no launch/slurm.sh in {job.repository}: say internlm-lite init . there first")
    text = sbatch_text(job)
    file = job.logs / f"{job.name}.sbatch"
    temporary = file.with_name(f".{file.name}-{os.getpid()}")
    try:
        job.logs.mkdir(parents=True, exist_ok=True)  # Slurm opens its log there before it starts the job
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(file)
    except OSError as error:
        raise StorageError(f"cannot write {file}: {error.strerror}; choose another --output") from error
    return file


def work(arguments: argparse.Namespace) -> int:
    """Exit code."""
    adopt_s3_keys(os.environ)
    world_size = arguments.world_size or arguments.nodes * arguments.gpus_per_node
    nodes, per_node = nodes_of(world_size, arguments.gpus_per_node)
    loaded = load_config(arguments.config, arguments.overrides)
    plan = plan_of(loaded, world_size, arguments.device)
    job = job_of(arguments, loaded, plan, nodes, per_node)
    file = write(job)
    print(job.about)
    if plan.sizes.tp > per_node:
        print(f"note: tensor parallel groups of {plan.sizes.tp} cross nodes of {per_node}: expect slow steps")
    if not loaded.config.ckpt.enable_save_ckpt:
        print("note: ckpt.enable_save_ckpt=False: put back into the queue, the job starts from the beginning")
    print(f"sbatch {file}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 written, 2 refused, 6 storage, 130 interrupted."""
    arguments = parse_arguments(argv)
    return run_tool(partial(work, arguments))
