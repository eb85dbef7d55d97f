"""One rank for test_start.py: meet the others, sum the ranks, end. `python rank.py SECONDS [die]`, or forked."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from datetime import timedelta
from typing import NoReturn

import torch
import torch.distributed as dist

from internlm_lite.errors import InternLMError
from internlm_lite.runtime.dist_env import read_dist_env
from internlm_lite.runtime.log import setup_logging
from internlm_lite.runtime.start import announce_layout, end_process, start_world, stop_world


def main(environ: Mapping[str, str], seconds: float, die: bool = False) -> NoReturn:
    dist_env = read_dist_env(environ)
    setup_logging(dist_env, None, "full")
    torch.set_num_threads(1)
    try:
        start_world(dist_env, torch.device("cpu"), timedelta(seconds=seconds))
    except InternLMError as error:
        print("MeshError:", error)
        end_process(error.exit_code, dist_env.world_size)
    if dist.is_initialized():
        total = torch.tensor([float(dist_env.rank + 1)])
        dist.all_reduce(total)
        print(f"sum {total.item()} {dist.get_backend()} {dist_env.launcher} attempt {dist_env.attempt}")
    announce_layout(dist_env.world_size, 1, 1)
    if die and dist_env.attempt == 0 and dist_env.rank == dist_env.world_size - 1:
        end_process(7, dist_env.world_size)
    stop_world()
    end_process(0, dist_env.world_size)


def forked(output: str, environ: Mapping[str, str], seconds: float) -> NoReturn:
    """`main` in a process of the fork server, printing into the file `output`."""
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    main(environ, seconds)


if __name__ == "__main__":
    main(os.environ, float(sys.argv[1]), "die" in sys.argv)
