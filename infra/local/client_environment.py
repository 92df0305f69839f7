"""The variables that point programs at the stack, and the respect for those a user has set."""

import os
import shlex
from collections.abc import Collection, Mapping, MutableMapping
from pathlib import Path

from ddpm_pipeline.errors import UserError
from ddpm_pipeline.infra.local import ports, processes, ray, s3_gateway, service
from ddpm_pipeline.infra.local.credentials import (
    MLFLOW_USER,
    mlflow_password,
    mlflow_password_path,
    ray_token_path,
    s3_keys,
)
from ddpm_pipeline.infra.local.stack_state import State, own_root, read_state

REPLACED_WITH_S3 = (
    "AWS_PROFILE",
    "AWS_SESSION_TOKEN",
    "AWS_ENDPOINT_URL_S3",
)  # they would win over our keys
REPLACED_WITH_MLFLOW = ("MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_AUTH")
REPLACED_WITH_RAY = ("RAY_AUTH_TOKEN",)
_SENT_SECRETS = {"mlflow": ("mlflow",), "ray": ("ray", "ray-dashboard")}
"""Ports of each service to which clients send its password or token. S3's clients send signatures only."""


def environment(root: Path) -> dict[str, str]:
    """The variables of the stack under `root`: S3, MLflow, Ray and DDPM_ROOT.

    Without services that are the user's own. Raises UserError if no stack has been started.
    """
    state = read_state(own_root(root))
    if state is None:
        raise UserError(f"no local stack under {root}: start it with `ddpm up`")
    return client_variables(root.resolve(), state)


def export_environment(root: Path, environ: MutableMapping[str, str] = os.environ) -> dict[str, str]:
    """Put the stack's variables into `environ`, except for services that the user set in it; return them.

    UserError where another program has taken the port of a service, and would be sent its password.
    """
    variables = environment(root)
    own = users_own(environ, variables)
    state = read_state(own_root(root)) or State()
    outside = external_services(own)
    require_own_ports(state, {*outside, *state.external})
    chosen = variables
    for name, prefixes in (("s3", ("AWS_",)), ("mlflow", ("MLFLOW_",)), ("ray", ("RAY_",))):
        if name in outside:
            chosen = {key: value for key, value in chosen.items() if not key.startswith(prefixes)}
    if "DDPM_ROOT" in own:
        chosen = {key: value for key, value in chosen.items() if key != "DDPM_ROOT"}
    replaced = (*(REPLACED_WITH_S3 if "AWS_ENDPOINT_URL" in chosen else ()),)
    replaced += REPLACED_WITH_MLFLOW if "MLFLOW_TRACKING_URI" in chosen else ()
    replaced += REPLACED_WITH_RAY if "RAY_ADDRESS" in chosen and "ray" not in state.external else ()
    for name in replaced:
        environ.pop(name, None)
    environ.update(chosen)
    environ.update(service.without_proxy(environ))
    return chosen


def require_own_ports(state: State, external: Collection[str] = ()) -> None:
    """UserError if a remembered port is held by a program that the stack did not start: the service ended and the port
    was taken since. Services in `external` are not checked.
    """
    for name, port_names in _SENT_SECRETS.items():
        if name in external or not state.ports:
            continue
        held = {port for port in map(state.ports.__getitem__, port_names) if not ports.is_free(port)}
        record = state.services.get(name)
        foreign = held if record is None else processes.without_listener(record.identity, held)
        if foreign:
            raise UserError(
                f"port {min(foreign)} of the local stack's {name} is held by another program, which would be sent its "
                "password: run `ddpm down` and `ddpm up`, which chooses another port"
            )


def client_variables(root: Path, state: State) -> dict[str, str]:
    """As `environment`, for a state at hand."""
    variables = dict(s3_variables(root, state))
    if "mlflow" not in state.external:
        variables |= {
            "MLFLOW_TRACKING_URI": f"http://127.0.0.1:{state.ports['mlflow']}",
            "MLFLOW_TRACKING_USERNAME": MLFLOW_USER,
            "MLFLOW_TRACKING_PASSWORD": mlflow_password(root),
        }
    if "ray" not in state.external:
        dashboard = f"http://127.0.0.1:{state.ports['ray-dashboard']}"
        variables |= {
            "RAY_ADDRESS": f"127.0.0.1:{state.ports['ray']}",
            "RAY_JOB_ADDRESS": dashboard,
            "RAY_API_SERVER_ADDRESS": dashboard,  # Ray's own name for it, which its job client asks first
            **ray.LOOPBACK_SETTINGS,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(ray_token_path(root)),
        }
    return {**variables, "DDPM_ROOT": data_root(root, state)}


def cluster_variables(root: Path, address: str) -> dict[str, str]:
    """The variables that workers of the Ray at `address` have, if it is of the stack under `root`; else none."""
    state = read_state(own_root(root))
    record = None if state is None else state.services.get("ray")
    if state is None or record is None or address != f"127.0.0.1:{state.ports.get('ray')}":
        return {}
    return processes.variables(record.identity)


def sign_in(root: Path) -> list[str]:
    """A line for each of the stack's web pages that needs a login: its address, and the command that prints the
    password or token. Never a secret itself.
    """
    root = own_root(root)
    state = read_state(root)
    if state is None or not state.ports:
        return []
    variables, lines = client_variables(root, state), list[str]()
    if "mlflow" not in state.external:
        password = shlex.quote(str(mlflow_password_path(root)))
        url = variables["MLFLOW_TRACKING_URI"]
        lines.append(f"MLflow          {url} asks for user {MLFLOW_USER} and the password: cat {password}")
    if "ray" not in state.external:
        url, token = variables["RAY_JOB_ADDRESS"], shlex.quote(str(ray_token_path(root)))
        lines.append(f"Ray dashboard   {url} asks for the token: cat {token}")
    return lines


def s3_variables(root: Path, state: State) -> dict[str, str]:
    """Address and keys of the stack's own S3 server; empty without one."""
    if state.store == "file" or "s3" in state.external:
        return {}
    keys = s3_keys(root)
    return {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{state.ports['s3']}",
        "AWS_ACCESS_KEY_ID": keys.access_key,
        "AWS_SECRET_ACCESS_KEY": keys.secret_key,
        "AWS_DEFAULT_REGION": s3_gateway.REGION,
        "AWS_REGION": s3_gateway.REGION,
        # The gateway knows no checksum trailers; pyarrow even hides its refusal of them.
        "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
        "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
    }


def data_root(root: Path, state: State) -> str:
    """Where data, checkpoints and outputs are stored unless the user names another place."""
    return f"file://{root / 'files'}" if state.store == "file" else "s3://ddpm"


def users_own(environ: Mapping[str, str], managed: Mapping[str, str]) -> dict[str, str]:
    """`environ` without what came from this stack itself (a shell that has its variables exported)."""
    return {name: value for name, value in environ.items() if managed.get(name) != value}


def external_services(own: Mapping[str, str]) -> tuple[str, ...]:
    """Services the user's variables name: those the stack does not run."""
    named = {
        "s3": own.get("AWS_ENDPOINT_URL") or own.get("AWS_ENDPOINT_URL_S3") or _s3_root(own),
        "mlflow": own.get("MLFLOW_TRACKING_URI"),
        "ray": own.get("RAY_ADDRESS") or own.get("RAY_JOB_ADDRESS") or own.get("RAY_API_SERVER_ADDRESS"),
    }
    return tuple(name for name, value in named.items() if value)


def check_ray(environ: Mapping[str, str] = os.environ) -> None:
    """Refuse an unreachable Ray or a wrong token in one line (UserError): Ray would retry for minutes."""
    url = environ.get("RAY_JOB_ADDRESS") or environ.get("RAY_API_SERVER_ADDRESS")
    if not url:
        return
    token = environ.get("RAY_AUTH_TOKEN")
    path = environ.get("RAY_AUTH_TOKEN_PATH")
    if token is None and path:
        try:
            token = Path(path).read_text()
        except OSError as error:
            raise UserError(f"RAY_AUTH_TOKEN_PATH={path} cannot be read: {error.strerror}") from error
    ray.check_cluster(url.rstrip("/"), token)


def _s3_root(own: Mapping[str, str]) -> str | None:
    root = own.get("DDPM_ROOT", "")
    return root if root.startswith("s3://") else None
