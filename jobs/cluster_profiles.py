"""Clusters by name: where each is, so that `--cluster work` is all one has to type.

~/.config/ddpm/clusters.yaml, or the file that DDPM_CLUSTERS names:

    work:
      address: https://ray.example:8265
      token_path: ~/.ray/work-token
      variables: {DDPM_ROOT: "s3://team/ddpm", MLFLOW_TRACKING_URI: "https://mlflow.example"}
"""

import difflib
import os
from collections.abc import MutableMapping
from pathlib import Path

from pydantic import Field, ValidationError

from infra.local.client_environment import environment
from infra.local.stack_state import read_state
from jobs.ray_dashboard import ADDRESS_VARIABLE, RAYS_VARIABLE, settle_address, settle_token
from jobs.runner import LOCAL
from pipeline.config.base import Settings
from pipeline.config.load import read_yaml
from pipeline.errors import UserError
from pipeline.telemetry.redaction import secret_values

FILE_VARIABLE = "DDPM_CLUSTERS"


class Cluster(Settings):
    """A Ray cluster and the services its jobs use."""

    address: str = Field(pattern=r"^https?://\S+$")
    """The dashboard's address, which is the job server's."""
    token_path: Path | None = None
    """File with the token; None = RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH as they are."""
    variables: dict[str, str] = Field(default_factory=dict)
    """Where its jobs find store and MLflow: DDPM_ROOT, AWS_ENDPOINT_URL, MLFLOW_TRACKING_URI. No keys."""


def use_cluster(name: str | None, environ: MutableMapping[str, str] = os.environ) -> None:
    """Point this process at a cluster, given by its name or its dashboard's address; None: the one that the
    environment names.

    The local stack's variables go: its keys are not for others. UserError for a name that is not known.
    """
    if name is None:
        return settle_address(environ)
    cluster = Cluster(address=name) if name.startswith(("http://", "https://")) else named(name, environ)
    if read_state(LOCAL) is not None:
        for variable, value in environment(LOCAL).items():
            if environ.get(variable) == value:
                del environ[variable]
    environ.update(cluster.variables)
    environ[ADDRESS_VARIABLE] = environ[RAYS_VARIABLE] = cluster.address
    if cluster.token_path is not None:
        environ.pop("RAY_AUTH_TOKEN", None)
        environ["RAY_AUTH_TOKEN_PATH"] = str(cluster.token_path.expanduser())
    settle_token(environ)
    return None


def named(name: str, environ: MutableMapping[str, str] = os.environ) -> Cluster:
    """The cluster of this name. UserError: there is none, or its entry is wrong."""
    file = Path(environ.get(FILE_VARIABLE) or "~/.config/ddpm/clusters.yaml").expanduser()
    known = read_yaml(file)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"known are {', '.join(map(str, known)) or 'none'}"
        raise UserError(f"--cluster {name}: not in {file}; {hint}")
    try:
        cluster = Cluster.model_validate(known[name])
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        where = ".".join(map(str, (name, *fault["loc"])))
        raise UserError(f"{file}: {where}: {fault['msg'][:1].lower()}{fault['msg'][1:]}") from None
    if secret_values(cluster.variables):
        raise UserError(
            f"{file}: {name}.variables: holds a secret; keys belong into the environment or a profile"
        )
    return cluster
