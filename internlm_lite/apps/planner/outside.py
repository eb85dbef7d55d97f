"""Memory of a GPU that no tensor of a plan has, so that what fits by tensors alone ends inside NCCL.

Figures of others, not of our own: NVIDIA/nccl#964 (0.5 to 0.7 GB for each group, A100), NVIDIA/nccl#1685 (3.3 GB with
the first all-to-all of 8 H100), pytorch/pytorch#58626 (0.5 GB for the context). cuBLAS' workspace is what
`runtime/dist_env.py:set_defaults` asks for, 8 blocks of 4096 KiB, for each handle and stream (pytorch/pytorch#95668):
products run on one stream alone.
"""

from __future__ import annotations

from internlm_lite.config.schema import Config
from internlm_lite.mesh.mesh import Sizes, axis_groups

CONTEXT = 500_000_000
"""Bytes of CUDA's context with the kernels of torch and NCCL."""
COMMUNICATOR = 600_000_000
"""Bytes of NCCL's buffers for a group, of whatever size above one."""
PEER = 3_300_000_000 // 7
"""Bytes of NCCL's buffers for each rank of a group to which this one sends by itself: all-to-all, or send."""
WORKSPACE = 8 * 4096 * 1024
"""Bytes of cuBLAS."""


def communicators(sizes: Sizes) -> int:
    """Groups of more than one rank that a rank is in, which NCCL keeps apart, also those of the same ranks."""
    return sum(max(map(len, groups)) > 1 for groups in axis_groups(sizes).values())


def _peers(config: Config, sizes: Sizes) -> int:
    """Ranks that a rank sends to by itself: every exchange of context parallelism does, in its backward pass at least;
    neighbours of the pipeline; Muon, which puts matrices of tensor-parallel ranks together."""
    muon = config.optimizer.name == "muon"
    return sizes.cp - 1 + min(2, sizes.pp - 1) + (sizes.tp - 1) * muon


def outside_bytes(config: Config, sizes: Sizes) -> int:
    """Of one rank with a GPU."""
    return CONTEXT + COMMUNICATOR * communicators(sizes) + PEER * _peers(config, sizes) + WORKSPACE
