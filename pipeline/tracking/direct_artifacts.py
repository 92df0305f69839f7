"""Artifacts that clients of `mlflow server --no-serve-artifacts` write to S3 themselves: failures in one line.

MLflow's client calls boto for them and passes on whatever boto raises; the store's errors say cause and remedy.
"""

import os
import tempfile
import uuid
from collections.abc import Callable, Generator
from contextlib import contextmanager
from urllib.parse import urlsplit

from ddpm_pipeline.errors import Outage, UserError
from ddpm_pipeline.telemetry.redaction import redact
from ddpm_pipeline.tracking.connect import ArtifactsDeniedError, configure_client, experiments

ENDPOINT_VARIABLE = "MLFLOW_S3_ENDPOINT_URL"
"""Names the S3 service of MLflow's artifacts, where it is another one than the data's."""


@contextmanager
def direct_artifacts(place: Callable[[], str]) -> Generator[None]:
    """Around calls of MLflow's client that read or write artifacts: what S3 refuses is an ArtifactsDeniedError that
    names `place()`, their address, and an S3 that does not answer an Outage. Other failures stay as they are.
    """
    try:
        yield
    except Exception as error:
        told = _told(error, place)
        if told is None:
            raise
        raise told from error


def _told(error: Exception, place: Callable[[], str]) -> UserError | None:
    """What the failure of boto behind an error says; None where it is none."""
    import boto3
    from botocore.exceptions import BotoCoreError, ClientError

    from ddpm_pipeline.store.interface import ObjectMissing
    from ddpm_pipeline.store.s3_client import endpoint
    from ddpm_pipeline.store.s3_errors import CONNECTION_ERRORS, refusal, settings_error, silence

    found: BaseException | None = error
    while found is not None and not isinstance(found, (BotoCoreError, ClientError)):
        found = found.__cause__ or found.__context__
    if found is None:
        return None
    address = redact(place())
    service = redact(os.environ.get(ENDPOINT_VARIABLE, "")) or endpoint()
    what = f"MLflow's artifacts at {address}, which its clients store themselves"
    if isinstance(found, ClientError):
        told = refusal(found, what, urlsplit(address).netloc, "", service)
    elif isinstance(found, CONNECTION_ERRORS):
        told = silence(found, what, service)
    else:
        told = settings_error(found)
        told = type(told)(f"{what}: {told}")
    if not isinstance(told, UserError) or isinstance(told, ObjectMissing):
        return None
    if not isinstance(told, Outage):
        boto3.setup_default_session()  # MLflow's, with its keys: a later attempt reads what was renewed meanwhile
    kind = Outage if isinstance(told, Outage) else ArtifactsDeniedError
    return kind(f"{told}, and {ENDPOINT_VARIABLE} if they are on another S3 service than the data")


def artifact_location(uri: str, timeout_seconds: float = 5.0) -> str:
    """Where the server at `uri` has the artifacts of the experiment that changed last; empty where it has none.

    Raises UserError as `require_server` does.
    """
    found = experiments(uri, timeout_seconds)
    return str(found[0].get("artifact_location") or "") if found else ""


def try_direct_artifacts(location: str, write: bool = False) -> None:
    """List something at a location in S3 as MLflow's client does; with `write`, also store and delete a small object.

    Raises ArtifactsDeniedError or Outage.
    """
    configure_client()
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    folder = f"ddpm-doctor-{uuid.uuid4().hex[:12]}"
    with direct_artifacts(lambda: location), tempfile.NamedTemporaryFile(suffix=".txt") as file:
        artifacts = get_artifact_repository(location)
        artifacts.list_artifacts(folder)
        if write:
            artifacts.log_artifact(file.name, folder)
            artifacts.delete_artifacts(folder)
