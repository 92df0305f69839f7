"""Who may request what from the MLflow server: users with a role each, and what a role may do.

What no rule names is refused, also to the administrator: MLflow's server has routes that run shell commands (its
assistant), forward requests to other hosts (gateway, webhooks) or start jobs, and new releases bring more of them.
"""

import base64
import binascii
import hashlib
import hmac
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Literal, cast, get_args

from ddpm_pipeline.errors import UserError

Role = Literal["viewer", "logger", "registrar", "admin"]
"""viewer: reads. logger: also creates experiments and runs and logs to them. registrar: also registers models and
moves their aliases, whose log is tags of the model. admin: also deletes."""


class Right(IntEnum):
    """What a request does; each right includes those before it."""

    READ = 0
    LOG = 1
    REGISTER = 2
    ERASE = 3


_RIGHTS: dict[Role, Right] = dict(zip(get_args(Role), Right, strict=True))
OPEN_PATH = "/health"
"""The one path that is answered without a password, for those who wait for the server."""

_PAGES = re.compile(r"/(version|get-artifact|model-versions/get-artifact|static-files/.+)?")
_ENDPOINT = re.compile(r"/(?:ajax-)?api/[23]\.0/(.+)")

_USER_LINE = re.compile(
    rf"(?P<name>[\w.@-]{{1,64}}) (?P<role>{'|'.join(get_args(Role))}) (?P<sha256>[0-9a-f]{{64}})"
)
# Families of routes that hold only records, of which this program or the web page reads some.
_READABLE = re.compile(
    r"mlflow/(experiments|runs|metrics|artifacts|logged-models|registered-models|model-versions|server-info|traces"
    r"|get-trace-artifact|ui-telemetry|datasets|issues|label-schemas|review-queues|scorers|workspaces)(/.*)?"
    r"|mlflow-artifacts/(artifacts|presigned)(/.*)?"
)
_SEARCHES = re.compile(
    r"mlflow/(experiments|runs|logged-models|traces|datasets|issues)/search"
    r"|mlflow/experiments/search-datasets|mlflow/registered-models/get-latest-versions"
    r"|mlflow/traces/(batchGetInfos|metrics|calculate-filter-correlation)"
)
_LOGS = re.compile(
    r"mlflow/experiments/(create|set-experiment-tag)"
    r"|mlflow/runs/(create|update|log-[a-z]+|set-tag|delete-tag|outputs)"
)
_REGISTERS = re.compile(
    r"mlflow/logged-models(/[\w-]+(/tags|/params)?)?"
    r"|mlflow/registered-models/(create|update|set-tag|alias)"
    r"|mlflow/model-versions/(create|update|set-tag)"
)
_ERASABLE = re.compile(
    r"mlflow/(experiments|runs|logged-models|registered-models|model-versions)/.+|mlflow-artifacts/artifacts/.+"
)
_UPLOADS = re.compile(r"mlflow-artifacts/(?:artifacts|mpu/(?:create|complete|abort))/(?P<place>.+)")


@dataclass(frozen=True)
class User:
    """A user who may log in."""

    role: Role
    """What they may do."""
    sha256: str
    """Of the password, which is long and random: no slow hash is needed, and every request computes it."""


class Users:
    """Everybody who may log in, by name."""

    def __init__(self, users: Mapping[str, User]) -> None:
        self._users = dict(users)

    def role_of(self, authorization: str | None) -> Role | None:
        """The role of the user who sent this `Authorization` header; None for a wrong password or none."""
        name, password = _credentials(authorization)
        digest = hashlib.sha256(password).hexdigest()
        user = self._users.get(name)
        known = user.sha256 if user is not None else "0" * 64
        return user.role if hmac.compare_digest(digest, known) and user is not None else None


def read_users(path: Path) -> Users:
    """The users of a file: a line each, of name, role and the password's sha256.

    Raises UserError, which names the line, where it cannot be read or names nobody.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} (MLflow's users) cannot be read: {error}") from error
    users: dict[str, User] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        match = _USER_LINE.fullmatch(line)
        if match is None or match["name"] in users:
            needed = f"a new name, a role ({', '.join(get_args(Role))}) and the sha256 of a password"
            raise UserError(f"{path} (MLflow's users), line {number}: needs {needed}")
        users[match["name"]] = User(cast("Role", match["role"]), match["sha256"])
    if not users:
        raise UserError(f"{path} (MLflow's users) names nobody, so nobody could log in")
    return Users(users)


def user_line(name: str, role: Role, password: str) -> str:
    """A line of the file that `read_users` reads."""
    return f"{name} {role} {hashlib.sha256(password.encode()).hexdigest()}\n"


def right_for(method: str, path: str) -> Right | None:
    """The right that a request needs; None for what nobody may request."""
    if method in ("GET", "HEAD") and _PAGES.fullmatch(path):
        return Right.READ
    if path == "/graphql":  # the web page's own searches; its schema changes nothing
        return Right.READ
    match = _ENDPOINT.fullmatch(path)
    endpoint = match[1] if match else ""
    if method in ("GET", "HEAD"):
        return Right.READ if _READABLE.fullmatch(endpoint) else None
    if method == "POST" and _SEARCHES.fullmatch(endpoint):
        return Right.READ
    if method == "POST" and _LOGS.fullmatch(endpoint):
        return Right.LOG
    if method in ("POST", "PATCH") and _REGISTERS.fullmatch(endpoint):
        return Right.REGISTER
    if method == "DELETE" and endpoint == "mlflow/registered-models/delete-tag":
        return Right.REGISTER
    if method in ("PUT", "POST") and (upload := _UPLOADS.fullmatch(endpoint)):
        return _right_to_upload(upload["place"])
    return Right.ERASE if _ERASABLE.fullmatch(endpoint) else None


def permits(role: Role, needed: Right | None) -> bool:
    """Whether a user of this role may make a request that needs this right."""
    return needed is not None and _RIGHTS[role] >= needed


def _right_to_upload(place: str) -> Right:
    # Experiment, run, "artifacts", file; or experiment, "models", model, "artifacts", file.
    return Right.LOG if re.match(r"\d+/[0-9a-f]{32}/artifacts/", place) else Right.REGISTER


def _credentials(authorization: str | None) -> tuple[str, bytes]:
    scheme, _, encoded = (authorization or "").partition(" ")
    if scheme.lower() != "basic":
        return "", b""
    try:
        name, _, password = base64.b64decode(encoded.strip(), validate=True).partition(b":")
        return name.decode(), password
    except (binascii.Error, UnicodeDecodeError):
        return "", b""
