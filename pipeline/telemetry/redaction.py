"""Masking of secrets in everything that goes to the tracking server, a log or a terminal."""

import os
import re
from collections.abc import Mapping
from typing import Any, overload

MASK = "[redacted]"

_SECRET_NAME = re.compile(
    r"(?i)(^|[_\-.\s/])(password|passwd|passphrase|secret|token|credentials?|authorization"
    r"|api[_\-]?key|access[_\-]?key([_\-]?id)?|private[_\-]?key|signing[_\-]?key|session[_\-]?key)s?$"
)
_SECRET_TEXT = (
    # user:password@ in an address, up to the last @: passwords with / or @ in them are met unencoded. A colon before a
    # port is none of that: http://host:5000/models/name@champion stays.
    (re.compile(r"(?<=://)[^\s/@:'\"\[]*:(?!\d{1,5}(?:[/?#]|$))[^\s'\"]+(?=@)"), MASK),
    # signed addresses: of S3 (both versions), Google and Azure
    (
        re.compile(
            r"(?i)(\b(?:x-(?:amz|goog)-(?:signature|credential|security-token)|signature|sig|awsaccesskeyid)=)[^\s&'\"]+"
        ),
        rf"\1{MASK}",
    ),
    (re.compile(r"(?i)\b(bearer|basic)\s+[A-Za-z0-9+/_\-.=]{12,}"), rf"\1 {MASK}"),
    (re.compile(r"\b(AKIA|ASIA)[0-9A-Z]{16}\b"), MASK),
    (re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.S), MASK),
    (
        re.compile(
            r"(?i)((?:password|passwd|secret(?:_access)?_key|secret|token|api_?key|access_?key(?:_id)?)"
            r"[\"']?\s*[:=]\s*[\"']?)(?!null\b|None\b|\[redacted\])([^\s\"',}&]{4,})"
        ),
        rf"\1{MASK}",
    ),
)
_MIN_SECRET_LENGTH = 8  # shorter values would mask ordinary words and numbers


def secret_values(environ: Mapping[str, str] | None = None) -> tuple[str, ...]:
    """Values of the environment variables whose names say they are secret, longest first."""
    variables = os.environ if environ is None else environ
    found = {v for k, v in variables.items() if _SECRET_NAME.search(k) and len(v) >= _MIN_SECRET_LENGTH}
    return tuple(sorted(found, key=len, reverse=True))


@overload
def redact(value: str) -> str: ...
@overload
def redact(value: Mapping[str, Any]) -> dict[str, Any]: ...
@overload
def redact(value: list[Any]) -> list[Any]: ...
def redact(value: Any) -> Any:
    """A copy of `value` (text, or a mapping or list of anything) with every recognized secret masked.

    Masked are: values under names such as `password` or `AWS_SECRET_ACCESS_KEY`, user:password in URLs,
    bearer and basic credentials, AWS key ids, private keys, `name=value` pairs with such a name inside text,
    and any appearance of a value that a secret environment variable of this process holds.
    """
    return _redact(value, secret_values())


def _redact(value: Any, secrets: tuple[str, ...]) -> Any:
    if isinstance(value, str):
        return _redact_text(value, secrets)
    if isinstance(value, Mapping):
        return {k: MASK if _is_secret_entry(k, v) else _redact(v, secrets) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_redact(item, secrets) for item in value]
    return value


def _is_secret_entry(name: Any, value: Any) -> bool:
    # A missing or structured value is no secret itself; its contents are checked separately.
    return bool(_SECRET_NAME.search(str(name))) and isinstance(value, (str, bytes)) and len(value) > 0


def _redact_text(text: str, secrets: tuple[str, ...]) -> str:
    for secret in secrets:
        text = text.replace(secret, MASK)
    for pattern, replacement in _SECRET_TEXT:
        text = pattern.sub(replacement, text)
    return text
