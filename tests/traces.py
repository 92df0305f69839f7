"""What the tests of a session leave behind: secrets in files, and processes."""

import os
from collections.abc import Iterator
from pathlib import Path

import psutil

from ddpm_pipeline.infra.local import LocalStack, processes
from ddpm_pipeline.infra.local.credentials import mlflow_password_path, ray_token_path, s3_keys
from ddpm_pipeline.infra.local.ray import temp_dir
from ddpm_pipeline.infra.local.stack_state import State, read_state


def own_secrets(stack: LocalStack) -> dict[str, str]:
    """The secrets that every process of a stack works with, by what they are."""
    return {
        "S3 secret key": s3_keys(stack.root).secret_key,
        "Ray token": ray_token_path(stack.root).read_text().strip(),
        "MLflow password": mlflow_password_path(stack.root).read_text().strip(),
    }


def require_no_secret(stack: LocalStack) -> None:
    """Fail where a file of the stack holds one of its secrets: logs, runs, objects, records."""
    secrets, spared = own_secrets(stack), stack.root / "secrets"
    files = [file for place in (stack.root, temp_dir(stack.root)) for file in left_behind(place, spared)]
    assert [f"{name} in {file}" for file in files for name in secrets_in(file, secrets)] == []


def require_end(stack: LocalStack) -> None:
    """End a stack; fail where one of its processes lives on."""
    state = read_state(stack.root) or State()
    of_stack = [one for record in state.services.values() for one in processes.family(record.identity)]
    stack.down()
    assert [process for process in of_stack if _lives(process)] == []


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def left_behind(place: Path, spared: Path) -> Iterator[Path]:
    """Every file below a place, but not the folder that keeps the secrets, and nothing through links."""
    for folder, folders, names in os.walk(place):
        folders[:] = [name for name in folders if Path(folder, name) != spared]
        yield from (
            file for name in names if (file := Path(folder, name)).is_file() and not file.is_symlink()
        )


def secrets_in(file: Path, secrets: dict[str, str]) -> list[str]:
    """Names of the secrets that a file holds."""
    try:
        content = file.read_bytes()
    except OSError:  # gone meanwhile: the servers are running
        return []
    return [name for name, secret in secrets.items() if secret.encode() in content]
