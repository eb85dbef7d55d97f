"""What a step of the benchmark of context parallelism sends is what the planner says."""

from __future__ import annotations

import pytest

from internlm_lite.apps.bench.context_cost import SIDES, bench_context
from internlm_lite.apps.bench.shapes import bench_config
from internlm_lite.apps.planner.holdings import holdings
from internlm_lite.apps.planner.memory import row_shape
from internlm_lite.apps.planner.traffic import messages, traffic
from internlm_lite.layers.flash import AttentionBackend
from internlm_lite.mesh.mesh import sizes_of
from tests.apps.bench.test_layouts import SHAPE


def test_sent_bytes_are_the_planners() -> None:
    shape = {**SHAPE, "seq_len": 32, "micro_bsz": 1, "dtype": "torch.float32"}
    rows = bench_context(1, **shape)
    assert [row.layout for row in rows] == list(SIDES) and rows[0].ratio == 1
    for row, parallel in zip(rows, SIDES.values(), strict=True):
        micro_num = shape["micro_num"] // (1 if parallel else 2)
        config = bench_config(**{**shape, "micro_num": micro_num}, parallel=dict(parallel))
        sizes = sizes_of(2, 1, 1, config.parallel.zero1, config.parallel.context.size)
        (held,), _ = holdings(config, sizes, AttentionBackend.SDPA)
        planned = traffic(messages(row_shape(config, AttentionBackend.SDPA, "cpu"), sizes, held, micro_num), sizes)
        assert row.sent_bytes == pytest.approx(sum(planned.values()), abs=0), row.layout
