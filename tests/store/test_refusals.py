"""Whatever an S3 service, a gateway or a proxy answers, a person reads one line that names the place and the remedy."""

import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import pytest

from ddpm_pipeline.errors import UserError
from ddpm_pipeline.store import ABSENT, ObjectChanged, RetryPolicy, Store, StoreUnreachable
from ddpm_pipeline.store.s3_store import S3Store
from tests.store.hostile_s3 import Answer, Request, answering, of_code

QUICK = RetryPolicy(attempts=2, first_pause_seconds=0.001)
PAGE = b"<!DOCTYPE html><html><head><title>Sign in</title></head><body><br>Welcome</body></html>"
XHTML = b"<html><head><title>Sign in</title></head><body>Welcome</body></html>"
JSON = {"Content-Type": "application/json"}
HTML = {"Content-Type": "text/html; charset=utf-8"}


@dataclass(frozen=True)
class Case:
    """An answer to every request, and what a person must read in the line that it becomes."""

    answer: Answer
    words: str
    outage: bool = False
    """Waiting may help."""


CASES = {
    "expired token": Case(of_code(400, "ExpiredToken"), "the keys have expired .*; get new keys"),
    "token to refresh": Case(of_code(400, "TokenRefreshRequired"), "the keys have expired .*; get new keys"),
    "skewed": Case(of_code(403, "RequestTimeTooSkewed"), "clock is wrong .*; switch time synchronisation on"),
    "expired request": Case(
        of_code(400, "RequestExpired"), "clock is wrong .*; switch time synchronisation on"
    ),
    "quota of Ceph": Case(of_code(403, "QuotaExceeded"), "no room left .*; delete"),
    "quota of MinIO": Case(of_code(400, "XMinioAdminBucketQuotaExceeded"), "no room left .*; delete"),
    "full": Case(of_code(507, "XMinioStorageFull"), "no room left .*; delete"),
    "moved": Case(of_code(301, "PermanentRedirect"), "in another region .*; set AWS_REGION"),
    "region": Case(
        of_code(400, "AuthorizationHeaderMalformed", "<Region>eu-west-7</Region>"),
        "is in region eu-west-7 .*; set AWS_REGION=eu-west-7",
    ),
    "archived": Case(of_code(403, "InvalidObjectState"), "in an archive .*; restore it first"),
    "object lock": Case(
        of_code(400, "InvalidRequest"), "does not take this request .*; look at its object lock"
    ),
    "key off": Case(
        of_code(400, "KMS.DisabledException"), "the key that encrypts .*; look at that key's state"
    ),
    "key away": Case(
        of_code(400, "KMS.NotFoundException"), "the key that encrypts .*; look at that key's state"
    ),
    "closed": Case(
        of_code(403, "AllAccessDisabled"), "account may not use the service .*; look at its state"
    ),
    "unpaid": Case(of_code(403, "AccountProblem"), "account may not use the service .*; look at its state"),
    "host style": Case(
        of_code(403, "SecondLevelDomainForbidden"), "host name .*; set `s3 = addressing_style"
    ),
    "argument": Case(
        of_code(400, "InvalidArgument"), r"refuses it \(.* says InvalidArgument: because\); look"
    ),
    "unheard of": Case(of_code(418, "Teapot"), r"refuses it \(.* says Teapot: because\); look this code up"),
    "method": Case(
        of_code(405, "MethodNotAllowed"), "does not allow this call .*; check that AWS_ENDPOINT_URL"
    ),
    "method, no body": Case(Answer(405), "does not allow this call .*; check that AWS_ENDPOINT_URL"),
    "not made": Case(of_code(501, "NotImplemented"), "does not know this call .*; use one that does"),
    "denied": Case(
        of_code(403, "AccessDenied"), r"refuses the keys \(AccessDenied: because\); check AWS_ACCESS_"
    ),
    "no such key": Case(
        of_code(403, "InvalidAccessKeyId"), r"refuses the keys \(InvalidAccessKeyId\); check"
    ),
    "no bucket": Case(of_code(404, "NoSuchBucket"), "there is no bucket 'bucket' at .*; create it"),
    "proxy": Case(Answer(407), "the proxy wants a password .*; put it into HTTPS_PROXY"),
    "too large": Case(Answer(413, PAGE, HTML), "not as an S3 service does .*; set AWS_ENDPOINT_URL"),
    "forbidding page": Case(Answer(403, PAGE, HTML), r"not as an S3 service does \(403, a web page\)"),
    "tidy page": Case(Answer(403, XHTML), r"not as an S3 service does \(403, a web page\)"),
    "page of no such page": Case(Answer(404, PAGE, HTML), r"not as an S3 service does \(404, a web page\)"),
    "login": Case(
        Answer(302, PAGE, HTML | {"Location": "https://me:pw@login.example/?token=abc"}),
        r"not as an S3 service does \(302, sent on to login.example\)",
    ),
    "console": Case(Answer(200, PAGE, HTML), "not as an S3 service does .*; set AWS_ENDPOINT_URL"),
    "tidy console": Case(Answer(200, XHTML, HTML), "not as an S3 service does .*; set AWS_ENDPOINT_URL"),
    "another service": Case(
        Answer(200, b'{"ok": true}', JSON), "not as an S3 service does .*; set AWS_ENDPOINT_URL"
    ),
    "aborted": Case(of_code(409, "OperationAborted"), "is failing or too busy .OperationAborted.; try", True),
    "busy": Case(of_code(503, "SlowDown"), "is failing or too busy .(SlowDown|503).; try again later", True),
    "page of a dead gateway": Case(Answer(502, PAGE, HTML), "is failing or too busy .502.; try again", True),
    "many": Case(Answer(429), "is failing or too busy .429.; try again later", True),
    "damaged": Case(of_code(400, "BadDigest"), "is failing or too busy .BadDigest.; try again later", True),
    "control characters": Case(of_code(400, "Odd&#10;\x7f"), r"refuses it \(.*; look this code up"),
    "lengthy": Case(of_code(400, "x" * 9000), r"refuses it \(.*; look this code up"),
}


def calls(store: Store, folder: Path) -> dict[str, Callable[[], object]]:
    """Everything that can be asked of a store."""
    (folder / "small").write_bytes(b"12345")
    return {
        "read": lambda: store.read("key"),
        "read_range": lambda: store.read_range("key", 0, 5),
        "open": lambda: store.open("key", etag="tag").read(),
        "stat": lambda: store.stat("key"),
        "write": lambda: store.write("key", b"12345"),
        "upload": lambda: store.upload("key", folder / "small"),
        "download": lambda: store.download("key", folder / "down"),
        "list": lambda: list(store.list()),
        "delete": lambda: store.delete("key"),
        "require_container": store.require_container,
        "create_container": store.create_container,
        "server_time": store.server_time,
    }


class Server:
    """An endpoint that gives one answer to all, another in each test."""

    answer: Answer


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """One for all cases, for a client is made for each address. Nothing of the machine's user is heeded."""
    server = Server()
    with answering(lambda _: server.answer) as address, pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            patch.delenv(name)
        patch.setenv("AWS_CONFIG_FILE", "/nonexistent")
        patch.setenv("AWS_ACCESS_KEY_ID", "key-of-the-test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret-of-the-test")
        patch.setenv("AWS_ENDPOINT_URL", address)
        yield server


def outcome(call: Callable[[], object]) -> object:
    """What a call returns, or the error that it ends with."""
    try:
        return call()
    except Exception as error:  # noqa: BLE001 - the subject of these tests
        return error


@pytest.mark.parametrize("name", CASES)
def test_every_answer_to_every_call_is_a_line_with_a_remedy(
    name: str, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, server.answer = CASES[name], CASES[name].answer
    monkeypatch.setattr("ddpm_pipeline.store.s3_store.PROBE_POLICY", QUICK)
    asked = calls(S3Store("bucket", policy=QUICK), tmp_path)
    with ThreadPoolExecutor(4) as pool:
        outcomes = dict(zip(asked, pool.map(outcome, asked.values()), strict=True))
    for call, found in outcomes.items():
        assert isinstance(found, UserError), (call, found)
        assert isinstance(found, StoreUnreachable) == case.outage, (call, found)
        assert re.search(case.words, str(found)), (call, found)
        assert str(found).startswith("s3://bucket"), (call, found)
        assert not any(secret in str(found) for secret in ("pw@", "abc", "of-the-test")), (call, found)


def test_an_endless_listing_and_one_without_an_end_are_no_s3_services(server: Server) -> None:
    body = (
        "<ListBucketResult><IsTruncated>true</IsTruncated><NextContinuationToken>t</NextContinuationToken>"
        "<Contents><Key>a</Key><Size>1</Size></Contents></ListBucketResult>"
    )
    for text in (body, body.replace("NextContinuationToken", "Other")):
        server.answer = Answer(200, text.encode())
        with pytest.raises(UserError, match=r"not as an S3 service does .a listing without continuation."):
            list(S3Store("bucket", policy=QUICK).list())


@pytest.mark.parametrize(
    "body",
    [
        "<ListBucketResult><Contents><Key>a</Key><Size>many</Size></Contents></ListBucketResult>",
        "<ListBucketResult><Contents><Size>1</Size></Contents></ListBucketResult>",
        "<ListBucketResult><Contents><Key>a",
    ],
)
def test_a_listing_that_cannot_be_read_is_asked_for_again_and_then_told(server: Server, body: str) -> None:
    server.answer = Answer(200, body.encode())
    with pytest.raises(StoreUnreachable, match=r"s3://bucket.*; try again later"):
        list(S3Store("bucket", policy=QUICK).list())


def test_half_an_answer_for_a_json_object_is_an_outage_if_s3_gave_it(server: Server) -> None:
    """As JuiceFS's gateway answers for an object that is just being replaced."""
    half = {"Content-Type": "application/json"}
    store = S3Store("bucket", policy=QUICK)
    server.answer = Answer(200, b"{}", half)
    with pytest.raises(UserError, match="not as an S3 service does"):
        store.read("jobs/x.json")
    server.answer = Answer(200, b"{}", {**half, "x-amz-request-id": "1"})
    with pytest.raises(StoreUnreachable, match=r"s3://bucket/jobs/x\.json.*; try again later"):
        store.read("jobs/x.json")


def test_an_object_replaced_at_a_service_that_ignores_conditions_is_noticed(server: Server) -> None:
    server.answer = Answer(206, b"12345", {"ETag": '"new"', "Content-Range": "bytes 0-4/5"})
    store = S3Store("bucket", policy=QUICK)
    with pytest.raises(ObjectChanged, match="s3://bucket/x: replaced"):
        store.read_range("x", 0, 5, etag="old")
    assert store.read_range("x", 0, 5, etag="new") == b"12345"


@pytest.mark.parametrize(
    ("date", "told"), [("Tue, 01 Jan 2030 00:00:00 GMT", datetime(2030, 1, 1, tzinfo=UTC)), ("then", None)]
)
def test_the_services_clock_is_the_date_of_its_answers(
    server: Server, date: str, told: datetime | None
) -> None:
    server.answer = Answer(200, b"<ListBucketResult/>", {"Date": date})
    assert S3Store("bucket").server_time() == told


def test_a_service_that_knows_no_conditional_put_is_written_to_without_condition(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    conditions: list[str | None] = []

    def answer(request: Request) -> Answer:
        conditions.append(request.headers.get("if-none-match") or request.headers.get("if-match"))
        return of_code(501, "NotImplemented") if conditions[-1] else Answer(200, headers={"ETag": '"tag"'})

    with answering(answer) as address:
        monkeypatch.setenv("AWS_ENDPOINT_URL", address)
        store = S3Store("bucket", policy=QUICK)
        assert store.write("x", b"one", replaces=ABSENT).etag == "tag"
        assert store.write("x", b"two", replaces="tag").etag == "tag"
    assert conditions == ["*", None, '"tag"', None]


def test_a_write_that_meets_the_deletion_of_its_directory_is_made_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """JuiceFS's gateway deletes a directory with its last object, also while another object is written into it."""
    asked: list[str] = []

    def answer(request: Request) -> Answer:
        asked.append(request.method)
        first = len(asked) == 1
        return of_code(404, "NoSuchKey") if first else Answer(200, headers={"ETag": '"tag"'})

    with answering(answer) as address:
        monkeypatch.setenv("AWS_ENDPOINT_URL", address)
        store = S3Store("bucket", policy=QUICK)
        for replaces in (None, ABSENT):
            asked.clear()
            assert store.write("x", b"one", replaces=replaces).etag == "tag"
            assert asked == ["PUT", "PUT"]
        asked.clear()
        with pytest.raises(ObjectChanged, match="s3://bucket/x: deleted meanwhile"):
            store.write("x", b"two", replaces="tag")
        asked.clear()
        store.delete("x")
        assert asked == ["DELETE"]
