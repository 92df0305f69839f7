"""The AWS settings of a user are heeded: keys that are put in place of others, endpoint, addressing, checksums."""

import base64
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

from ddpm_pipeline.errors import UserError
from ddpm_pipeline.store import RetryPolicy
from ddpm_pipeline.store.s3_client import custom_endpoint, endpoint, location_variables
from ddpm_pipeline.store.s3_store import S3Store
from tests.store.hostile_s3 import Answer, Request, answering, of_code

QUICK = RetryPolicy(attempts=2, first_pause_seconds=0.001)
DONE = Answer(200, b"", {"ETag": '"tag"'})


@pytest.fixture
def configured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Write ~/.aws/config and ~/.aws/credentials, and heed nothing else of AWS."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")

    def write(config: str = "", key: str = "key-one") -> None:
        (tmp_path / "config").write_text(f"[default]\n{config}\n")
        keys = f"aws_access_key_id = {key}\naws_secret_access_key = secret\n" if key else ""
        (tmp_path / "credentials").write_text(f"[default]\n{keys}")

    return write


@pytest.mark.parametrize(("status", "code"), [(400, "ExpiredToken"), (403, "InvalidAccessKeyId")])
def test_keys_put_in_place_of_expired_ones_are_read_and_the_call_made_again(
    configured: Callable[..., None], status: int, code: str
) -> None:
    def answer(request: Request) -> Answer:
        return DONE if "Credential=key-two/" in request.headers["authorization"] else of_code(status, code)

    with answering(answer) as address:
        configured(f"endpoint_url = {address}")
        store = S3Store("bucket", policy=QUICK)
        with pytest.raises(UserError, match=code):
            store.write("x", b"1")
        configured(f"endpoint_url = {address}", key="key-two")
        assert store.write("x", b"1").etag == "tag"


def test_an_endpoint_of_the_profile_is_the_one_that_is_asked_and_named(
    configured: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    with answering(lambda _: of_code(404, "NoSuchBucket")) as address:
        configured(f"endpoint_url = {address}")
        with pytest.raises(UserError, match=rf"there is no bucket 'bucket' at {address}; create it"):
            S3Store("bucket").require_container()
        assert custom_endpoint() == address
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://user:password@127.0.0.1:9")
    assert endpoint() == "http://127.0.0.1:9"
    monkeypatch.setenv("HTTP_PROXY", "http://user:password@proxy.example:3128")
    monkeypatch.setenv("NO_PROXY", "")
    assert endpoint() == "http://127.0.0.1:9 (through the proxy http://proxy.example:3128)"
    monkeypatch.setenv("AWS_IGNORE_CONFIGURED_ENDPOINT_URLS", "true")
    assert (custom_endpoint(), endpoint()) == ("", "AWS S3")


@pytest.mark.parametrize(
    ("config", "variable", "place"),
    [("", "", "store.example/bucket/x"), ("s3 =\n  addressing_style = virtual", "", "bucket.store.example/x"),
     ("", "virtual", "bucket.store.example/x"),
     ("s3 =\n  addressing_style = virtual", "path", "store.example/bucket/x")],
)  # fmt: skip
def test_the_bucket_is_named_in_the_host_where_the_user_says_so(
    configured: Callable[..., None], monkeypatch: pytest.MonkeyPatch, config: str, variable: str, place: str
) -> None:
    configured(f"endpoint_url = http://store.example\n{config}")
    if variable:
        monkeypatch.setenv("DDPM_S3_ADDRESSING_STYLE", variable)
    where = {"Bucket": "bucket", "Key": "x"}
    assert (
        S3Store("bucket")._client.generate_presigned_url("get_object", where).startswith(f"http://{place}?")
    )


def locked(request: Request) -> Answer:
    """A bucket under object lock: no bytes without a checksum."""
    query = parse_qs(urlsplit(request.path).query, keep_blank_values=True)
    if request.method == "POST" and "uploads" in query:
        return Answer(
            200, b"<InitiateMultipartUploadResult><UploadId>u</UploadId></InitiateMultipartUploadResult>"
        )
    if request.method == "POST":
        tag = b"<ETag>&quot;whole-2&quot;</ETag>"
        return Answer(200, b"<CompleteMultipartUploadResult>" + tag + b"</CompleteMultipartUploadResult>")
    digest = base64.b64encode(hashlib.md5(request.body, usedforsecurity=False).digest()).decode()
    if request.headers.get("content-md5") == digest or "x-amz-checksum-crc32" in request.headers:
        return DONE
    return of_code(400, "InvalidRequest")


@pytest.mark.parametrize("calculation", ["", "when_supported"])
def test_every_object_and_part_goes_up_with_a_checksum(
    configured: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calculation: str
) -> None:
    (tmp_path / "big").write_bytes(bytes(9 << 20))
    monkeypatch.setattr("ddpm_pipeline.store.s3_store.PART_BYTES", 5 << 20)
    if calculation:
        monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", calculation)
    with answering(locked) as address:
        configured(f"endpoint_url = {address}")
        store = S3Store("bucket", policy=QUICK)
        assert store.write("x", b"12345").etag == "tag"
        assert store.upload("big", tmp_path / "big").etag == "whole-2"


@pytest.mark.parametrize(
    ("config", "environment", "words"),
    [
        ("", {}, "no S3 keys found; set AWS_ACCESS_KEY_ID"),
        ("", {"AWS_PROFILE": "absent"}, r"profile \(absent\) could not be found; check .*AWS_PROFILE"),
        ("sso_start_url = https://sso.example\nsso_region = eu-west-1\nsso_account_id = 1\nsso_role_name = r", {},
         "SSO.*; sign in again .aws sso login."),
        ("sso_session = s\nsso_account_id = 1\nsso_role_name = r\n[sso-session s]\nsso_region = eu-west-1\n"
         "sso_start_url = https://sso.example", {}, "[Tt]oken.*; sign in again .aws sso login."),
        ("[broken", {}, "AWS settings: Unable to parse config file.*; check"),
        ("credential_process = false", {}, "AWS settings: .*custom-process.*; check"),
        ("role_arn = arn:aws:iam::1:role/r\nsource_profile = absent", {}, "AWS settings: .*absent.*; check"),
        ("", {"AWS_ENDPOINT_URL": "no address"}, "AWS settings: Invalid endpoint: no address; check AWS_ENDPOINT_URL"),
        ("request_checksum_calculation = never", {"AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s"},
         "AWS settings: .*never"),
        ("", {"AWS_ACCESS_KEY_ID": "k"}, "no S3 keys found; set"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_used_are_a_line(
    configured: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    config: str, environment: dict[str, str], words: str,
) -> None:  # fmt: skip
    configured(config, key="")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    store = S3Store("bucket", policy=QUICK)
    for call in (store.require_container, lambda: store.write("x", b""), lambda: store.stat("x")):
        with pytest.raises(UserError, match=words):
            call()


def test_another_machine_is_told_where_the_service_is_without_the_files_of_this_one(
    configured: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    configured("endpoint_url = http://store.example\nregion = eu-west-7\ns3 =\n  addressing_style = virtual")
    told = location_variables()
    assert told == {
        "AWS_ENDPOINT_URL_S3": "http://store.example",
        "AWS_REGION": "eu-west-7",
        "DDPM_S3_ADDRESSING_STYLE": "virtual",
    }
    configured()
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    assert location_variables() == told
