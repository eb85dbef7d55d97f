"""What `--print-config` and the run folder show."""

import json
import re
from pathlib import Path

import pytest

from internlm_lite.config.load import load_config
from internlm_lite.config.masking import masked
from internlm_lite.config.reference import reference
from internlm_lite.config.render_config import diff, print_config, resolved

ROOT = Path(__file__).parents[2]
CONFIGS = [ROOT / "configs" / name for name in ("20B_sft.py", "7B_sft.py", "tiny.py")]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
@pytest.mark.parametrize("how", ["full", "diff"])
def test_printed_config_loads_again(path: Path, how: str, tmp_path: Path) -> None:
    loaded = load_config(path, ["data.weights={'c++ code': 1.5, 'docs': 2}", "data.skip_batches=1-3"])
    (tmp_path / "printed.py").write_text(print_config(loaded, how))
    assert load_config(tmp_path / "printed.py").config == loaded.config


def test_resolved_is_json() -> None:
    values = resolved(load_config(CONFIGS[0]).config)
    assert json.loads(json.dumps(values)) == values
    assert values["model"]["mlp_ratio"] == 8 / 3 and values["parallel"]["pipeline"]["size"] == 1


def test_diff() -> None:
    assert diff(load_config(CONFIGS[2]).config) == {
        "JOB_NAME": "tiny",
        "data": {"seq_len": 128, "micro_num": 2, "micro_bsz": 2, "total_steps": 20},
        "hybrid_zero_optimizer": {"reduce_bucket_size": 65536},
        "adam": {"lr": 1e-3},
        "lr_scheduler": {"total_steps": 20, "warmup_ratio": 0.1, "eta_min": 1e-4},
        "model": {
            "num_attention_heads": 4,
            "vocab_size": 512,
            "hidden_size": 64,
            "num_layers": 2,
            "multiple_of": 32,
            "dtype": "torch.float32",
            "compile": False,
        },
    }


def test_origins_are_printed() -> None:
    lines = print_config(load_config(CONFIGS[2], ["adam.lr=0.1"]), "origin").splitlines()
    found = dict(line.split("  # ") for line in lines)
    found = {key.strip(): origin for key, origin in found.items()}
    assert found["data.seq_len = 128"].endswith("tiny.py:15")
    assert found["adam.lr = 0.1"] == "command line"
    assert found["seed = 1024"] == "default"


def test_secrets_are_masked() -> None:
    shown = masked(
        {
            "api_key": "abc",
            "monitor": {
                "token": "abc",
                "sample_tokens": 64,
                "hooks": ["https://open.feishu.cn/open-apis/bot/v2/hook/abc"],
            },
            "tokenizer": "folder/v1.model",
            "save": "boto3:s3://user:pass@bucket.host:9000/p",
            "url": "https://h/x?a=1&X-Amz-Signature=abc&access_token=abc",
        }
    )
    assert shown == {
        "api_key": "***",
        "monitor": {"token": "***", "sample_tokens": 64, "hooks": ["https://open.feishu.cn/open-apis/bot/v2/hook/***"]},
        "tokenizer": "folder/v1.model",
        "save": "boto3:s3://***@bucket.host:9000/p",
        "url": "https://h/x?a=1&X-Amz-Signature=***&access_token=***",
    }


def test_reference_is_up_to_date() -> None:
    written = (ROOT / "docs" / "config.md").read_text(encoding="utf-8")
    assert written == reference(), "run: python -m internlm_lite.config.reference > docs/config.md"


def test_reference_names_source_of_default(tmp_path: Path) -> None:
    (tmp_path / "config.py").write_text(
        "ckpt = dict(save_ckpt_folder='saves')\n"
        "data = dict(seq_len=8, total_steps=1)\n"
        "adam = dict(adam_beta2=0.9, adam_beta2_c=0)\n"
        "model = dict(num_attention_heads=1, hidden_size=8, num_layers=1, vocab_size=8)\n"
        "grad_scaler = dict()\n"
    )
    origins = load_config(tmp_path / "config.py").origins
    sources = {key: origin[9:-1] for key, origin in origins.items() if origin.startswith("default (")}
    assert len(sources) == 4
    defaults = dict(re.findall(r"^\| `(.*?)` \| .*? \| `(.*?)` \|", reference(), re.MULTILINE))
    for key, source in sources.items():
        assert source.rpartition(".")[2] in defaults[key], key
