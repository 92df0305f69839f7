"""Secrets made once at the first start, each in a file that only its owner can read."""

import os
import secrets
from pathlib import Path

from pydantic import ValidationError

from ddpm_pipeline.config.base import Settings
from ddpm_pipeline.config.json_document import first_fault
from ddpm_pipeline.errors import UserError
from ddpm_pipeline.infra.tracking.access import user_line
from ddpm_pipeline.private_files import private_folder, read_private

MLFLOW_USER = "ddpm"
"""The local MLflow's one user."""
_LONGEST_PASSWORD_BYTES = 4096


class S3Keys(Settings):
    """The gateway's one account."""

    access_key: str
    """Sent as AWS_ACCESS_KEY_ID."""
    secret_key: str
    """Sent as AWS_SECRET_ACCESS_KEY."""


def s3_keys(root: Path) -> S3Keys:
    """The gateway's keys; made at the first call."""
    path = root / "secrets" / "s3.json"
    if not path.exists():
        keys = S3Keys(access_key=secrets.token_hex(10).upper(), secret_key=secrets.token_urlsafe(30))
        _write_private(path, keys.model_dump_json(indent=2))
    try:
        return S3Keys.model_validate_json(read_private(path, 1 << 16))
    except ValidationError as error:
        raise UserError(
            f"{path}: holds no keys ({first_fault(error)}); remove it, and start the stack again"
        ) from None


def ray_token_path(root: Path) -> Path:
    """The file with the cluster's token; made at the first call."""
    path = root / "secrets" / "ray-token"
    if not path.exists():
        _write_private(path, secrets.token_hex(32))
    return path


def mlflow_password_path(root: Path) -> Path:
    """The file with the password of MLflow's user `MLFLOW_USER`; made at the first call."""
    path = root / "secrets" / "mlflow-password"
    if not path.exists():
        _write_private(path, secrets.token_hex(32))
    return path


def mlflow_password(root: Path) -> str:
    """The stack's MLflow password. UserError if its file belongs to another user."""
    return read_private(mlflow_password_path(root), _LONGEST_PASSWORD_BYTES).decode().strip()


def mlflow_users_path(root: Path) -> Path:
    """The file from which the MLflow server knows its one user: without the password itself."""
    path = root / "secrets" / "mlflow-users"
    _write_private(path, user_line(MLFLOW_USER, "admin", mlflow_password(root)))
    return path


def _write_private(path: Path, text: str) -> None:
    private_folder(path.parent)
    draft = path.with_name(path.name + ".new")
    draft.unlink(missing_ok=True)
    with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)
