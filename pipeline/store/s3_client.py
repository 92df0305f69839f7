"""The connection to an S3 service: address, keys and options, from the usual AWS variables and files."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import boto3
import botocore.exceptions as boto_errors
from botocore.config import Config
from botocore.handlers import _handle_200_error as unread_as_500  # pyright: ignore[reportAttributeAccessIssue]
from botocore.handlers import add_expect_header
from botocore.parsers import ResponseParserError, ResponseParserFactory, RestXMLParser

from ddpm_pipeline.store.s3_errors import NotS3Answer, settings_error
from ddpm_pipeline.store.s3_settings import ADDRESSING_VARIABLE, CLIENT_VARIABLES

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client
else:
    S3Client = Any

CONNECT_SECONDS, READ_SECONDS = 5, 60
WHEN_REQUIRED = "when_required"
_ROOTS = {
    "ListObjectsV2Output": "ListBucketResult",
    "CreateMultipartUploadOutput": "InitiateMultipartUploadResult",
    "CompleteMultipartUploadOutput": "CompleteMultipartUploadResult",
}


@dataclass(frozen=True)
class Connected:
    """A client, and the session that its settings and keys come from."""

    client: S3Client
    session: boto3.session.Session


_connected: dict[tuple[int, str], Connected] = {}
_lock = threading.Lock()


def connected() -> Connected:
    """This process's client for the current environment: connections must not be shared across a fork."""
    identity = _identity()
    with _lock:
        if identity not in _connected:
            _connected[identity] = _connect(_session())
        return _connected[identity]


def renewed(old: Connected) -> Connected | None:
    """A client with the current keys of the AWS files; None when they are those of `old`."""
    identity = _identity()
    with _lock:
        now = _connected.get(identity, old)
        if now is not old:
            return now
        session = _session()
        if _keys(session) == _keys(old.session):
            return None
        _connected[identity] = _connect(session)
        return _connected[identity]


def custom_endpoint() -> str:
    """Address of the S3 service, wherever it is set (variable, profile); empty for AWS's own."""
    address = connected().client.meta.endpoint_url
    host = urlsplit(address).hostname or ""
    return "" if host.endswith((".amazonaws.com", ".amazonaws.com.cn")) else address


def endpoint() -> str:
    """Where requests go, for messages, without credentials; with the proxy, if there is one."""
    address = connected().client.meta.endpoint_url
    parts = urlsplit(address)
    name = _without_user(address) if custom_endpoint() else "AWS S3"
    proxy = getproxies().get(parts.scheme)
    if not proxy or proxy_bypass(parts.netloc.rpartition("@")[2]):
        return name
    return f"{name} (through the proxy {_without_user(proxy)})"


def location_variables() -> dict[str, str]:
    """Variables with which another machine reaches the same service without this one's AWS files."""
    config: Any = connected().client.meta.config
    style = (config.s3 or {}).get("addressing_style")
    found = {
        "AWS_ENDPOINT_URL_S3": custom_endpoint(),
        "AWS_REGION": _region(connected().session),
        ADDRESSING_VARIABLE: style,
    }
    return {name: value for name, value in found.items() if value}


def sends_own_checksums() -> bool:
    """Whether boto itself adds a checksum to every request, because the user configured it."""
    config: Any = connected().client.meta.config
    return config.request_checksum_calculation != WHEN_REQUIRED


def _identity() -> tuple[int, str]:
    return os.getpid(), repr([os.environ.get(name) for name in CLIENT_VARIABLES])


def _session() -> boto3.session.Session:
    try:
        return boto3.session.Session()
    except boto_errors.BotoCoreError as error:
        raise settings_error(error) from None


def _region(session: boto3.session.Session) -> str | None:
    return os.environ.get("AWS_REGION") or session.region_name  # boto itself reads AWS_DEFAULT_REGION only


def _keys(session: boto3.session.Session) -> Any:
    found = session.get_credentials()
    return found and found.get_frozen_credentials()


def _connect(session: boto3.session.Session) -> Connected:
    core: Any = session._session  # pyright: ignore[reportPrivateUsage]
    core.register_component("response_parser_factory", _Parsers())
    region = _region(session) or "us-east-1"
    try:
        config = _config(core.get_scoped_config())
        client = session.client("s3", config=config, region_name=region)
    except (ValueError, boto_errors.BotoCoreError) as error:
        raise settings_error(error) from None
    # With "Expect: 100-continue" a server responds before it has the body. If the connection ends within that response,
    # botocore reads forever, or takes it for the response to the next request (botocore issue 3755).
    client.meta.events.unregister("before-call.s3", add_expect_header)
    client.meta.events.register_first("needs-retry.s3", _follow_region_only)
    client.meta.events.unregister("before-parse.s3.*", unread_as_500)
    client.meta.events.register_first("before-parse.s3.*", _reject_web_page)
    return Connected(client, session)


def _config(profile: dict[str, Any]) -> Config:
    """Our defaults; what the user has set, and everything else, stays boto's."""
    style: Any = os.environ.get(ADDRESSING_VARIABLE)

    def chosen(name: str) -> Any:
        # Gateways know neither the trailing checksums nor the streaming signatures of newer SDKs.
        return os.environ.get(f"AWS_{name.upper()}") or profile.get(name) or WHEN_REQUIRED

    return Config(
        connect_timeout=CONNECT_SECONDS,
        read_timeout=READ_SECONDS,
        retries={
            "total_max_attempts": 1,
            "mode": "standard",
        },  # ddpm_pipeline.retry does it, for streams as well
        max_pool_connections=32,
        request_checksum_calculation=chosen("request_checksum_calculation"),
        response_checksum_validation=chosen("response_checksum_validation"),
        s3={"addressing_style": style} if style else None,
    )


def _follow_region_only(request_dict: Any, response: Any, **_: Any) -> None:
    """Let botocore follow a redirection only if it names a region: its request for one would be redirected too."""
    if response is None or response[0].status_code not in (301, 302, 307):
        return
    parsed = response[1]
    region = parsed.get("Error", {}).get("Region") or response[0].headers.get("x-amz-bucket-region")
    if not region:
        request_dict["context"].setdefault("s3_redirect", {})["redirected"] = True


def _reject_web_page(operation_model: Any, response_dict: Any, **_: Any) -> None:
    """Raise NotS3Answer for a successful response that is a web page, or not XML where XML is expected."""
    status, body = response_dict["status_code"], response_dict["body"]
    if status >= 300 or not isinstance(body, bytes) or not body.strip():
        return
    kind, begin = response_dict["headers"].get("content-type", "no XML")[:60], body.lstrip()[:14].lower()
    shape = operation_model.output_shape
    wants_xml = "json" in kind or (shape and shape.name in _ROOTS)
    if begin.startswith((b"<!doctype html", b"<html")) or (wants_xml and begin[:1] != b"<"):
        raise NotS3Answer(f"{status}, {kind}")
    unread_as_500(operation_model, response_dict)


def _without_user(address: str) -> str:
    parts = urlsplit(address)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path.rstrip('/')}"


class _Parsers(ResponseParserFactory):
    """Makes the parser below for S3."""

    def create_parser(self, protocol_name: str) -> Any:
        return (
            _Parser(timestamp_parser=str)
            if protocol_name == "rest-xml"
            else super().create_parser(protocol_name)
        )


class _Parser(RestXMLParser):
    """Rejects responses that are not S3's, and parses an object's entry in a listing by its XML tags instead of by
    botocore's model, in half the time. Modification times stay text: nothing here uses them.
    """

    def parse(self, response: Any, shape: Any) -> Any:
        try:
            return super().parse(response, shape)
        except boto_errors.BotoCoreError:
            raise
        except (ValueError, LookupError, TypeError, AttributeError) as error:  # a number that is none, say
            raise ResponseParserError(f"{type(error).__name__}: {error}") from error

    def _parse_shape(self, shape: Any, node: Any) -> Any:
        root = _ROOTS.get(shape.name)
        if root and node.tag.rpartition("}")[2] not in (root, ""):
            raise NotS3Answer(f"a document <{node.tag.rpartition('}')[2][:40]}>")
        return super()._parse_shape(shape, node)  # pyright: ignore[reportAttributeAccessIssue]

    def _handle_structure(self, shape: Any, node: Any) -> dict[str, Any]:
        if shape.name != "Object":
            return super()._handle_structure(shape, node)  # pyright: ignore[reportAttributeAccessIssue]
        found: dict[str, Any] = {child.tag.rpartition("}")[2]: child.text or "" for child in node}
        return found | {"Key": found["Key"], "Size": int(found["Size"])}
