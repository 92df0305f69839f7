"""The MLflow server: SQLite under the stack's root, artifacts through the server into the object store.

It asks for a password even on loopback, where any user of the machine could otherwise have it run commands as ours.
"""

import sys
from collections.abc import Mapping
from pathlib import Path

from ddpm_pipeline.infra.local import service
from ddpm_pipeline.infra.local.credentials import mlflow_users_path
from ddpm_pipeline.infra.local.service import Service
from ddpm_pipeline.infra.tracking.app import USERS_VARIABLE

PORTS = ("mlflow",)


def mlflow_service(
    root: Path, home: Path, ports: dict[str, int], artifacts: str, s3: Mapping[str, str]
) -> Service:
    """The tracking server and registry on 127.0.0.1.

    `home` holds its database; `artifacts` is the URI it stores artifacts under; `s3` are the variables that
    open this store. Only the server gets them from here: MLflow's clients need its URL and password alone.
    """
    url = f"http://127.0.0.1:{ports['mlflow']}"
    argv = [
        sys.executable,
        "-m",
        "ddpm_pipeline.infra.tracking",
        "--host",
        "127.0.0.1",
        "--port",
        str(ports["mlflow"]),
    ]
    argv += ["--workers", "1", "--backend-store-uri", f"sqlite:///{home / 'mlflow.db'}"]
    argv += ["--artifacts-destination", artifacts]
    own = {
        # The job consumers are 13 processes for features this project does not use.
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        USERS_VARIABLE: str(mlflow_users_path(root)),
    }
    endpoint = {"MLFLOW_S3_ENDPOINT_URL": s3["AWS_ENDPOINT_URL"]} if "AWS_ENDPOINT_URL" in s3 else {}
    return Service(
        name="mlflow",
        argv=tuple(argv),
        settings={**s3, **endpoint, **own},
        url=url,
        log=root / "logs" / "mlflow.log",
        ports=PORTS,
        is_ready=lambda: service.get(f"{url}/health") == b"OK",
        start_seconds=180,
        prepare=lambda: home.mkdir(parents=True, exist_ok=True),
        # With a server's address or a password in its environment, the server would be its own client.
        unset=(
            "MLFLOW_TRACKING_URI",
            "MLFLOW_REGISTRY_URI",
            "MLFLOW_TRACKING_USERNAME",
            "MLFLOW_TRACKING_PASSWORD",
        ),
    )
