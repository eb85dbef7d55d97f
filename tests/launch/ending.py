"""Two ranks that end with code 3, the main one a second later: what `srun --kill-on-bad-exit` makes of it."""

from __future__ import annotations

import os
import time
from datetime import timedelta

import torch

from internlm_lite.faults.signals import StopSignals
from internlm_lite.runtime.place import find_place
from internlm_lite.runtime.start import end_process, start_world, stop_world

if __name__ == "__main__":
    place = find_place(os.environ)
    start_world(place, torch.device("cpu"), timedelta(seconds=60))
    with StopSignals():
        time.sleep(1.0 if place.is_main else 0.0)
        print(f"rank {place.rank} ends", flush=True)
        stop_world()
    end_process(3, place.world_size)
