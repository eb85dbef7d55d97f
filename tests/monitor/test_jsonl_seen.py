"""Tokens of each folder that were seen, with those that carry no label, from the device to metrics.jsonl."""

from __future__ import annotations

import dataclasses

import torch

from internlm_lite.batch import IGNORE
from internlm_lite.mesh.mesh import single_process_mesh
from internlm_lite.monitor.jsonl import step_object
from internlm_lite.monitor.metrics import FolderMetrics
from tests.monitor.test_line import SEED


def test_seen_includes_tokens_without_label() -> None:
    metrics = FolderMetrics(("code", "docs", "empty"), single_process_mesh(torch.device("cpu")))
    labels = torch.tensor([5, IGNORE, IGNORE, 7, IGNORE, IGNORE])
    learnt = labels != IGNORE
    for _ in range(2):
        metrics.add(torch.tensor([0, 0, 0, 0, 1, 1]), labels, 2.0 * learnt, learnt, torch.tensor(4.0))
    again = FolderMetrics(("code", "docs", "empty"), single_process_mesh(torch.device("cpu")))
    again.load_state_dict(metrics.state_dict(metrics.total()))
    for one in (metrics, again):
        collected = one.collect()
        assert (collected.num_labels, collected.loss, collected.accuracy) == (4, 2.0, 1.0)
        value = step_object(dataclasses.replace(SEED[0], folders=collected.folders), 0)
        assert value["seen"] == {"code": 8, "docs": 4}
        assert value["folders"]["code"] == [4, 2.0, 1.0] and set(value["folders"]) == {"code", "docs"}


def test_log_has_no_seen() -> None:
    assert "seen" not in step_object(SEED[0], 0)
