"""53 made-up secrets, each written in its own way: none of them is in any file of a run. What is no secret stays."""

import os
import random
import string
import subprocess
import sys
from pathlib import Path

import pytest

from internlm_lite.config.masking import mask_source, masked

ROOT = Path(__file__).parents[2]
DRAW = random.Random(53)


def made_up(length: int, letters: str = string.ascii_letters + string.digits) -> str:
    return "".join(DRAW.choice(letters) for _ in range(length))


UPPER, LOWER, HEX = string.ascii_uppercase + string.digits, string.ascii_lowercase + string.digits, "0123456789abcdef"
BASE64 = string.ascii_letters + string.digits + "+/"

# Text with {} where the secret stands, and the secret. Names tell the first ones, shapes the others.
WRITTEN = [
    ("AK = '{}'", made_up(9)),
    ("SK = '{}'", made_up(9)),
    ("APIKEY = '{}'", made_up(9)),
    ("OPENAI_APIKEY = '{}'", made_up(9)),
    ("PASS = '{}'", made_up(9)),
    ("PASSWD = '{}'", made_up(9)),
    ("_x = _pwd = '{}'", made_up(9)),
    ("_secretKey = '{}'", made_up(9)),
    ("_credentials = dict(user='u', id='{}')", made_up(9)),
    ("_authTokens = ['{}', 'x']", made_up(9)),
    ("_conf = {{'db': {{'Passwords': ('a', '{}')}}}}", made_up(9)),
    ("_conf = dict(aws=dict(sk='{}'))", made_up(9)),
    ("_s3 = ('bucket', dict(accessKey='{}'))", made_up(9)),
    ("WANDB_API_KEY: str = '{}'", made_up(40, HEX)),
    ("S = dict(private_key=f'{}' + JOB_NAME)", made_up(9)),
    ("import os; os.environ['DB_PASSWORD'] = '{}'", made_up(9)),
    ("import os; os.environ.setdefault('SLACK_TOKEN', '{}')", made_up(9)),
    ("import os; os.putenv('HF_TOKEN', '{}')", made_up(9)),
    ("_is_admin = JOB_NAME == 'x' or 'y' == (_password := '{}')", made_up(9)),
    ("def _login(user='me', token='{}'): pass", made_up(9)),
    ("def _get_secret(): return '{}'", made_up(9)),
    ("# the password: {}", made_up(9)),
    ("X = 1  # api_key={}", made_up(9)),
    ("# export WANDB_API_KEY={}", made_up(40, HEX)),
    ("ENV = 'HOME=/root\\nMY_TOKEN={}\\nLANG=C'", made_up(9)),
    ('ENV = \'{{"clientSecret": "{}"}}\'', made_up(9)),
    ("ENV = 'set -x; AWS_SECRET_ACCESS_KEY={} python train.py'", made_up(40, BASE64)),
    ("A = 'AKIA{}'", made_up(16, UPPER)),
    ("A = 'LTAI{}'", made_up(20)),
    ("A = '{}'", made_up(40, string.ascii_letters + string.digits)),
    ("A = b'{}'", made_up(32)),
    ("A = ['x', ('y', '{}')]", made_up(24, string.ascii_letters + string.digits)),
    ("A = f'{}{{JOB_NAME}}'", made_up(44)),
    ("# {}", made_up(44)),
    ("A = '{}'", "k3j9x0q2m7w1z8p4v6t5r2n9b1c7d3f8"),
    ("A = 'ghp_{}'", made_up(36)),
    ("A = 'glpat-{}'", made_up(20)),
    ("A = 'xoxb-{}'", made_up(12, string.digits)),
    ("A = 'sk-{}'", made_up(32)),
    ("A = 'hf_{}'", made_up(34, string.ascii_letters)),
    ("A = 'AIza{}'", made_up(35)),
    ("A = 'npm_{}'", made_up(36, LOWER)),
    ("A = '12345678:{}'", made_up(35)),
    ("A = 'eyJhbGciOiJIUzI1NiJ9.{}.abc'", made_up(20)),
    ("A = '''-----BEGIN RSA PRIVATE KEY-----\\n{}\\n-----END RSA PRIVATE KEY-----'''", made_up(64, BASE64)),
    ("A = 'https://me:{}@host.example/x'", made_up(8, LOWER)),
    ("A = 'postgres://me:{}@db:5432/x'", made_up(8, LOWER)),
    ("A = 'https://h.example/x?a=1&X-Amz-Signature={}'", made_up(64, HEX)),
    ("A = 'https://h.example/x?sig={}&b=2'", made_up(10)),
    ("A = 'https://oapi.example/send?access_token={}'", made_up(10)),
    ("A = 'https://hooks.slack.com/services/T0/{}'", made_up(8)),
    ("H = dict(a='Basic {}')", made_up(12)),
    ("H = ['curl', '-H', 'Authorization: Bearer {}', '-H', 'X-Api-Key: hush']", made_up(12)),
]
NO_SECRETS = [
    "0123456789012345678901234567890",
    "1e-05",
    "/mnt/petrelfs/share_data/InternLM2/20240622/train_v13/part-00017-of-00128",
    "local:/ailab/ckpts/official_InternLM2.5_20B_Enhance_18.0.0_256k/50000",
    "3a665e88d3ef58dda85fb20ebe4e0d7e402ce4d3",
    "550e8400-e29b-41d4-a716-446655440000",
    "7B_tp2_pp4_zero1_bf16_lr1e-4_seq4096_2024-05-20T10-20-30",
    "P_longbench_enhancement_2.0.0_20240622",
    "boto3:s3://model_weights.10.135.7.249/internlm/snapshot/1",
    "torch.bfloat16",
    "https://example.com/open/page.html?step=100&seed=3",
    "unknown key; nearest known key: data.seq_len",
    "add num_attention_heads=... to model = dict(...)",
    "embed_split_hidden",
    "HuggingFaceTokenizerFastTrainingConfiguration",
    "The quick brown fox: 12 tokens of 4096",
]


def test_there_are_enough_of_them() -> None:
    assert len(WRITTEN) == 53 == len({secret for _, secret in WRITTEN})


@pytest.mark.parametrize(("text", "secret"), WRITTEN, ids=[text for text, _ in WRITTEN])
def test_secret_is_masked_in_a_source(text: str, secret: str) -> None:
    source = mask_source(text.format(secret) + "\nlr = 1e-4\n")
    assert secret not in source and source.endswith("\nlr = 1e-4\n")
    compile(source, "config", "exec")


@pytest.mark.parametrize("text", NO_SECRETS)
def test_what_is_no_secret_stays(text: str) -> None:
    assert masked(text) == text and mask_source(f"A = {text!r}  # {text}\n") == f"A = {text!r}  # {text}\n"


def test_no_file_of_a_run_holds_a_secret(tmp_path: Path) -> None:
    lines = [text.format(secret) for text, secret in WRITTEN]
    in_values = [text.format(secret)[5:-1] for text, secret in WRITTEN if text.startswith("A = 'http")]
    tiny = (ROOT / "configs" / "tiny.py").read_text(encoding="utf-8")
    (tmp_path / "c.py").write_text("\n".join([tiny, *lines, f"monitor = dict(wandb=dict(tags={in_values!r}))"]))
    secrets = [secret for _, secret in WRITTEN]
    command = [sys.executable, str(ROOT / "train.py"), "--device", "cpu", "--config", "c.py", "TOTAL_STEPS=2"]
    command += ["monitor.wandb=None", f"ckpt.save_ckpt_folder=local:{tmp_path}/ckpts", "ckpt.enable_save_ckpt=True"]
    environment = {**os.environ, "NCCL_AUTH_TOKEN": secrets[0], "TORCH_X": f"https://me:{secrets[45]}@host/"}
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240, env=environment)
    assert run.returncode == 0, run.stderr
    (tmp_path / "c.py").unlink()
    files = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    assert len(files) > 10
    found = {secret: str(file) for secret in secrets for file, content in files.items() if secret.encode() in content}
    assert not found and not [secret for secret in secrets if secret in run.stdout + run.stderr]
