"""`s3://`: any S3-compatible service through boto3.

Endpoint, keys and region come from the usual AWS variables or profile. No conditional PUT and no bulk delete
is relied on: some gateways ignore the first and refuse the second.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar, cast
from urllib.parse import urlsplit

import boto3
import botocore.exceptions as boto_errors
import urllib3.exceptions
from botocore.config import Config
from botocore.handlers import add_expect_header
from botocore.parsers import ResponseParserFactory, RestXMLParser

from pipeline.errors import DamageError, UserError
from pipeline.store.base import ObjectChanged, ObjectInfo, ObjectMissing, Store, StoreUnreachable, checked_key
from pipeline.store.files import atomic_file
from pipeline.store.retry import RetryPolicy, retrying
from pipeline.store.stream import Body, ResumingStream

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client
else:
    S3Client = Any

T = TypeVar("T")

POLICY = RetryPolicy()
PROBE_POLICY = RetryPolicy(attempts=2)  # for `require_container`: a person is waiting
PART_BYTES = 16 << 20  # S3 asks for at least 5 MiB a part; 10,000 parts of 16 MiB are 156 GiB
CHUNK_BYTES = 1 << 20
MD5_TAG = re.compile(r"[0-9a-f]{32}")
ENDPOINT_VARIABLES = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION")
CONNECT_SECONDS, READ_SECONDS = 5, 60

MISSING_CODES = {"404", "NoSuchKey", "NotFound"}
SECRET_CODES = {
    "403",
    "AccessDenied",
    "Forbidden",
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
    "InvalidToken",
}
BUSY_CODES = {
    "SlowDown", "Throttling", "ThrottlingException", "RequestThrottled", "TooManyRequests", "RequestTimeout",
    "InternalError", "ServiceUnavailable", "XMinioServerNotInitialized",
}  # fmt: skip


class S3Store(Store):
    """The objects of a bucket under a prefix."""

    def __init__(self, bucket: str, prefix: str = "", *, policy: RetryPolicy = POLICY) -> None:
        self.bucket, self.policy = bucket, policy
        self._base = f"{prefix.strip('/')}/" if prefix.strip("/") else ""
        self.uri = f"s3://{bucket}/{self._base}".rstrip("/")

    def read(self, key: str) -> bytes:
        """Replaced while it is read, an object is read again. The tag tells when the store does not: JuiceFS's
        gateway can answer with the length of one version and the bytes of the other.
        """
        before: tuple[bytes, str | None] | None = None
        for failures in range(self.policy.attempts):
            if failures:
                time.sleep(self.policy.pause_seconds(failures))
            with suppress(ObjectChanged):
                tag = _Tag()
                with self._stream(key, 0, tag) as stream:
                    found = (stream.readall(), tag.value)
                # Twice the same is no accident but a store whose tags are no digests.
                if tag.encrypted or _bears_out(*found) or found == before:
                    return found[0]
                before = found
        raise StoreUnreachable(f"{self.uri}/{key}: replaced whenever it was read; try again later")

    def read_range(self, key: str, start: int, length: int, *, etag: str | None = None) -> bytes:
        if length == 0:
            return b""
        with self._stream(key, start, _Tag(etag), stop=start + length) as stream:
            data = stream.read()
        if len(data) != length:
            raise DamageError(
                f"{self.uri}/{key}: ends at byte {start + len(data)}, {start + length} expected"
            )
        return data

    def open(self, key: str, *, start: int = 0, etag: str | None = None) -> BinaryIO:
        return io.BufferedReader(self._stream(key, start, _Tag(etag)), CHUNK_BYTES)

    def stat(self, key: str) -> ObjectInfo | None:
        try:
            found = self._call(key, lambda: self._client.head_object(Bucket=self.bucket, Key=self._name(key)))
        except ObjectMissing:
            return None
        return ObjectInfo(key, found["ContentLength"], _bare(found["ETag"]))

    def write(self, key: str, data: bytes) -> ObjectInfo:
        done = self._call(
            key, lambda: self._client.put_object(Bucket=self.bucket, Key=self._name(key), Body=data)
        )
        return ObjectInfo(key, len(data), _bare(done["ETag"]))

    def upload(self, key: str, path: Path) -> ObjectInfo:
        size_bytes = path.stat().st_size
        if size_bytes <= PART_BYTES:
            return self.write(key, path.read_bytes())
        return ObjectInfo(key, size_bytes, _bare(self._upload_parts(key, path)))

    def download(self, key: str, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with self._stream(key, 0, _Tag()) as stream, atomic_file(path) as file:
            while chunk := stream.read(CHUNK_BYTES):
                file.write(chunk)

    def list(self, prefix: str = "", start_after: str = "") -> Iterator[ObjectInfo]:
        token: dict[str, str] = {"StartAfter": self._base + start_after} if start_after else {}
        while True:
            page = self._call(prefix, partial(self._list_page, prefix, token))
            for found in page.get("Contents", []):
                key = found["Key"].removeprefix(self._base)
                if key and not key.endswith("/") and key > start_after:  # some gateways list directories too
                    yield ObjectInfo(key, found["Size"], _bare(found["ETag"]))
            if not page.get("IsTruncated"):
                return
            token = {"ContinuationToken": page["NextContinuationToken"]}

    def delete(self, key: str) -> None:
        self._call(key, lambda: self._client.delete_object(Bucket=self.bucket, Key=self._name(key)))

    def require_container(self) -> None:
        probe = lambda: self._client.list_objects_v2(Bucket=self.bucket, MaxKeys=1)  # noqa: E731
        self._call("", probe, PROBE_POLICY)

    def create_container(self) -> None:
        def create() -> None:
            try:
                region = self._client.meta.region_name
                where: Any = (
                    {}
                    if region == "us-east-1"
                    else {"CreateBucketConfiguration": {"LocationConstraint": region}}
                )
                self._client.create_bucket(Bucket=self.bucket, **where)
            except boto_errors.ClientError as error:
                if _code(error) not in ("BucketAlreadyOwnedByYou", "BucketAlreadyExists"):
                    raise

        self._call("", create, PROBE_POLICY)

    def server_time(self) -> datetime | None:
        """The Date of an answer."""
        probe = partial(self._client.list_objects_v2, Bucket=self.bucket, Prefix=self._base, MaxKeys=1)
        headers = self._call("", probe)["ResponseMetadata"].get("HTTPHeaders", {})
        try:
            return parsedate_to_datetime(headers.get("date", "")).astimezone(UTC)
        except ValueError:
            return None

    @property
    def _client(self) -> S3Client:
        return _client()

    def _name(self, key: str) -> str:
        return self._base + checked_key(key)

    def _list_page(self, prefix: str, token: dict[str, str]) -> Any:
        where: Any = {"Bucket": self.bucket, "Prefix": self._base + prefix, **token}
        return self._client.list_objects_v2(**where)

    def _get(self, key: str, span: str, etag: str | None) -> Any:
        extra: Any = {"IfMatch": f'"{etag}"'} if etag else {}
        return self._client.get_object(Bucket=self.bucket, Key=self._name(key), Range=span, **extra)

    def _stream(self, key: str, start: int, tag: _Tag, stop: int | None = None) -> ResumingStream:
        """The first answer sets the object's tag, where none is given; every later range must still match it."""
        last = "" if stop is None else stop - 1

        def open_range(position: int) -> tuple[Body, int]:
            try:
                found = self._get(key, f"bytes={position}-{last}", tag.value)
            except boto_errors.ClientError as error:
                if _code(error) not in ("416", "InvalidRange"):
                    raise
                return _NoBytes(), position  # an empty object has no byte 0 to give
            if (
                "ETag" not in found or "ContentRange" not in found
            ):  # seen of an object that was just being deleted
                raise StoreUnreachable(f"{self.uri}/{key}: {endpoint()} gave half an answer; try again later")
            tag.value = tag.value or _bare(found["ETag"])
            tag.encrypted = "SSECustomerAlgorithm" in found or "SSEKMSKeyId" in found
            total = int(found["ContentRange"].rpartition("/")[2])
            return _Connection(found["Body"]), total if stop is None else min(total, stop)

        explain = partial(self._explained, key)
        return ResumingStream(open_range, self.policy, _may_retry, explain, start)

    def _upload_parts(self, key: str, path: Path) -> str:
        """A multipart upload that, when it fails, takes its parts away: orphans are invisible and billed."""
        name = self._name(key)
        begun = self._call(key, lambda: self._client.create_multipart_upload(Bucket=self.bucket, Key=name))
        where: Any = {"Bucket": self.bucket, "Key": name, "UploadId": begun["UploadId"]}
        parts: list[Any] = []
        try:
            with path.open("rb") as file:
                while chunk := file.read(PART_BYTES):
                    number = len(parts) + 1
                    send = partial(self._client.upload_part, **where, PartNumber=number, Body=chunk)
                    parts.append({"PartNumber": number, "ETag": self._call(key, send)["ETag"]})
            finish = partial(
                self._client.complete_multipart_upload, **where, MultipartUpload={"Parts": parts}
            )
            return self._finished(key, finish, path.stat().st_size)
        except BaseException:
            with suppress(UserError):  # what failed first is what is told
                self._call(key, partial(self._client.abort_multipart_upload, **where), PROBE_POLICY)
            raise

    def _finished(self, key: str, finish: Callable[[], Any], size_bytes: int) -> str:
        """The tag of the completed upload. Asked again after a lost answer, a store knows of no upload any more."""
        try:
            return self._call(key, finish)["ETag"]
        except boto_errors.ClientError as error:
            there = self.stat(key)
            if _code(error) != "NoSuchUpload":
                raise
            if there is None or there.size_bytes != size_bytes:
                raise StoreUnreachable(
                    f"{self.uri}/{key}: its upload was ended by others; try again"
                ) from error
            return there.etag

    def _call(self, key: str, action: Callable[[], T], policy: RetryPolicy | None = None) -> T:
        return retrying(policy or self.policy, _may_retry, lambda: self._explained(key, action))

    def _explained(self, key: str, action: Callable[[], T]) -> T:
        """`action()`, with boto's failures turned into this program's, which show no key or secret."""
        try:
            return action()
        except boto_errors.ClientError as error:
            raise self._meaning(error, key) from error
        except (boto_errors.NoCredentialsError, boto_errors.PartialCredentialsError):
            raise UserError(
                f"{self.uri}: no S3 keys found; set AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY or AWS_PROFILE"
            ) from None
        except CONNECTION_ERRORS as error:
            raise StoreUnreachable(
                f"{self.uri}: {endpoint()} does not answer ({type(error).__name__}); "
                "check AWS_ENDPOINT_URL and that the service runs"
            ) from error

    def _meaning(self, error: boto_errors.ClientError, key: str) -> Exception:
        code, status = _code(error), error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        where = f"{self.uri}/{key}" if key else self.uri
        if code == "NoSuchBucket":
            return UserError(
                f"{self.uri}: there is no bucket {self.bucket!r} at {endpoint()}; "
                f"create it (aws s3 mb s3://{self.bucket}) or correct the name"
            )
        if code in MISSING_CODES:
            return ObjectMissing(key, where)
        if code in ("412", "PreconditionFailed"):
            return ObjectChanged(f"{where}: replaced while it was being read, or since it was indexed")
        if code in SECRET_CODES:
            return UserError(
                f"{where}: {endpoint()} refuses the keys ({code}); check AWS_ACCESS_KEY_ID, "
                "AWS_SECRET_ACCESS_KEY and the bucket's permissions"
            )
        if code in BUSY_CODES or status >= 500 or status == 429:
            return StoreUnreachable(f"{where}: {endpoint()} is failing or too busy ({code}); try again later")
        return error


class _Parsers(ResponseParserFactory):
    """Makes the parser below for S3."""

    def create_parser(self, protocol_name: str) -> Any:
        return (
            _Parser(timestamp_parser=str)
            if protocol_name == "rest-xml"
            else super().create_parser(protocol_name)
        )


class _Parser(RestXMLParser):
    """Reads an object's entry in a listing by its tags instead of by botocore's model of it: half the time of a page.

    Nobody here asks when an object was written, so that is left as it is.
    """

    def _handle_structure(self, shape: Any, node: Any) -> dict[str, Any]:
        if shape.name != "Object":
            return super()._handle_structure(shape, node)  # pyright: ignore[reportAttributeAccessIssue]
        found: dict[str, Any] = {child.tag.rpartition("}")[2]: child.text or "" for child in node}
        return found | {"Size": int(found["Size"])}


@dataclass
class _Tag:
    """Which version of an object a stream holds to; empty = the one it meets."""

    value: str | None = None
    encrypted: bool = False
    """Its bytes have been encrypted under a key of the user's: the tag is not their digest."""


class _NoBytes:
    """The body of a range that lies at the very end of its object."""

    def read(self, amt: int) -> bytes:
        return b""

    def close(self) -> None:
        """Nothing is held."""


class _Connection:
    """A body whose `read` gives what has arrived, so that no byte is lost when the rest never comes."""

    def __init__(self, body: Any) -> None:
        self._body = body

    def read(self, amt: int) -> bytes:
        # botocore's own read(amt) waits for all of it and, when the connection breaks, discards what came.
        raw: Any = self._body._raw_stream
        return cast(bytes, raw.read1(amt))

    def close(self) -> None:
        self._body.close()


CONNECTION_ERRORS = (
    boto_errors.HTTPClientError,  # also connection, proxy, TLS and time-out errors, which derive from it
    boto_errors.ConnectionError,
    boto_errors.IncompleteReadError,
    urllib3.exceptions.HTTPError,
    ConnectionError,
    TimeoutError,
)

_clients: dict[tuple[int, str], S3Client] = {}
_clients_lock = threading.Lock()


def _client() -> S3Client:
    """This process's client for the present environment: connections must not be shared across a fork."""
    where = tuple(os.environ.get(name, "") for name in ENDPOINT_VARIABLES)
    who = tuple(
        os.environ.get(name, "")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE")
    )
    identity = (os.getpid(), repr((where, who)))
    with _clients_lock:
        if identity not in _clients:
            _clients[identity] = _new_client()
        return _clients[identity]


def _new_client() -> S3Client:
    config = Config(
        connect_timeout=CONNECT_SECONDS,
        read_timeout=READ_SECONDS,
        retries={"total_max_attempts": 1, "mode": "standard"},  # `retrying` does it, for streams as well
        max_pool_connections=32,
        # Gateways know neither the trailing checksums nor the streaming signatures of newer SDKs.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        s3={"addressing_style": "path" if _custom_endpoint() else "auto"},
    )
    session = boto3.session.Session()
    session._session.register_component("response_parser_factory", _Parsers())  # pyright: ignore[reportPrivateUsage]
    try:
        client = session.client("s3", config=config, region_name=session.region_name or "us-east-1")
    except (ValueError, boto_errors.BotoCoreError) as error:
        raise UserError(f"AWS settings: {error}; check AWS_ENDPOINT_URL and AWS_PROFILE") from None
    # Asked by "Expect: 100-continue", a server answers before it has the body. When the connection ends within that
    # answer, botocore reads on for ever; and it may take the answer for that of the next request (botocore issue 3755).
    client.meta.events.unregister("before-call.s3", add_expect_header)
    return client


def _custom_endpoint() -> str:
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""


def endpoint() -> str:
    """Where requests go, in words that hold no credentials."""
    custom = _custom_endpoint()
    if not custom:
        return "AWS S3"
    parts = urlsplit(custom)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"


def _may_retry(error: Exception) -> bool:
    return isinstance(error, (StoreUnreachable, *CONNECTION_ERRORS))


def _code(error: boto_errors.ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def _bears_out(data: bytes, etag: str | None) -> bool:
    """Whether the bytes are the tag's, which is their MD5 digest unless it came of parts or of encryption."""
    if etag is None or not MD5_TAG.fullmatch(etag):
        return True
    return hashlib.md5(data, usedforsecurity=False).hexdigest() == etag


def _bare(etag: str) -> str:
    return etag.removeprefix("W/").strip('"')
