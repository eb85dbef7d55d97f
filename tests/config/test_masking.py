"""Copies of config files hold no secret, however it is written, and are otherwise the same text."""

from __future__ import annotations

from pathlib import Path

import pytest

from internlm_lite.config.masking import mask_source

ROOT = Path(__file__).parents[2]
SECRET = "hunter2-and-more"


@pytest.mark.parametrize(
    "text",
    [
        f'os.environ["S3_ACCESS_KEY_ID"] = "{SECRET}"',
        f'os.environ.setdefault("WANDB_API_KEY", "{SECRET}")',
        f'os.putenv("S3_SECRET_ACCESS_KEY_ID", "{SECRET}")',
        f'os.environ.update(WANDB_API_KEY="{SECRET}")',
        f'API_KEY = ("{SECRET}")',
        f'API_KEY: str = "{SECRET}"',
        f'API_KEY = b"{SECRET}"',
        f'API_KEY = """\n{SECRET}\n"""',
        f'API_KEY = "hun" \\\n    "{SECRET}"',
        f'API_KEY = "x" + "{SECRET}"',
        f'A, TOKEN = 1, "{SECRET}"',
        f"aws = {{'secret_access_key': '{SECRET}', 'region': 'x'}}",
        f'self.password = f"{SECRET}{{n}}"',
        f'TOKEN = "{SECRET}"  # not {SECRET}',
        f'hook = "https://hooks.slack.com/services/T0/{SECRET}"',
        f'folder = "boto3:s3://me:{SECRET}@bucket.example.com/x"',
        f'if (token := "{SECRET}"): pass',
        f'größe = "ü"; TOKEN = "{SECRET}"',
        f"this is no Python {SECRET}",
    ],
)
def test_a_secret_is_gone(text: str) -> None:
    masked = mask_source(text)
    assert SECRET not in masked and "***" in masked
    if "no Python" not in text:
        compile(masked, "config", "exec")


def test_what_is_around_it_stays() -> None:
    assert mask_source("aws = {'secret_access_key': 'abcdef', 'region': 'x'}") == (
        "aws = {'secret_access_key': \"***\", 'region': 'x'}"
    )
    assert mask_source('a = 1  # é\nKEY = "abcdef"\nb = "abcdef and more"\n') == (
        'a = 1  # é\nKEY = "***"\nb = "*** and more"\n'
    )


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.py")), ids=lambda file: file.name)
def test_our_own_configs_hold_none(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert mask_source(text) == text
