"""What is a folder on S3, what is said about the others, and where the keys come from."""

from __future__ import annotations

import builtins
import sys
from typing import Any

import pytest

from internlm_lite.checkpoint.storage.open import open_storage
from internlm_lite.config.paths import S3Path, parse_s3
from internlm_lite.errors import ConfigError, MissingPackageError
from internlm_lite.runtime.dist_env import adopt_s3_keys

GOOD = [
    ("boto3:s3://weights.10.0.0.1:9000/internlm", S3Path("weights", "10.0.0.1:9000", "internlm")),
    ("boto3:s3://model_weights.s3.host.org/a/b//c/", S3Path("model_weights", "s3.host.org", "a/b/c")),
    ("boto3:s3://b.host/run/data/0000000007-00001.abcdef", S3Path("b", "host", "run/data/0000000007-00001.abcdef")),
    ("s3://my.bucket-1/run_1", S3Path("my.bucket-1", None, "run_1")),
    ("s3://b/year=2024/a b/c+d/实验/é", S3Path("b", None, "year=2024/a b/c+d/实验/é")),
]
BAD = [
    *(
        "boto3:x",
        "boto3:s3://bucket/prefix",
        "boto3:s3://bucket.host",
        "boto3:s3://bucket.host/",
        "s3://bucket",
        "s3:x",
    ),
    *("s3://bucket/../other", "s3://bucket/.hidden", "s3://bucket/ a", "s3://bucket/a?x=1", "boto3:s3://.host/a"),
    *("boto3:s3://me:hunter2@bucket.host/a", "s3://me:hunter2@bucket/a", "boto3:https://bucket.host/a", "s3://b/a\n"),
    *(
        "s3://bucket/a\x1b[31m",
        "s3://bucket/a\u200b",
        "s3://bucket/a\udcff",
        "s3://bucket/a#b",
        "s3://bucket/a\\b",
        "s3://b/.",
    ),
    *("boto3:s3://bucket.http://host/a", "boto3:s3://bucket.host:80:90/a", "s3://bucket/a \u2028"),
]


@pytest.mark.parametrize(("text", "path"), GOOD)
def test_good_paths(text: str, path: S3Path) -> None:
    assert parse_s3(text) == path
    assert parse_s3(str(path)) == path


@pytest.mark.parametrize("text", BAD)
def test_bad_paths_are_refused_without_telling_passwords(text: str) -> None:
    with pytest.raises(ConfigError, match=r"expected boto3:s3://BUCKET.ENDPOINT/PREFIX") as caught:
        open_storage(text)
    assert "hunter2" not in str(caught.value)


def test_without_boto3_the_install_command_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = [name for name in sys.modules if name.startswith("internlm_lite.checkpoint.storage.s3")]
    for name in ours:
        monkeypatch.delitem(sys.modules, name)
    real = builtins.__import__

    def absent(name: str, *args: Any, **more: Any) -> Any:
        if name.partition(".")[0] in ("boto3", "botocore"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name.partition(".")[0])
        return real(name, *args, **more)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(MissingPackageError, match=r"pip install internlm_lite\[s3\]"):
        open_storage("s3://bucket/prefix")


def test_internlm_names_of_the_keys_win_as_a_pair() -> None:
    environ = {
        "S3_ACCESS_KEY_ID": "a",
        "S3_SECRET_ACCESS_KEY_ID": "b",
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SESSION_TOKEN": "t",
    }
    adopt_s3_keys(environ)
    assert (environ["AWS_ACCESS_KEY_ID"], environ["AWS_SECRET_ACCESS_KEY"]) == ("a", "b")
    assert "AWS_SESSION_TOKEN" not in environ
    theirs = {"AWS_ACCESS_KEY_ID": "x", "AWS_SESSION_TOKEN": "t"}
    adopt_s3_keys(theirs)
    assert theirs == {"AWS_ACCESS_KEY_ID": "x", "AWS_SESSION_TOKEN": "t"}


@pytest.mark.parametrize("name", ["S3_ACCESS_KEY_ID", "S3_SECRET_ACCESS_KEY_ID"])
def test_half_a_pair_of_keys_is_an_error(name: str) -> None:
    with pytest.raises(ConfigError, match="set both, or neither") as caught:
        adopt_s3_keys({name: "hunter2"})
    assert "hunter2" not in str(caught.value)
