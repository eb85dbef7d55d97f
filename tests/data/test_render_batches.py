"""The readable view of batches."""

import io
import re

from rich.console import Console

from internlm_lite.data.data_loader import open_training_data
from internlm_lite.data.render_batches import overview, sample, walk_steps
from tests.data.corpora import data_config, write_native


def test_tables_and_sample(tmp_path):
    write_native(tmp_path / "code" / "a.bin", [[-11, -12, 13, 14, 15]] * 30)
    write_native(tmp_path / "docs" / "b.bin", [[21, 22, 23, 24]] * 30 + [[25]] * 17)
    data = open_training_data(data_config(tmp_path, min_length=2), 100, 0, 2, 0)
    steps = list(walk_steps(data, 2))
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(overview(data, steps))
    console.print(sample(steps[0].batches[0], data.folders, None, segments=2))
    text = console.export_text(clear=False)
    assert "code" in text and "docs" in text and "tokens 0 to" in text
    assert "documents ┃ left out" in text and re.search(r"docs +│ 30 +│ 17 +│", text)
    assert [step.figures.step for step in steps] == [0, 1]
    assert steps[0].figures.tokens == sum(batch.stats.num_labels for batch in steps[0].batches)
