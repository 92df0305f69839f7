"""The files with which the program is deployed, written out of the package: `ddpm files ./deploy`.

They lie in the folder as in the repository, so that the paths in the documentation hold and the Dockerfile finds what
it copies.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path

from ddpm_pipeline.errors import UserError
from ddpm_pipeline.installation import LOCKS, PACKAGE
from ddpm_pipeline.jobs.config_docs import schema_text
from ddpm_pipeline.jobs.runner import DONE
from ddpm_pipeline.jobs.staging import program_files
from ddpm_pipeline.telemetry.terminal import echo

DATA = (
    "infra/docker/.gitignore",
    "infra/docker/Dockerfile*",
    "infra/docker/*.yaml",
    "infra/docker/ddpm",
    "infra/docker/mlflow.lock",
    "infra/docker/secrets.sh",
    "infra/grafana/alerts.yaml",
    "infra/grafana/dashboard.json",
    "infra/kuberay/base/*.yaml",
    "infra/kuberay/components/*/*.yaml",
    "infra/kuberay/overlays/*/*.yaml",
    "infra/policies/README.md",
    "infra/policies/*.json",
    "infra/systemd/*.service",
    "infra/systemd/*.timer",
    "infra/tracking/plugin/*.dist-info/*",
    "locks/*.lock",
)
"""Files of the package that are written beside the program's own, as pyproject.toml's package-data lists them."""
SCHEMA = "docs/schema/settings.json"
PARTS = {
    "infra/kuberay": "Kubernetes manifests: kubectl apply -k infra/kuberay/overlays/dev",
    "infra/docker": "images and a compose file: docker build -f infra/docker/Dockerfile .",
    "infra/grafana": "dashboard and alerts",
    "infra/policies": "S3 policies, one for each role",
    "infra/systemd": "units for a machine of its own",
    SCHEMA: "the schema with which editors check settings files",
    "requirements.lock": "the tested versions of all dependencies",
    "pipeline": "the program, which the Dockerfile copies; with jobs and infra",
}
"""What is in the folder, for people."""


def write_files(folder: Path) -> int:
    """Write everything into `folder`, which is new or empty, and print what there is. UserError when it cannot be."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: exists and is not an empty folder; name one that is empty or new")
    try:
        for source, target in deployment_files():
            _copy(source, folder / target)
        (folder / SCHEMA).parent.mkdir(parents=True)
        (folder / SCHEMA).write_text(schema_text(), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror}); name another folder") from None
    echo(*(f"{name:<26} {about}" for name, about in PARTS.items()))
    echo(f"next     cd {folder}, then as docs/operations.md and docs/kubernetes.md say")
    return DONE


def deployment_files() -> Iterator[tuple[Path, str]]:
    """Every file but the schema, with its path below the folder."""
    for source, target in program_files():
        yield source, _in_repository(target)
    for pattern in DATA:
        for source in sorted(PACKAGE.glob(pattern)):
            yield source, _in_repository(source.relative_to(PACKAGE).as_posix())
    for lock in LOCKS:
        yield lock, lock.name


def _in_repository(path: str) -> str:
    """Where a file of the package lies in the repository."""
    return path if path.startswith(("jobs/", "infra/")) else f"pipeline/{path}"


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(source, target)
