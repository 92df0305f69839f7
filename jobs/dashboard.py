"""Where the web pages of Ray and MLflow are, and where what they ask for is kept: `ddpm dashboard`."""

import os
import shlex
import webbrowser
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from ddpm_pipeline.errors import UserError
from ddpm_pipeline.infra.local import environment
from ddpm_pipeline.infra.local.credentials import mlflow_password_path
from ddpm_pipeline.infra.local.stack_state import read_state
from ddpm_pipeline.jobs.cluster_address import dashboard_address, use_cluster
from ddpm_pipeline.jobs.runner import DONE, FAILED, LOCAL
from ddpm_pipeline.telemetry.redaction import redact
from ddpm_pipeline.telemetry.terminal import echo, echo_json


@dataclass(frozen=True)
class Page:
    """A web page of a service."""

    service: str
    url: str
    user: str | None
    """Name to sign in with; None where a token or nothing is asked for."""
    secret: str | None
    """Command that prints the token or password; None where this environment has none."""

    @property
    def asks_for(self) -> str:
        """What to type, and where it is."""
        if self.secret is None:
            return "asks for nothing that this environment knows"
        what = "the token" if self.user is None else f"user {self.user} and a password"
        return f"asks for {what}; this prints it: {self.secret}"


def dashboard(cluster: str | None = None, open_pages: bool = False, as_json: bool = False) -> int:
    """Print the pages of the cluster and of MLflow; with `open_pages`, also open them in this machine's browser.

    UserError where no variable and no local stack names any. Exit code 1 where no browser could be started.
    """
    use_cluster(cluster)
    pages = pages_of(os.environ)
    if not pages:
        raise UserError(
            "no dashboard: neither RAY_JOB_ADDRESS nor MLFLOW_TRACKING_URI names one; start the local stack with "
            "`ddpm up`, or name a cluster by --cluster"
        )
    if as_json:
        echo_json([asdict(page) for page in pages])
    else:
        echo(*(f"{page.service:<8} {page.url}  {page.asks_for}" for page in pages))
    if not open_pages:
        return DONE
    opened = [webbrowser.open(page.url) for page in pages]
    if not all(opened):
        echo("note     no browser could be started here; open the addresses above in yours", error=True)
    return DONE if all(opened) else FAILED


def pages_of(environ: Mapping[str, str]) -> list[Page]:
    """The pages that these variables name. Contains no secret."""
    pages: list[Page] = []
    ray = dashboard_address(environ)
    if ray is not None:
        path, token = environ.get("RAY_AUTH_TOKEN_PATH"), environ.get("RAY_AUTH_TOKEN")
        command = "printenv RAY_AUTH_TOKEN" if token else f"cat {shlex.quote(path)}" if path else None
        pages.append(Page("Ray", redact(ray), None, command))
    mlflow = environ.get("MLFLOW_TRACKING_URI", "")
    if mlflow.startswith(("http://", "https://")):
        user = environ.get("MLFLOW_TRACKING_USERNAME")
        pages.append(
            Page("MLflow", redact(mlflow), user, None if user is None else _password_command(environ))
        )
    return pages


def _password_command(environ: Mapping[str, str]) -> str | None:
    password = environ.get("MLFLOW_TRACKING_PASSWORD")
    if password is None:
        return None
    if read_state(LOCAL) is not None and environment(LOCAL).get("MLFLOW_TRACKING_PASSWORD") == password:
        return f"cat {shlex.quote(str(mlflow_password_path(LOCAL.resolve())))}"
    return "printenv MLFLOW_TRACKING_PASSWORD"
