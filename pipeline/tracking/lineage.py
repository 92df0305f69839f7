"""Lineage of a run: data sets, models, and the code that ran."""

import getpass
import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

from ddpm_pipeline.telemetry.redaction import redact
from ddpm_pipeline.tracking.connect import retry_requests, tracking_client
from ddpm_pipeline.tracking.registry import ModelVersion
from ddpm_pipeline.tracking.run import set_tags

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
    """Log a data set with its digest on the run's page; logging it again changes nothing."""
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
    """Link a run to the registered version it uses: by tags, and as an input on the run's page if model and run are in
    the same experiment (MLflow shows it only then).
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
    """Tags for the user who started the program, the git commit, and whether files differed from it (no commit where
    the program is installed outside its repository). A submitted copy of the code knows neither: the submitter passes
    them in $DDPM_SOURCE_TAGS.
    """
    submitted = os.environ.get(SOURCE_VARIABLE)
    if submitted:
        return {str(name): str(value) for name, value in json.loads(submitted).items()}
    folder = directory or Path(__file__).parent
    tags = {"mlflow.user": _user()}

    def git(*arguments: str) -> str | None:
        try:
            result = subprocess.run(
                ["git", "-C", str(folder), *arguments],
                capture_output=True,
                text=True,
                timeout=10,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return result.stdout.strip() if result.returncode == 0 else None

    # An environment inside somebody's repository is not part of it: git must know the file itself.
    own = git("ls-files", "--error-unmatch", Path(__file__).name) if directory is None else "."
    commit = git("rev-parse", "HEAD") if own else None
    if not commit:
        return tags
    changed = git("status", "--porcelain", "--untracked-files=no")
    return {**tags, "mlflow.source.git.commit": commit, "ddpm.git_dirty": "true" if changed else "false"}


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container's user without a name
        return f"uid {os.getuid()}"
