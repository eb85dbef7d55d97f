"""A conversion needs no more memory than a shard and a tensor: measured in a fresh process, both ways."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.apps.convert.made import config_of, save_ours
from tests.cli import ROOT

SHARD = 48 * 10**6
SLACK = 16 * 2**20
BIG = {
    "vocab_size": 4096,
    "hidden_size": 1024,
    "num_layers": 3,
    "mlp_ratio": 8 / 3,
    "multiple_of": 256,
    "num_attention_heads": 16,
    "num_kv_attention_heads": 8,
}
MEASURE = """
import json, sys
from pathlib import Path
from tests.apps.convert.made import save_ours
from internlm_lite.apps.convert.from_hf import read_hf
from internlm_lite.apps.convert.to_hf import open_checkpoint, write_hf

def there(ours, out):
    found, config, _ = open_checkpoint(ours)
    return write_hf(found, config, Path(out), family="llama", dtype="float32", tokenizer=None, shard_bytes=int(shard))

def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))

def growth(work):
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    made = work()
    return {"growth": status("VmHWM") - before, "bytes": made.n_bytes, "tensors": made.n_tensors}

folder, shard = sys.argv[1:]
there(folder + "/small", folder + "/small-hf")  # what is imported and compiled on the first use
read_hf(Path(folder + "/small-hf"), folder + "/small-back")
results = [growth(lambda: there(folder + "/big", folder + "/hf"))]
results.append(growth(lambda: read_hf(Path(folder + "/hf"), folder + "/back")))
print(json.dumps(results))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measures with Linux's /proc")
def test_memory_is_bounded_by_a_shard_and_a_tensor(tmp_path_factory):
    folder = tmp_path_factory.mktemp("big")  # on disk, unlike the other tests' folders
    save_ours(folder / "small")
    config = config_of(**BIG)
    save_ours(folder / "big", **BIG)
    command = [sys.executable, "-c", MEASURE, str(folder), str(SHARD)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    largest = config.model.vocab_size * config.model.hidden_size * 4
    for result in json.loads(done.stdout):
        assert result["bytes"] > 2.5 * (SHARD + largest), "the model is large enough to tell"
        assert result["growth"] <= SHARD + largest + SLACK, result
