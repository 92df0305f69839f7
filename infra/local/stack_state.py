"""What the stack remembers between two commands: `stack.json`, written atomically, and a lock beside it."""

import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from ddpm_pipeline.config.base import Settings
from ddpm_pipeline.errors import UserError
from ddpm_pipeline.infra.local.processes import ProcessIdentity
from ddpm_pipeline.private_files import private_folder, private_lock, read_private, require_own

_MOST_BYTES = 1 << 20
STATE_FILES = ("stack.json", "stack.json.new", "stack.lock")
"""What this module writes into the stack's folder."""
StoreKind = Literal["s3", "file"]


class ServiceRecord(Settings):
    """One started service."""

    identity: ProcessIdentity
    """Its leading process."""
    fingerprint: str
    """Digest of the command and settings it was started with; another digest means: start it again."""


class State(Settings):
    """Everything that is remembered."""

    store: StoreKind = "s3"
    """Where data goes: an S3 gateway, or plain files."""
    num_cpus: int | None = None
    """Logical CPUs of the Ray head; None is as many as the machine has, at least two."""
    ports: dict[str, int] = Field(default_factory=dict)
    """Port by its name, kept over restarts."""
    external: tuple[str, ...] = ()
    """Services that are the user's own (by environment variables) and that the stack does not run."""
    schedule: tuple[str, ...] = ()
    """Words of the `ddpm schedule` that runs with the stack: a preset, settings, options. None by default."""
    services: dict[str, ServiceRecord] = Field(default_factory=dict)
    """What was started, by service name."""


def read_state(root: Path) -> State | None:
    """The remembered state, or None where no stack has ever been.

    UserError where another user may have written it: it decides which processes are ended and where passwords are sent.
    """
    path = root / "stack.json"
    try:
        require_own(root)
        return State.model_validate_json(read_private(path, _MOST_BYTES))
    except FileNotFoundError:
        return None
    except ValidationError as error:
        raise UserError(f"{path} cannot be read ({error.error_count()} errors): move it away") from error


def write_state(root: Path, state: State) -> None:
    """Replace the remembered state in one step."""
    path = root / "stack.json"
    draft = path.with_suffix(".json.new")
    with draft.open("w") as file:
        file.write(state.model_dump_json(indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)


@contextmanager
def locked(root: Path) -> Generator[None]:
    """Hold the stack's lock, so that two commands at once do not start everything twice."""
    private_folder(root)
    with private_lock(root / "stack.lock"):
        yield


def own_root(root: Path) -> Path:
    """The stack's folder as an absolute path without links. UserError when it is another user's."""
    named = root.expanduser()
    if named.is_symlink() or named.exists():
        require_own(named)
    return named.resolve()
