"""S3 that misbehaves: what passes is ridden out, what lasts is told in one line, nothing partial is left."""

from __future__ import annotations

import logging
import random
import re
import threading
import time
from pathlib import Path

import pytest
from botocore.exceptions import ClientError

from internlm_lite.checkpoint.storage import s3
from internlm_lite.checkpoint.storage import s3_client as s3client
from internlm_lite.checkpoint.storage.s3 import S3Storage
from internlm_lite.checkpoint.storage.s3_retry import diagnose
from internlm_lite.config.schema import S3Config
from internlm_lite.errors import InternLMError, StorageError
from tests.checkpoint.test_s3 import PART, open_s3
from tests.s3faults import Fault, FaultProxy, Kind
from tests.s3server import ACCESS_KEY, BUCKET, SECRET_KEY, S3Server

DATA = random.Random(0).randbytes(2 * PART + 1000)
QUICK = S3Config(insecure=True, deadline_seconds=30)
IMPATIENT = S3Config(insecure=True, deadline_seconds=4)


@pytest.fixture(autouse=True)
def short_silences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3client, "READ_SECONDS", 2.0)


def _behind(proxy: FaultProxy, folder: str, settings: S3Config = QUICK) -> S3Storage:
    return open_s3(f"boto3:s3://{BUCKET}.{proxy.endpoint}/{folder.rpartition('/')[2]}", settings)


def _unfinished(server: S3Server, storage: S3Storage) -> int:
    prefix = storage.name.rpartition("/")[2]
    return len(server.client().list_multipart_uploads(Bucket=BUCKET, Prefix=prefix).get("Uploads", []))


REQUESTS = {
    "begin": "POST .*uploads",
    "part": "PUT .*partNumber=2",
    "complete": "POST .*uploadId",
    "get": "GET /.*/data/big",
    "head": "HEAD ",
    "list": "GET .*list-type",
    "put": "PUT .*/data/small",
    "delete": "DELETE .*/data/small",
    "batch": r"POST .*\?delete",
}


@pytest.mark.parametrize("kind", ["500", "503", "reset", "hang", "lost", "truncate", "cut-upload"])
def test_passing_faults_of_every_request_are_ridden_out(
    s3_server: S3Server, s3_folder: str, s3_proxy: FaultProxy, kind: Kind
) -> None:
    storage = _behind(s3_proxy, s3_folder)
    times = 1 if kind == "hang" else 2
    faults = [Fault(kind, match, times) for match in REQUESTS.values()]
    s3_proxy.faults += faults
    assert storage.put("data/big", [DATA]) == len(DATA)
    assert storage.put("data/small", [b"12345"]) == 5
    assert storage.size("data/big") == len(DATA)
    assert [entry.key for entry in storage.list("data")] == ["data/big", "data/small"]
    buffer = bytearray(len(DATA))
    storage.read_into("data/big", 0, memoryview(buffer))
    assert buffer == DATA and storage.read("data/big", len(DATA)) == DATA
    storage.delete("data/small")
    assert storage.size("data/small") is None
    storage.delete_folder("data")
    assert storage.list("") == [] and _unfinished(s3_server, storage) == 0
    assert [fault.match for fault in faults if not fault.hits] == []


@pytest.mark.parametrize("kind", ["lost", "hang"])
def test_a_lost_answer_to_complete_is_looked_up(
    s3_server: S3Server, s3_folder: str, s3_proxy: FaultProxy, kind: Kind
) -> None:
    """Lost after the work was done: asking again would meet an unknown upload."""
    storage = _behind(s3_proxy, s3_folder)
    s3_proxy.faults.append(Fault(kind, REQUESTS["complete"]))
    assert storage.put("data/big", [DATA]) == len(DATA)
    asked = [line for line in s3_proxy.seen if "uploadId" in line and line.startswith("POST")]
    assert len(asked) == (1 if kind == "lost" else 2)
    assert storage.read("data/big", len(DATA)) == DATA


def test_another_object_of_that_size_is_not_taken_for_ours(
    s3_server: S3Server, s3_folder: str, s3_proxy: FaultProxy
) -> None:
    storage = _behind(s3_proxy, s3_folder, S3Config(insecure=True, deadline_seconds=8))
    storage.put("data/big", [DATA[::-1]])
    s3_proxy.faults.append(Fault("503", REQUESTS["complete"], times=1000))
    with pytest.raises(StorageError, match=r"cannot complete .*SlowDown"):
        storage.put("data/big", [DATA])
    assert storage.read("data/big", len(DATA)) == DATA[::-1] and _unfinished(s3_server, storage) == 0


def test_a_lost_answer_to_a_commit_is_not_taken_for_anothers(s3_folder: str, s3_proxy: FaultProxy) -> None:
    storage = _behind(s3_proxy, s3_folder)
    assert storage.put_if_absent("commits/0", b"zero")
    s3_proxy.faults.append(Fault("lost", "PUT .*/commits/1"))
    assert storage.put_if_absent("commits/1", b"mine")
    s3_proxy.faults.append(Fault("lost", "PUT .*/commits/1"))
    assert not storage.put_if_absent("commits/1", b"late")
    assert storage.read("commits/1", 9) == b"mine"


def test_a_lost_answer_to_a_replacement_is_not_taken_for_anothers(s3_folder: str, s3_proxy: FaultProxy) -> None:
    storage = _behind(s3_proxy, s3_folder)
    storage.put("x", [b"one"])
    s3_proxy.faults.append(Fault("lost", "PUT .*/x"))
    assert storage.replace("x", b"one", b"two") and storage.read("x", 9) == b"two"
    assert not storage.replace("x", b"one", b"two")


def test_a_server_without_conditions_is_looked_up_first(s3_folder: str, s3_proxy: FaultProxy) -> None:
    storage = _behind(s3_proxy, s3_folder)
    s3_proxy.faults.append(Fault("501", "(?i)if-none-match", times=1000))
    assert storage.put_if_absent("x", b"1") and not storage.put_if_absent("x", b"2")
    assert storage.put_if_absent("y", b"1") and storage.read("x", 9) == b"1"
    assert s3_proxy.faults[0].hits == 1, "asked once"


@pytest.mark.parametrize("kind", ["503", "reset", "hang", "cut-upload"])
def test_lasting_faults_end_at_the_deadline_and_leave_no_parts(
    s3_server: S3Server, s3_folder: str, s3_proxy: FaultProxy, kind: Kind, caplog: pytest.LogCaptureFixture
) -> None:
    storage = _behind(s3_proxy, s3_folder, IMPATIENT)
    s3_proxy.faults.append(Fault(kind, REQUESTS["part"], times=1000))
    begin = time.monotonic()
    with pytest.raises(
        StorageError, match=r"cannot write part 2 of .*data/big: .*; tried \d+ times in \d+ s"
    ) as caught:
        storage.put("data/big", [DATA])
    assert time.monotonic() - begin < 30
    assert caught.value.__cause__ is None and caught.value.__context__ is None, "boto3's exceptions stay inside"
    assert "trying again for up to" in caplog.text
    assert storage.size("data/big") is None and _unfinished(s3_server, storage) == 0


def test_an_abort_that_fails_is_told_and_swept_later(
    s3_server: S3Server, s3_folder: str, s3_proxy: FaultProxy, caplog: pytest.LogCaptureFixture
) -> None:
    storage = _behind(s3_proxy, s3_folder, IMPATIENT)
    s3_proxy.faults += [Fault("403", REQUESTS["part"]), Fault("503", "DELETE .*uploadId")]
    with pytest.raises(StorageError, match="AccessDenied"):
        storage.put("data/big", [DATA])
    assert "cannot abort" in caplog.text and "a later save removes its parts" in caplog.text
    assert _unfinished(s3_server, storage) == 1
    storage.sweep(-60)
    assert _unfinished(s3_server, storage) == 0


def test_refusals_are_not_repeated(s3_folder: str, s3_proxy: FaultProxy) -> None:
    storage = _behind(s3_proxy, s3_folder)
    s3_proxy.faults.append(Fault("403", "PUT ", times=1000))
    with pytest.raises(StorageError, match=r"AccessDenied, status 403: .*these credentials may not do that"):
        storage.put("x", [b"1"])
    assert len(s3_proxy.seen) == 1


def test_slow_answers_end_at_the_deadline(s3_folder: str, s3_proxy: FaultProxy) -> None:
    """Each byte arrives in time, the object never would."""
    storage = _behind(s3_proxy, s3_folder, IMPATIENT)
    _behind(s3_proxy, s3_folder).put("data/big", [bytes(100_000)])
    s3_proxy.faults.append(Fault("slow", REQUESTS["get"], times=1000, slow_bytes=10))
    begin = time.monotonic()
    with pytest.raises(StorageError, match="too slow"):
        storage.read_into("data/big", 0, memoryview(bytearray(100_000)))
    assert time.monotonic() - begin < 20


def test_a_slow_upload_goes_on_until_the_deadline(
    s3_folder: str, s3_proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3client, "CONNECT_SECONDS", 0.5)  # must not bound the sending
    monkeypatch.setattr(s3client, "READ_SECONDS", 20.0)
    s3_proxy.faults.append(Fault("slow-upload", "PUT ", times=1000))
    patient, impatient = (
        _behind(s3_proxy, s3_folder, S3Config(insecure=True, deadline_seconds=seconds)) for seconds in (30, 0.5)
    )
    patient._part_bytes = impatient._part_bytes = 4 * PART
    assert patient.put("x", [bytes(4 * PART)]) == 4 * PART and len(s3_proxy.seen) == 1
    with pytest.raises(StorageError, match="takes the bytes too slowly"):
        impatient.put("y", [bytes(4 * PART)])


def test_a_broken_read_goes_on_where_it_was(s3_folder: str, s3_proxy: FaultProxy) -> None:
    storage = _behind(s3_proxy, s3_folder)
    storage.put("data/big", [DATA])
    s3_proxy.faults.append(Fault("truncate", REQUESTS["get"]))
    ranges: list[str] = []
    storage._client.meta.events.register(
        "before-call.s3.GetObject", lambda params, **_: ranges.append(params["headers"]["Range"])
    )
    buffer = bytearray(len(DATA))
    storage.read_into("data/big", 0, memoryview(buffer))
    assert buffer == DATA
    assert ranges[0] == f"bytes=0-{len(DATA) - 1}" and int(ranges[1].split("=")[1].split("-")[0]) > len(DATA) // 4


def test_a_server_that_goes_away_and_comes_back(
    tmp_path: Path, s3_server: S3Server, s3_folder: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Killed in the middle of an upload, away for seconds, started again: the upload goes through."""
    server = S3Server(tmp_path)
    server.start()
    try:
        server.make_bucket()
        storage = open_s3(f"boto3:s3://{BUCKET}.{server.endpoint}/run", S3Config(insecure=True, deadline_seconds=100))
        storage.put("data/old", [DATA])

        def chunks() -> object:
            yield DATA[: PART + 1]
            server.kill()
            restart.start()
            yield DATA[PART + 1 :]

        restart = threading.Timer(4.0, server.start)
        with caplog.at_level(logging.WARNING):
            assert storage.put("data/new", chunks()) == len(DATA)  # type: ignore[arg-type]
        assert "trying again" in caplog.text
        assert storage.read("data/new", len(DATA)) == DATA == storage.read("data/old", len(DATA))
    finally:
        restart.join()
        server.kill()


def test_a_wrong_secret_is_told_without_it(s3_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
    with pytest.raises(StorageError, match=r"SignatureDoesNotMatch.*check S3_ACCESS_KEY_ID") as caught:
        open_s3(s3_folder).put("x", [b"1"])
    assert "hunter2" not in str(caught.value) and ACCESS_KEY not in str(caught.value)


def test_no_credentials_and_https_to_a_plain_server_say_what_to_change(
    s3_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(StorageError, match=r"ckpt.s3.insecure=True"):
        open_s3(s3_folder, S3Config()).put("x", [b"1"])
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(StorageError, match="found no usable credentials: check S3_ACCESS_KEY_ID"):
        open_s3(s3_folder).put("x", [b"1"])


@pytest.mark.parametrize(
    ("code", "status", "passing"),
    [
        *(("SlowDown", 503, True), ("InternalError", 500, True), ("InternalError", 200, True), ("", 429, True)),
        *(("RequestTimeout", 400, True), ("BadDigest", 400, True), ("NotImplemented", 501, False), ("408", 408, True)),
        *(("AccessDenied", 403, False), ("NoSuchBucket", 404, False), ("InvalidRequest", 400, False)),
    ],
)
def test_which_refusals_may_pass(code: str, status: int, passing: bool) -> None:
    said = {"Error": {"Code": code, "Message": "m"}, "ResponseMetadata": {"HTTPStatusCode": status}}
    trouble = diagnose(ClientError(said, "PutObject"))
    assert trouble.passing is passing and not trouble.absent


def test_secrets_that_a_server_repeats_are_masked(s3_folder: str) -> None:
    storage = open_s3(s3_folder)

    def request() -> None:
        raise ClientError({"Error": {"Code": "X", "Message": f"no {ACCESS_KEY} with {SECRET_KEY}"}}, "PutObject")

    with pytest.raises(StorageError, match=r"no \*\*\* with \*\*\*"):
        storage._calls.run("write", "x", request)


@pytest.mark.parametrize("kind", ["301", "302", "307", "308"])
@pytest.mark.parametrize("target", ["elsewhere", "itself", "nowhere", "http://me:hunter2@there.example/x"])
def test_redirects_are_told_and_not_followed(s3_folder: str, s3_proxy: FaultProxy, kind: Kind, target: str) -> None:
    storage = _behind(s3_proxy, s3_folder)
    places = {
        "elsewhere": "http://sso.example/login?token=hunter2",
        "itself": f"http://{s3_proxy.endpoint}/",
        "nowhere": "",
    }
    s3_proxy.faults.append(Fault(kind, ".", times=10_000, location=places.get(target, target)))
    where = {"elsewhere": "sso.example", "itself": s3_proxy.endpoint}.get(
        target, "there.example" if "@" in target else ""
    )
    said = rf"{kind}.* \(it redirects to {re.escape(where or 'another place')}: correct the endpoint"
    for attempt in (lambda: storage.put("x", [b"1"]), lambda: storage.size("x"), lambda: storage.list("")):
        with pytest.raises(StorageError, match=said) as caught:
            attempt()
        assert "hunter2" not in str(caught.value)
    assert len(s3_proxy.seen) <= 6


def test_dates_that_are_none_remove_nothing(s3_server: S3Server, s3_folder: str, s3_proxy: FaultProxy) -> None:
    storage = _behind(s3_proxy, s3_folder)
    s3_proxy.faults.append(Fault("no-date", ".", times=10_000))
    storage.put("data/big", [DATA])
    assert storage.read("data/big", len(DATA)) == DATA and storage.size("data/big") == len(DATA)
    (entry,) = storage.list("")
    assert time.time() - 60 < entry.modified < time.time() + 60
    s3_server.client().create_multipart_upload(Bucket=BUCKET, Key=f"{storage.name.rpartition('/')[2]}/data/x")
    storage.sweep(60)
    assert _unfinished(s3_server, storage) == 1
    storage.delete_folder("data")


@pytest.mark.parametrize("kind", ["endless", "circle"])
def test_listings_without_an_end_are_told(s3_folder: str, s3_proxy: FaultProxy, kind: Kind) -> None:
    storage = _behind(s3_proxy, s3_folder)
    storage.put("x", [b"1"])
    s3_proxy.faults.append(Fault(kind, "GET .*list-type", times=10**9))
    for attempt in (lambda: storage.list(""), lambda: storage.delete_folder("x")):
        with pytest.raises(StorageError, match="its listing does not end"):
            attempt()


def test_listings_of_ever_new_names_are_told(s3_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "_MOST_OBJECTS", 3)
    storage = open_s3(s3_folder)
    for name in "abcd":
        storage.put(name, [b"1"])
    with pytest.raises(StorageError, match="its listing does not end"):
        storage.list("")


def test_answers_of_no_s3_server_are_told(s3_folder: str, s3_proxy: FaultProxy) -> None:
    storage = _behind(s3_proxy, s3_folder, IMPATIENT)
    s3_proxy.faults.append(Fault("html", ".", times=10_000))
    for attempt in (lambda: storage.put("x", [DATA]), lambda: storage.read("x", 9), lambda: storage.list("")):
        with pytest.raises(StorageError):
            attempt()


@pytest.mark.parametrize("place", ["path", "no scheme"])
def test_endpoints_with_a_path_are_told(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    scheme = "http://" if place == "path" else ""
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"{scheme}{s3_server.endpoint}/sub/path")
    words = "the endpoint has a path, /sub/path" if place == "path" else "AWS_ENDPOINT_URL is http"
    with pytest.raises(InternLMError, match=words):
        open_s3(f"s3://{BUCKET}/x").list("")


@pytest.mark.parametrize("prefix", ["run=1/a b/c+d", "实验/köln", "a%20b/(x)@y,z~'!*&$;:[]{}", "Ω\N{ROCKET}"])
def test_prefixes_of_any_letters(s3_server: S3Server, s3_folder: str, prefix: str) -> None:
    top, other = open_s3(s3_folder), open_s3(f"{s3_folder}/{prefix}")
    other.put("data/big", [DATA])
    assert other.put_if_absent("x", b"1") and not other.put_if_absent("x", b"2") and other.replace("x", b"1", b"3")
    assert [entry.key for entry in other.list("")] == ["data/big", "x"]
    assert other.read("x", 1) == b"3" and other.size("data/big") == len(DATA)
    s3_server.client().create_multipart_upload(Bucket=BUCKET, Key=f"{other._prefix}data/9.abcdef/y")
    other.sweep(-60, ".abcdef")
    other.delete_folder("data")
    other.delete("x")
    assert other.list("") == [] and top.list("") == []
