"""Two ranks that end with code 3, the main one a second later: what `srun --kill-on-bad-exit` makes of it."""

from __future__ import annotations

import os
import time
from datetime import timedelta

import torch

from internlm_lite.faults.signals import StopSignals
from internlm_lite.runtime.dist_env import read_dist_env
from internlm_lite.runtime.start import end_process, start_world, stop_world

if __name__ == "__main__":
    dist_env = read_dist_env(os.environ)
    start_world(dist_env, torch.device("cpu"), timedelta(seconds=60))
    with StopSignals():
        time.sleep(1.0 if dist_env.is_main else 0.0)
        print(f"rank {dist_env.rank} ends", flush=True)
        stop_world()
    end_process(3, dist_env.world_size)
