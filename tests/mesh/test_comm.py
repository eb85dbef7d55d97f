"""Which errors of a collective mean a lost peer."""

from __future__ import annotations

import pytest
import torch

from internlm_lite.errors import PeerLostError
from internlm_lite.mesh.comm import peer_errors
from internlm_lite.mesh.mesh import single_process_mesh


@pytest.mark.parametrize(
    ("raised", "told"),
    [
        (torch.OutOfMemoryError, torch.OutOfMemoryError),
        (torch.AcceleratorError, torch.AcceleratorError),
        (torch.distributed.DistBackendError, PeerLostError),
        (RuntimeError, PeerLostError),
    ],
)
def test_this_ranks_own_faults_are_not_blamed_on_a_peer(raised, told):
    with pytest.raises(told), peer_errors(single_process_mesh().dp):
        raise raised("CUDA error: an illegal memory access was encountered")
