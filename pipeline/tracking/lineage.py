"""What a run is made from: data sets, models, and the code that ran."""

import getpass
import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

from pipeline.telemetry.redaction import redact
from pipeline.tracking.connect import retry_requests, tracking_client
from pipeline.tracking.registry import ModelVersion
from pipeline.tracking.run import set_tags

SOURCE_VARIABLE = "DDPM_SOURCE_TAGS"
_MAX_DIGEST = 36  # the server's limit; the whole digest is in the profile


@retry_requests("data set of a run")
def log_dataset(
    run_id: str,
    name: str,
    dataset_uri: str,
    digest: str,
    *,
    num_samples: int | None = None,
    context: str = "training",
    details: Mapping[str, str | int | float] | None = None,
    uri: str | None = None,
) -> None:
    """Show a data set on the run's page with its digest; logging it again changes nothing."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    scheme = urlsplit(dataset_uri).scheme
    profile = {"digest": digest, "num_samples": num_samples, **(details or {})}
    dataset = Dataset(
        name=name,
        digest=digest.removeprefix("sha256:")[:_MAX_DIGEST],
        source_type="s3" if scheme == "s3" else "local",
        source=json.dumps({"uri": redact(dataset_uri)}),
        profile=json.dumps({k: v for k, v in profile.items() if v is not None}),
    )
    inputs = [DatasetInput(dataset, tags=[InputTag("mlflow.data.context", context)])]
    tracking_client(uri).log_inputs(run_id, datasets=inputs)


@retry_requests("model of a run")
def link_model(run_id: str, version: ModelVersion, *, uri: str | None = None) -> None:
    """Tie a run to the registered version it uses: tags that lead to it everywhere, and an input on the run's
    page where model and run are in the same experiment (MLflow shows it only there).
    """
    from mlflow.entities import LoggedModelInput

    tags = {"ddpm.model": version.reference, "ddpm.model_sha256": version.sha256}
    if version.run_id:
        tags["ddpm.training_run"] = version.run_id
    set_tags(run_id, tags, uri=uri)
    if version.model_id is None:
        return
    client = tracking_client(uri)
    inputs = client.get_run(run_id).inputs
    if version.model_id not in {model.model_id for model in (inputs.model_inputs if inputs else ())}:
        client.log_inputs(run_id, models=[LoggedModelInput(version.model_id)])


def source_tags(directory: Path | None = None) -> dict[str, str]:
    """Tags that say who started the program and which code ran: the user, the git commit, and whether files differed
    from it (no commit outside a repository). A submitted copy of the code knows neither: the submitter says both in
    $DDPM_SOURCE_TAGS.
    """
    told = os.environ.get(SOURCE_VARIABLE)
    if told:
        return {str(name): str(value) for name, value in json.loads(told).items()}
    here = directory or Path(__file__).parent
    tags = {"mlflow.user": _user()}

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(here), *arguments], capture_output=True, text=True, timeout=10, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    if not commit:
        return tags
    changed = git("status", "--porcelain", "--untracked-files=no")
    return {**tags, "mlflow.source.git.commit": commit, "ddpm.git_dirty": "true" if changed else "false"}


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container's user without a name
        return f"uid {os.getuid()}"
