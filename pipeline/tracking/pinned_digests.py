"""Pinned digests of what a registered model is evaluated with, stored as tags of the model.

Otherwise anyone who may write beside a data set (a feature network, a measured reference) could decide which model is
champion. The first job that evaluates a model records the digests; from then on a changed one is rejected until
somebody confirms the change (`ddpm features trust`).
"""

import hashlib
import logging
import time

from pydantic import Field

from ddpm_pipeline.config.base import Settings
from ddpm_pipeline.config.json_document import parse_document
from ddpm_pipeline.errors import UserError
from ddpm_pipeline.tracking.connect import retry_requests, tracking_client

_log = logging.getLogger(__name__)


class Trusted(Settings):
    """One pinned digest, as its tag stores it."""

    uri: str = Field(max_length=4096)
    """Its URI in settings."""
    digest: str = Field(pattern=r"^[0-9a-f]{64}$")
    """Of the content at its first use."""
    at: float = Field(ge=0, lt=1e11)
    """Seconds since 1970 (UTC)."""


def require_trusted(model: str, what: str, uri: str, digest: str) -> None:
    """UserError unless `digest` is the one pinned for `model` and this URI; the first use pins it.

    `what`: its kind, for the tag and messages, such as "feature network".
    """
    known = trusted(model, what, uri)
    if known is None:
        trust(model, what, uri, digest)
        _log.warning("%s: %s is the %s of model %s from now on (first use)", uri, digest[:12], what, model)
        known = trusted(model, what, uri)  # another job may have been the first at the same moment
    if known is None or known.digest != digest:
        since = "" if known is None else f" since {time.strftime('%F %T', time.gmtime(known.at))}Z"
        was = "unknown" if known is None else known.digest[:12]
        raise UserError(
            f"{uri}: its digest is {digest[:12]}, and the {what} by which model {model} is judged{since} has {was}; "
            "if it was changed on purpose: ddpm features trust PRESET"
        )


@retry_requests("the model registry")
def trusted(model: str, what: str, uri: str) -> Trusted | None:
    """The pinned digest, or None. UserError when there is no such model, DamageError for an invalid tag."""
    from mlflow.exceptions import MlflowException

    try:
        tags = dict(tracking_client().get_registered_model(model).tags)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        raise UserError(f"model {model!r}: not in the registry; train it first") from None
    key = _key(what, uri)
    if key not in tags:
        return None
    where = f"model {model!r}: tag {key}"
    return parse_document(Trusted, tags[key].encode(), where, "a digest; run ddpm features trust PRESET")


@retry_requests("the model registry")
def trust(model: str, what: str, uri: str, digest: str) -> None:
    """Pin `digest`, replacing any earlier one."""
    text = Trusted(uri=uri, digest=digest, at=time.time()).model_dump_json()
    tracking_client().set_registered_model_tag(model, _key(what, uri), text)


def _key(what: str, uri: str) -> str:
    """The tag for a URI, hashed because tags allow fewer characters."""
    return f"ddpm.trust.{what.replace(' ', '-')}.{hashlib.sha256(uri.encode()).hexdigest()[:16]}"
