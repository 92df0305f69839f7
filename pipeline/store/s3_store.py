"""`s3://`: any S3-compatible service through boto3.

It uses no bulk delete, which some gateways reject, and relies on no conditional PUT, which some ignore, unless
`ddpm_pipeline.store.conditional_writes` has tried it.
"""

from __future__ import annotations

import base64
import hashlib
import io
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar, cast

import botocore.exceptions as boto_errors
from botocore.parsers import ResponseParserError

from ddpm_pipeline.disk_errors import disk_errors_at
from ddpm_pipeline.errors import DamageError, UserError
from ddpm_pipeline.retry import RetryPolicy, call_with_retries
from ddpm_pipeline.store.file_store import atomic_file
from ddpm_pipeline.store.interface import (
    ABSENT,
    ObjectChanged,
    ObjectInfo,
    ObjectMissing,
    Store,
    StoreUnreachable,
    checked_key,
)
from ddpm_pipeline.store.s3_client import connected, endpoint, renewed, sends_own_checksums
from ddpm_pipeline.store.s3_errors import (
    CONNECTION_ERRORS,
    MISSING_CODES,
    NOT_IMPLEMENTED,
    SECRET_CODES,
    STALE_CODES,
    NoSuchRange,
    NotS3Answer,
    UploadGone,
    code_of,
    not_s3,
    refusal,
    settings_error,
    silence,
    status_of,
)
from ddpm_pipeline.store.stream import Body, ResumingStream
from ddpm_pipeline.telemetry.counters import increment

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client
else:
    S3Client = Any

T = TypeVar("T")

POLICY = RetryPolicy()
PROBE_POLICY = RetryPolicy(attempts=2)  # for `_probe`: a person is waiting
PART_BYTES = 16 << 20  # S3 asks for at least 5 MiB a part; 10,000 parts of 16 MiB are 156 GiB
CHUNK_BYTES = 1 << 20
MD5_TAG = re.compile(r"[0-9a-f]{32}")
CONTENT_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".json": "application/json",
    ".png": "image/png",
    ".webp": "image/webp",
}
"""What a browser is told of objects that it shows; others keep the service's default, which it saves as a file."""
_CONTENT_RANGE = re.compile(r"bytes \d{1,18}-\d{1,18}/(\d{1,18})")


class S3Store(Store):
    """The objects of a bucket under a prefix."""

    def __init__(self, bucket: str, prefix: str = "", *, policy: RetryPolicy = POLICY) -> None:
        self.bucket, self.policy = bucket, policy
        self._base = f"{prefix.strip('/')}/" if prefix.strip("/") else ""
        self.uri = f"s3://{bucket}/{self._base}".rstrip("/")

    @property
    def service(self) -> str | None:
        return f"{endpoint()}/{self.bucket}"

    def read(self, key: str) -> bytes:
        """An object that is replaced while it is read is read again. The tag is checked too: JuiceFS's gateway can
        respond with the length of one version and the bytes of another.
        """
        before: tuple[bytes, str | None] | None = None
        where = f"{self.uri}/{key}"

        def read_once() -> bytes:
            nonlocal before
            tag = _Tag()
            with self._stream(key, 0, tag) as stream:
                found = (stream.readall(), tag.value)
            # The same bytes twice: the store's tags are not digests.
            if tag.encrypted or _matches_tag(*found) or found == before:
                return found[0]
            before = found
            raise ObjectChanged(f"{where}: replaced while it was being read")

        try:
            return call_with_retries(read_once, lambda error: isinstance(error, ObjectChanged), self.policy)
        except ObjectChanged:
            raise StoreUnreachable(
                f"{where}: replaced during every attempt to read it; try again later"
            ) from None

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
        name = self._name(key)

        def head(client: S3Client) -> Any:
            try:
                return client.head_object(Bucket=self.bucket, Key=name)
            except boto_errors.ClientError as error:
                if status_of(error) >= 500:
                    raise
                # A HEAD has no body that gives the reason: no object, no bucket, expired keys.
                client.get_object(Bucket=self.bucket, Key=name, Range="bytes=0-0")["Body"].close()
                return client.head_object(Bucket=self.bucket, Key=name)

        try:
            found = self._call(key, head)
        except ObjectMissing:
            return None
        tag = self._tag_of(key, found)
        return ObjectInfo(key, found["ContentLength"], tag)

    def write(self, key: str, data: bytes, *, replaces: str | None = None) -> ObjectInfo:
        where: Any = {"Bucket": self.bucket, "Key": self._name(key), "Body": data, **_checksum(data)}
        if (content_type := CONTENT_TYPES.get(PurePosixPath(key).suffix)) is not None:
            where["ContentType"] = content_type
        condition: Any = _condition(replaces)

        def put(client: S3Client) -> Any:
            try:
                return client.put_object(**where, **condition)
            except boto_errors.ClientError as error:
                if "IfMatch" in condition and code_of(error) in MISSING_CODES:
                    raise ObjectChanged(f"{self.uri}/{key}: deleted meanwhile; try again") from error
                if not condition or status_of(error) != NOT_IMPLEMENTED:
                    raise
                return client.put_object(**where)

        done = self._call(key, put)
        return ObjectInfo(key, len(data), self._tag_of(key, done))

    def upload(self, key: str, path: Path) -> ObjectInfo:
        try:
            with disk_errors_at(path):
                size_bytes = path.stat().st_size
                if size_bytes <= PART_BYTES:
                    return self.write(key, path.read_bytes())
                return ObjectInfo(key, size_bytes, self._upload_parts(key, path))
        except UploadGone as error:
            raise StoreUnreachable(str(error)) from error

    def download(self, key: str, path: Path) -> None:
        with disk_errors_at(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with self._stream(key, 0, _Tag()) as stream, atomic_file(path) as file:
                while chunk := stream.read(CHUNK_BYTES):
                    file.write(chunk)

    def list(self, prefix: str = "", start_after: str = "") -> Iterator[ObjectInfo]:
        where: Any = {"Bucket": self.bucket, "Prefix": self._base + prefix}
        token: Any = {"StartAfter": self._base + start_after} if start_after else {}
        last = ""
        while True:
            page = self._call(prefix, lambda client, token=token: client.list_objects_v2(**where, **token))
            entries: Any = page.get("Contents", [])
            for found in entries:
                key = found["Key"].removeprefix(self._base)
                if key and not key.endswith("/") and key > start_after:  # some gateways list directories too
                    yield ObjectInfo(key, found["Size"], _bare(found.get("ETag", "")))
            if not page.get("IsTruncated"):
                return
            before, last = last, max([last, *(found["Key"] for found in entries)])
            if "NextContinuationToken" not in page or last == before:
                raise not_s3(self.uri, endpoint(), "a listing without continuation")
            token = {"ContinuationToken": page["NextContinuationToken"]}

    def delete(self, key: str) -> None:
        name = self._name(key)

        def delete(client: S3Client) -> None:
            try:
                client.delete_object(Bucket=self.bucket, Key=name)
            except boto_errors.ClientError as error:
                if code_of(error) != "NoSuchKey":  # S3 itself gives no error for an object that is gone
                    raise

        self._call(key, delete)

    def _probe(self) -> None:
        self._call("", lambda client: client.list_objects_v2(Bucket=self.bucket, MaxKeys=1), PROBE_POLICY)

    def create_container(self) -> None:
        def create(client: S3Client) -> None:
            region = client.meta.region_name
            elsewhere: Any = {"CreateBucketConfiguration": {"LocationConstraint": region}}
            try:
                client.create_bucket(Bucket=self.bucket, **({} if region == "us-east-1" else elsewhere))
            except boto_errors.ClientError as error:
                if code_of(error) not in ("BucketAlreadyOwnedByYou", "BucketAlreadyExists"):
                    raise

        self._call("", create, PROBE_POLICY)

    def server_time(self) -> datetime | None:
        """The Date header of a response."""
        where: Any = {"Bucket": self.bucket, "Prefix": self._base, "MaxKeys": 1}
        answer = self._call("", lambda client: client.list_objects_v2(**where))
        try:
            return parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"]).astimezone(UTC)
        except (KeyError, ValueError):
            return None

    @property
    def _client(self) -> S3Client:
        return connected().client

    def _name(self, key: str) -> str:
        return self._base + checked_key(key)

    def _tag_of(self, key: str, answer: Any) -> str:
        """The tag in a response about an object. Every S3 service sends one; a web server may not."""
        if "ETag" not in answer:
            raise not_s3(f"{self.uri}/{key}", endpoint(), "no ETag")
        return _bare(answer["ETag"])

    def _stream(self, key: str, start: int, tag: _Tag, stop: int | None = None) -> ResumingStream:
        """The first response sets the object's tag, if none is given; every later range must match it."""
        last, name = "" if stop is None else stop - 1, self._name(key)

        def open_range(position: int) -> tuple[Body, int]:
            where: Any = {"Bucket": self.bucket, "Key": name, "Range": f"bytes={position}-{last}"}
            if tag.value:
                where["IfMatch"] = f'"{tag.value}"'
            try:
                found: Any = self._with_new_keys(key, lambda client: client.get_object(**where))
            except NoSuchRange:
                return _NoBytes(), position  # an empty object has no byte 0
            total = _CONTENT_RANGE.fullmatch(found.get("ContentRange", ""))
            if "ETag" not in found or total is None:
                found["Body"].close()
                known = (
                    "x-amz-request-id" in found["ResponseMetadata"]["HTTPHeaders"]
                )  # S3 says so, also of JSON
                if not known and found.get("ContentType", "").startswith(("text/html", "application/json")):
                    raise not_s3(f"{self.uri}/{key}", endpoint(), "an object without ETag or Content-Range")
                # seen of an object that was just being deleted or replaced
                raise StoreUnreachable(f"{self.uri}/{key}: {endpoint()} gave half an answer; try again later")
            if tag.value and tag.value != _bare(found["ETag"]):  # not every service honors IfMatch
                found["Body"].close()
                raise ObjectChanged(
                    f"{self.uri}/{key}: replaced while it was being read, or since it was indexed"
                )
            tag.value = _bare(found["ETag"])
            tag.encrypted = "SSECustomerAlgorithm" in found or "SSEKMSKeyId" in found
            end = int(total[1])
            return _Connection(found["Body"]), end if stop is None else min(end, stop)

        explain = partial(self._translated, key)
        return ResumingStream(open_range, self.policy, _may_retry, explain, start)

    def _upload_parts(self, key: str, path: Path) -> str:
        """A multipart upload that deletes its parts when it fails: orphaned parts are invisible and billed."""
        where: Any = {"Bucket": self.bucket, "Key": self._name(key)}
        begun = self._call(key, lambda client: client.create_multipart_upload(**where))
        where["UploadId"] = begun["UploadId"]
        parts: list[Any] = []
        try:
            with path.open("rb") as file:
                while chunk := file.read(PART_BYTES):
                    parts.append(self._upload_part(key, where, len(parts) + 1, chunk))
            return self._complete_upload(
                key, {**where, "MultipartUpload": {"Parts": parts}}, path.stat().st_size
            )
        except BaseException:
            with suppress(UserError):  # report the first failure
                self._call(key, lambda client: client.abort_multipart_upload(**where), PROBE_POLICY)
            raise

    def _upload_part(self, key: str, where: dict[str, Any], number: int, chunk: bytes) -> dict[str, Any]:
        """Upload a part; returns its entry for the request that completes the upload."""
        content: Any = {**where, "PartNumber": number, "Body": chunk, **_checksum(chunk)}
        done: Any = self._call(key, lambda client: client.upload_part(**content))
        self._tag_of(key, done)
        checksums = {name: done[name] for name in done if re.fullmatch(r"Checksum(CRC|SHA)\w+", name)}
        return {"PartNumber": number, "ETag": done["ETag"], **checksums}

    def _complete_upload(self, key: str, where: Any, size_bytes: int) -> str:
        """Complete the upload; returns its tag. After a lost response, a retry finds no upload any more."""
        try:
            done = self._call(key, lambda client: client.complete_multipart_upload(**where))
            return self._tag_of(key, done)
        except UploadGone:
            found = self.stat(key)
            if found is None or found.size_bytes != size_bytes:
                raise
            return found.etag

    def _call(self, key: str, action: Callable[[S3Client], T], policy: RetryPolicy | None = None) -> T:
        return call_with_retries(
            lambda: self._with_new_keys(key, action),
            _may_retry,
            policy or self.policy,
            lambda error, left: increment("store_retries"),
        )

    def _with_new_keys(self, key: str, action: Callable[[S3Client], T]) -> T:
        """`action` on the client, and once more if its keys were rejected and newer ones are available."""
        connection = connected()

        def attempt() -> T:
            try:
                return action(connection.client)
            except boto_errors.ClientError as error:
                newer = renewed(connection) if code_of(error) in STALE_CODES | SECRET_CODES else None
                if newer is None:
                    raise
                return action(newer.client)

        return self._translated(key, attempt)

    def _translated(self, key: str, action: Callable[[], T]) -> T:
        """`action()`, with boto's errors translated into this program's, which contain no keys or secrets."""
        try:
            return action()
        except boto_errors.ClientError as error:
            raise refusal(error, self.uri, self.bucket, key, endpoint()) from error
        except CONNECTION_ERRORS as error:
            raise silence(error, self.uri, endpoint()) from error
        except NotS3Answer as error:
            raise not_s3(self.uri, endpoint(), str(error)) from error
        except ResponseParserError as error:
            raise StoreUnreachable(
                f"{self.uri}: {endpoint()} gave an answer that cannot be read; try again later"
            ) from error
        except boto_errors.BotoCoreError as error:
            raise settings_error(error) from error


@dataclass
class _Tag:
    """The version of an object that a stream reads; empty = the one it finds."""

    value: str | None = None
    encrypted: bool = False
    """Encrypted under a key of the user's: the tag is not the digest of the bytes."""


class _NoBytes:
    """The body of an empty range at the end of an object."""

    def read(self, amt: int) -> bytes:
        return b""

    def close(self) -> None:
        """Nothing to release."""


class _Connection:
    """A body whose `read` returns what has arrived, so that no byte is lost when the rest never comes."""

    def __init__(self, body: Any) -> None:
        self._body = body

    def read(self, amt: int) -> bytes:
        # botocore's own read(amt) waits for all of it and, when the connection breaks, discards what came.
        raw: Any = self._body._raw_stream
        return cast(bytes, raw.read1(amt))

    def close(self) -> None:
        self._body.close()


def _may_retry(error: Exception) -> bool:
    return isinstance(error, (StoreUnreachable, *CONNECTION_ERRORS))


def _matches_tag(data: bytes, etag: str | None) -> bool:
    """Whether the bytes match the tag, which is their MD5 digest except for multipart uploads and encryption."""
    if etag is None or not MD5_TAG.fullmatch(etag):
        return True
    return hashlib.md5(data, usedforsecurity=False).hexdigest() == etag


def _bare(etag: str) -> str:
    return etag.removeprefix("W/").strip('"')


def _condition(replaces: str | None) -> dict[str, str]:
    if replaces is None:
        return {}
    return {"IfNoneMatch": "*"} if replaces == ABSENT else {"IfMatch": f'"{replaces}"'}


def _checksum(data: bytes) -> dict[str, str]:
    """Buckets with object lock reject objects without a checksum, and MD5 is the one that every service supports."""
    if sends_own_checksums():
        return {}
    return {"ContentMD5": base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()}
