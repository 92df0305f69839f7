"""Errors of S3 services as errors of this program: one line with the cause and the remedy, whatever the service is."""

from __future__ import annotations

import os
import re
from urllib.parse import urlsplit

import botocore.exceptions as boto_errors
import urllib3.exceptions
from botocore.parsers import ResponseParserError

from ddpm_pipeline.errors import DamageError, DiskFull, UserError
from ddpm_pipeline.store.interface import ObjectChanged, ObjectMissing, StoreUnreachable

MAX_MESSAGE_CHARACTERS = 200  # of a service's own message
MISSING_CODES = {"404", "NoSuchKey", "NotFound"}
READS = {"HeadObject", "GetObject"}
STALE_CODES = {"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired"}
SECRET_CODES = {
    "401", "403", "AccessDenied", "Forbidden", "Unauthorized", "InvalidAccessKeyId", "SignatureDoesNotMatch",
    "InvalidToken", "InvalidSecurity", "UnrecognizedClientException", "InvalidClientTokenId",
}  # fmt: skip
BUSY_CODES = {
    "SlowDown", "Throttling", "ThrottlingException", "RequestThrottled", "TooManyRequests", "RequestLimitExceeded",
    "BandwidthLimitExceeded", "RequestTimeout", "InternalError", "ServiceUnavailable", "XMinioServerNotInitialized",
    "OperationAborted", "ConditionalRequestConflict", "IncompleteBody", "BadDigest", "XAmzContentSHA256Mismatch",
    "XAmzContentChecksumMismatch", "408", "429",
}  # fmt: skip
NOT_IMPLEMENTED = 501
PERMANENT_STATUSES = {NOT_IMPLEMENTED, 505}  # the 5xx that no retry changes

_KEYS = "get new keys (aws sso login, or a new AWS_SESSION_TOKEN) and start the same command again"
_REGION = "set AWS_REGION to the bucket's"
_MORE = "delete what is not needed, or ask for a higher quota"
_OWNER = "ask whoever runs the service"
_GROUPS: tuple[tuple[str, str, str], ...] = (
    (" ".join(STALE_CODES), "the keys have expired", _KEYS),
    (
        "RequestTimeTooSkewed RequestExpired RequestInTheFuture",
        "this machine's clock is wrong",
        "switch time synchronisation on (timedatectl set-ntp true)",
    ),
    (
        "QuotaExceeded XMinioAdminBucketQuotaExceeded XMinioStorageFull InsufficientStorage "
        "InsufficientCapacity StorageFull 507",
        "there is no room left",
        _MORE,
    ),
    (
        "PermanentRedirect TemporaryRedirect Redirect AuthorizationHeaderMalformed "
        "IllegalLocationConstraintException InvalidRegionName InvalidLocationConstraint 301 307",
        "the bucket is in another region",
        _REGION,
    ),
    (
        "InvalidObjectState ObjectNotInActiveTierError",
        "the object lies in an archive",
        "restore it first (aws s3api restore-object)",
    ),
    (
        "AllAccessDisabled AccountProblem UserSuspended UserDisable UnderMaintenance NotSignedUp OptInRequired",
        "the account may not use the service",
        "look at its state and its bill",
    ),
    (
        "SecondLevelDomainForbidden VirtualHostedStyleRequired PathStyleNotSupported",
        "the service wants the bucket in the host name",
        "set `s3 = addressing_style = virtual` in ~/.aws/config, or DDPM_S3_ADDRESSING_STYLE=virtual",
    ),
    (
        "MethodNotAllowed 405",
        "the service does not allow this call",
        "check that AWS_ENDPOINT_URL is its S3 API, and the bucket's policies",
    ),
    (
        "NotImplemented 501 505",
        "the service does not know this call",
        "use one that does, or a newer version of it",
    ),
    (
        "407 ProxyAuthenticationRequired",
        "the proxy wants a password",
        "put it into HTTPS_PROXY and HTTP_PROXY",
    ),
    (
        "EntityTooLarge 413",
        "the object is too large for it",
        "raise the limit of the service, or of the proxy in front of it",
    ),
    (
        "InvalidRequest ObjectLockConfigurationNotFoundError InvalidBucketState",
        "the bucket does not take this request",
        "look at its object lock, encryption and policies",
    ),
    ("InvalidBucketName", "that is no name of a bucket", "correct it"),
    ("KeyTooLongError KeyTooLong", "its name is too long", "choose a shorter prefix"),
    ("TooManyBuckets", "there are too many buckets", "delete one, or name one that exists"),
)
_REFUSALS = {code: (what, remedy) for codes, what, remedy in _GROUPS for code in codes.split()}
_KMS = ("the key that encrypts the bucket cannot be used", "look at that key's state and at who may use it")
_UNKNOWN = ("the service refuses it", f"look this code up in its documentation, or {_OWNER}")

CONNECTION_ERRORS = (
    boto_errors.HTTPClientError,  # also connection, proxy, TLS and time-out errors, which derive from it
    boto_errors.ConnectionError,
    boto_errors.IncompleteReadError,
    urllib3.exceptions.HTTPError,
    ConnectionError,
    TimeoutError,
)


class NotS3Answer(ResponseParserError):  # noqa: N818
    """A response that no S3 service gives, such as a web page."""


class UploadGone(UserError):  # noqa: N818 - the fact is the name
    """The multipart upload does not exist (any more)."""


class NoSuchRange(DamageError):  # noqa: N818
    """The object ends before the first requested byte."""


def code_of(error: boto_errors.ClientError) -> str:
    """The service's error code, or the HTTP status if it gave none."""
    return str(error.response.get("Error", {}).get("Code") or status_of(error))[:60]


def status_of(error: boto_errors.ClientError) -> int:
    """The HTTP status of a refusal."""
    return error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)


def refusal(error: boto_errors.ClientError, uri: str, bucket: str, key: str, endpoint: str) -> Exception:
    """Translate a service's error response. `endpoint`: the service's name for messages."""
    code, status, where = code_of(error), status_of(error), f"{uri}/{key}" if key else uri
    operation = error.operation_name
    if operation.startswith("AssumeRole") or operation == "GetRoleCredentials":
        return settings_error(error)
    if code == "NoSuchBucket":
        return UserError(
            f"{uri}: there is no bucket {bucket!r} at {endpoint}; "
            f"create it (aws s3 mb s3://{bucket}) or correct the name"
        )
    if code == "NoSuchUpload":
        return UploadGone(f"{where}: another process ended its upload; try again")
    if code in ("416", "InvalidRange"):
        return NoSuchRange(f"{where}: ends before the requested byte")
    if code in ("412", "PreconditionFailed"):
        what = (
            "replaced while it was being read, or since it was indexed"
            if operation in READS
            else "another process has written it meanwhile; try again"
        )
        return ObjectChanged(f"{where}: {what}")
    if _busy(code, status):
        return StoreUnreachable(f"{where}: {endpoint} is failing or too busy ({code}); try again later")
    if _is_page(error):
        return not_s3(where, endpoint, f"{status}{_destination(error)}")
    if code in MISSING_CODES and operation in READS:
        return ObjectMissing(key, where)
    # A write needs no object. A gateway on directories has deleted an empty one that was being written into.
    if code == "NoSuchKey":
        return StoreUnreachable(f"{where}: {endpoint} could not finish the request ({code}); try again later")
    if code in SECRET_CODES:
        words = _words(error) if code == "AccessDenied" else ""
        return UserError(
            f"{where}: {endpoint} refuses the keys ({code}{words}); check AWS_ACCESS_KEY_ID, "
            "AWS_SECRET_ACCESS_KEY and the bucket's permissions"
        )
    what, remedy = _KMS if code.startswith("KMS") else _REFUSALS.get(code, _UNKNOWN)
    region = _region(error)
    if remedy == _REGION and region:
        what, remedy = f"the bucket is in region {region}", f"set AWS_REGION={region}"
    kind = DiskFull if remedy == _MORE else UserError
    return kind(f"{where}: {what} ({endpoint} says {code}{_words(error)}); {remedy}")


def not_s3(where: str, endpoint: str, answer: str) -> UserError:
    """The response came from something else than an S3 service: a console, a web site, a login page."""
    return UserError(
        f"{where}: {endpoint} answers, but not as an S3 service does ({answer}); set AWS_ENDPOINT_URL to the "
        "address of its S3 API, not of its console, and look for a proxy or login page in between"
    )


def silence(error: Exception, uri: str, endpoint: str) -> UserError:
    """Translate a failed connection."""
    reason = _reason(error)
    if "CERTIFICATE_VERIFY_FAILED" in reason:
        return UserError(
            f"{uri}: {endpoint} shows a certificate that is not trusted; set AWS_CA_BUNDLE to its CA"
        )
    if "WRONG_VERSION_NUMBER" in reason:
        return UserError(f"{uri}: {endpoint} speaks no TLS; write http:// in AWS_ENDPOINT_URL")
    if "invalid path" in reason or isinstance(getattr(error, "kwargs", {}).get("error"), FileNotFoundError):
        bundle = os.environ.get("AWS_CA_BUNDLE") or os.environ.get("REQUESTS_CA_BUNDLE") or reason
        return UserError(f"{uri}: no certificates in {bundle}; correct AWS_CA_BUNDLE")
    return StoreUnreachable(
        f"{uri}: {endpoint} does not answer ({type(error).__name__}); "
        "check AWS_ENDPOINT_URL and that the service runs"
    )


def settings_error(error: Exception) -> UserError:
    """Translate unusable AWS keys or settings."""
    name, text = type(error).__name__, " ".join(str(error).split())[:MAX_MESSAGE_CHARACTERS].rstrip(".")
    if isinstance(error, (boto_errors.NoCredentialsError, boto_errors.PartialCredentialsError)):
        return UserError("no S3 keys found; set AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY or AWS_PROFILE")
    if isinstance(error, boto_errors.MetadataRetrievalError):
        return StoreUnreachable(f"AWS keys: {text}; check that the machine's own service for them runs")
    if "SSO" in name or "Token" in name:
        return UserError(f"AWS keys: {text}; sign in again (aws sso login)")
    if isinstance(error, boto_errors.ClientError):
        return UserError(f"AWS keys: {text}; check role_arn in ~/.aws/config and who may take that role")
    return UserError(f"AWS settings: {text}; check AWS_ENDPOINT_URL, AWS_PROFILE and ~/.aws/config")


def _busy(code: str, status: int) -> bool:
    known = code in BUSY_CODES or status == 429 or (status >= 500 and status not in PERMANENT_STATUSES)
    return known and code not in _REFUSALS


def _is_page(error: boto_errors.ClientError) -> bool:
    """A web page, or a redirection to one, instead of a reason in XML."""
    status = status_of(error)
    headers = error.response.get("ResponseMetadata", {}).get("HTTPHeaders", {})
    if not code_of(error).isdigit():
        return False
    return status in (302, 303) or "html" in headers.get("content-type", "") or "body" in error.response


def _destination(error: boto_errors.ClientError) -> str:
    place = error.response.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("location", "")
    host = urlsplit(place).netloc.rpartition("@")[2]
    return f", sent on to {host}" if host else ", a web page"


def _region(error: boto_errors.ClientError) -> str:
    headers = error.response.get("ResponseMetadata", {}).get("HTTPHeaders", {})
    found: object = error.response.get("Error", {}).get("Region") or headers.get("x-amz-bucket-region")
    return found if isinstance(found, str) and re.fullmatch(r"[a-z0-9-]{1,40}", found) else ""


def _words(error: boto_errors.ClientError) -> str:
    words = " ".join(str(error.response.get("Error", {}).get("Message") or "").split())
    return f": {words[:MAX_MESSAGE_CHARACTERS].rstrip('.')}" if words else ""


def _reason(error: Exception) -> str:
    inner = getattr(error, "kwargs", {}).get("error") or error
    return f"{type(inner).__name__}: {inner}"
