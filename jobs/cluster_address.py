"""Which Ray cluster a command uses: environment variables, or a name in clusters.yaml.

A cluster has a name in ~/.config/ddpm/clusters.yaml, or in the file that DDPM_CLUSTERS names, for `--cluster work`:

    work:
      address: https://ray.example:8265
      token_path: ~/.ray/work-token
      variables: {DDPM_ROOT: "s3://team/ddpm", MLFLOW_TRACKING_URI: "https://mlflow.example"}

Ray is not imported here: it reads how to authenticate when it is imported, so the variables must be set before.
"""

import difflib
import json
import os
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from ddpm_pipeline.config.base import Settings
from ddpm_pipeline.config.settings_files import read_yaml
from ddpm_pipeline.errors import UserError
from ddpm_pipeline.infra.local.client_environment import environment
from ddpm_pipeline.infra.local.service import get
from ddpm_pipeline.infra.local.stack_state import read_state
from ddpm_pipeline.jobs.runner import LOCAL
from ddpm_pipeline.telemetry.redaction import redact, secret_values
from ddpm_pipeline.telemetry.terminal import echo

ADDRESS_VARIABLE = "RAY_JOB_ADDRESS"
RAYS_VARIABLE = "RAY_API_SERVER_ADDRESS"
"""Ray's own name for it, which its job client obeys before any address that it is given."""
DRIVER_VARIABLE = "RAY_ADDRESS"
"""Where a driver joins (host:port); Ray's own tools also accept a dashboard's http address in it."""


def dashboard_address(environ: Mapping[str, str] = os.environ) -> str | None:
    """The dashboard's address: our variable before Ray's. None if no variable names one."""
    named = _named(environ)
    return next(iter(named.values()), None)


def settle_address(environ: MutableMapping[str, str] = os.environ) -> None:
    """Make Ray use the dashboard of `dashboard_address`; print which variables name another.

    To be called before Ray is imported. UserError for an address that is no http one.
    """
    named = _named(environ)
    if not named:
        return
    (variable, address), *others = named.items()
    if not address.startswith(("http://", "https://")):
        raise UserError(
            f"{variable} {redact(address)}: no dashboard's address; write it as http://ray.example:8265"
        )
    for other, value in others:
        if value != address:
            echo(f"note     {variable} {address} is used; {other} names {value}", error=True)
    environ[ADDRESS_VARIABLE] = environ[RAYS_VARIABLE] = address
    settle_token(environ)


def settle_token(environ: MutableMapping[str, str] = os.environ) -> None:
    """Use a token that is set, even if Ray's switch for it is not."""
    if environ.get("RAY_AUTH_TOKEN") or environ.get("RAY_AUTH_TOKEN_PATH"):
        environ.setdefault("RAY_AUTH_MODE", "token")


def ask(path: str, environ: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """What the dashboard answers to `path`; empty when it does not know or answer."""
    answer = get(f"{dashboard_address(environ)}{path}", {"Authorization": f"Bearer {_token(environ)}"})
    return json.loads(answer or b"{}")


def _named(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables that name a dashboard, the one that is obeyed first, without slashes at the end."""
    driver = environ.get(DRIVER_VARIABLE, "")
    values = {
        ADDRESS_VARIABLE: environ.get(ADDRESS_VARIABLE, ""),
        RAYS_VARIABLE: environ.get(RAYS_VARIABLE, ""),
        DRIVER_VARIABLE: driver if driver.startswith(("http://", "https://")) else "",
    }
    return {variable: value.rstrip("/") for variable, value in values.items() if value}


def _token(environ: Mapping[str, str]) -> str:
    path = environ.get("RAY_AUTH_TOKEN_PATH")
    return (environ.get("RAY_AUTH_TOKEN") or (Path(path).read_text() if path else "")).strip()


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

    The local stack's variables are removed: its keys are not for others. UserError for an unknown name.
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
    """The cluster of this name. UserError if it is unknown or its entry is invalid."""
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
