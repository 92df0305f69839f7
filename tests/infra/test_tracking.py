"""MLflow behind its passwords: what nobody, and what each role, may ask its server for."""

import asyncio
import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest

from ddpm_pipeline.errors import UserError
from ddpm_pipeline.infra.local import LocalStack
from ddpm_pipeline.infra.tracking.access import (
    OPEN_PATH,
    Role,
    User,
    Users,
    permits,
    read_users,
    right_for,
    user_line,
)
from ddpm_pipeline.infra.tracking.app import PasswordGate, users_of_server

ROLES: tuple[Role, ...] = get_args(Role)
API = "/api/2.0/mlflow"
RUN = "0123456789abcdef0123456789abcdef"
LEAST = {  # the least role that may make a request; None: nobody
    ("GET", "/"): "viewer",
    ("GET", "/static-files/main.js"): "viewer",
    ("GET", "/get-artifact"): "viewer",
    ("POST", "/graphql"): "viewer",
    ("POST", f"{API}/runs/search"): "viewer",
    ("POST", "/ajax-api/3.0/mlflow/traces/search"): "viewer",
    ("GET", f"{API}/registered-models/alias"): "viewer",
    ("GET", f"{API}-artifacts/artifacts/1/{RUN}/artifacts/a.png"): "viewer",
    ("POST", f"{API}/experiments/create"): "logger",
    ("POST", f"{API}/runs/log-batch"): "logger",
    ("POST", f"{API}/runs/outputs"): "logger",
    ("POST", f"{API}/runs/delete-tag"): "logger",
    ("PUT", f"{API}-artifacts/artifacts/1/{RUN}/artifacts/a.png"): "logger",
    ("PUT", f"{API}-artifacts/artifacts/1/models/m-{RUN}/artifacts/model.safetensors"): "registrar",
    ("PUT", f"{API}-artifacts/artifacts/1%2fmodels/{RUN}/artifacts/a"): "registrar",
    ("POST", f"{API}-artifacts/mpu/create/1/{RUN}/artifacts/a"): "logger",
    ("POST", f"{API}/logged-models"): "registrar",
    ("PATCH", f"{API}/logged-models/m-1"): "registrar",
    ("POST", f"{API}/registered-models/create"): "registrar",
    ("POST", f"{API}/registered-models/alias"): "registrar",
    ("POST", f"{API}/model-versions/set-tag"): "registrar",
    ("DELETE", f"{API}/registered-models/delete-tag"): "registrar",
    ("DELETE", f"{API}/model-versions/delete-tag"): "admin",
    ("POST", f"{API}/runs/delete"): "admin",
    ("POST", f"{API}/experiments/delete"): "admin",
    ("DELETE", f"{API}/registered-models/delete"): "admin",
    ("DELETE", f"{API}/registered-models/alias"): "admin",
    ("DELETE", f"{API}-artifacts/artifacts/1/{RUN}/artifacts/a"): "admin",
    ("POST", "/ajax-api/3.0/mlflow/assistant/message"): None,
    ("GET", "/ajax-api/3.0/mlflow/assistant/config"): None,
    ("GET", "/ajax-api/2.0/mlflow/gateway-proxy"): None,
    ("POST", "/gateway/x/mlflow/invocations"): None,
    ("POST", f"{API}/webhooks"): None,
    ("POST", "/ajax-api/3.0/jobs/"): None,
    ("POST", "/v1/traces"): None,
    ("POST", "/api/3.0/mlflow/scorers/register"): None,
    ("GET", "/api/9.0/mlflow/runs/get"): None,
    ("POST", "/mlflow/runs/search"): None,
    ("GET", "//"): None,
}


USERS = Users({role: User(role, hashlib.sha256(f"{role}-word".encode()).hexdigest()) for role in ROLES})


def basic(name: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{name}:{password}".encode()).decode()


async def behind(scope: Any, receive: Any, send: Any) -> None:
    """What stands behind the gate: tells the body it was given."""
    body = (await receive())["body"] if scope["type"] == "http" else b""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"passed " + body})


def ask(
    method: str, path: str, authorization: str | None = None, body: bytes = b"", kind: str = "http"
) -> tuple[int, bytes]:
    """Status and body of the gate's answer; 0 where it closes a WebSocket."""
    headers = [(b"x-forwarded-for", b"127.0.0.1"), (b"host", b"localhost")]
    headers += [(b"authorization", authorization.encode())] if authorization else []
    scope = {"type": kind, "method": method, "path": path, "headers": headers, "client": ("127.0.0.1", 1)}
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Any) -> None:
        sent.append(dict(message))

    asyncio.run(PasswordGate(behind, USERS)(scope, receive, send))
    if sent[0]["type"] == "websocket.close":
        return 0, b""
    return sent[0]["status"], b"".join(m.get("body", b"") for m in sent[1:])


@pytest.mark.parametrize(("method", "path"), LEAST)
def test_a_request_needs_a_role_that_may_make_it(method: str, path: str) -> None:
    least = LEAST[method, path]
    needed = right_for(method, path)
    able = [role for role in ROLES if permits(role, needed)]
    assert able == (list(ROLES[ROLES.index(least) :]) if least else [])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "authorization",
    [
        None,
        "",
        "Basic",
        "Basic !",
        "Basic " + base64.b64encode(b"\xff\xfe:x").decode(),
        basic("admin", ""),
        basic("admin", "viewer-word"),
        basic("nobody", "admin-word"),
        basic("", ""),
        "Bearer admin-word",
    ],
)
@pytest.mark.parametrize(
    "path", ["/", f"{API}/runs/search", "/ajax-api/3.0/mlflow/assistant/config", "/healthy"]
)
def test_without_the_right_password_nothing_passes(authorization: str | None, path: str) -> None:
    status, body = ask("POST", path, authorization)
    assert status == 401
    assert b"MLFLOW_TRACKING_PASSWORD" in body


def test_only_the_health_of_the_server_is_told_to_everybody() -> None:
    assert ask("GET", OPEN_PATH) == (200, b"passed ")
    assert ask("POST", OPEN_PATH)[0] == 401
    assert ask("GET", "/health/../api")[0] == 401


def test_who_may_passes_and_who_may_not_is_told_why() -> None:
    assert ask("POST", f"{API}/runs/create", basic("logger", "logger-word"), b"{}") == (200, b"passed {}")
    status, body = ask("POST", f"{API}/runs/create", basic("viewer", "viewer-word"))
    assert status == 403
    assert json.loads(body)["message"] == f"a viewer may not POST {API}/runs/create"


@pytest.mark.parametrize(
    "body",
    [
        {"name": "x", "artifact_location": "file:///etc"},
        {"name": "x", "artifactLocation": "file:///etc"},
        "text",
    ],
)
def test_a_place_for_an_experiments_artifacts_is_the_administrators_to_choose(body: object) -> None:
    path, raw = f"{API}/experiments/create", json.dumps(body).encode()
    assert ask("POST", path, basic("registrar", "registrar-word"), raw)[0] == 403
    assert ask("POST", path, basic("admin", "admin-word"), raw) == (200, b"passed " + raw)
    plain = b'{"name": "x", "tags": []}'
    assert ask("POST", path, basic("logger", "logger-word"), plain) == (200, b"passed " + plain)


def test_a_websocket_is_closed() -> None:
    assert ask("GET", "/", basic("admin", "admin-word"), kind="websocket") == (0, b"")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "cannot be read"),
        ("\n", "names nobody"),
        ("anna god " + "0" * 64, "line 1: needs a new name, a role"),
        ("anna viewer 12", "line 1"),
        (user_line("anna", "viewer", "x") + user_line("anna", "admin", "y"), "line 2"),
    ],
)
def test_a_file_of_users_that_is_none_is_refused(tmp_path: Path, content: str | None, told: str) -> None:
    path = tmp_path / "users"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=told):
        read_users(path)


def test_a_file_of_users_says_who_has_which_role(tmp_path: Path) -> None:
    (tmp_path / "users").write_text(user_line("anna", "viewer", "x") + user_line("ray", "registrar", "y"))
    users = read_users(tmp_path / "users")
    assert users.role_of(basic("anna", "x")) == "viewer"
    assert users.role_of(basic("ray", "y")) == "registrar"
    assert users.role_of(basic("ray", "x")) is None


def test_a_server_without_users_does_not_start() -> None:
    with pytest.raises(UserError, match="DDPM_MLFLOW_USERS is not set"):
        users_of_server({})
    environ = {name: value for name, value in os.environ.items() if name != "DDPM_MLFLOW_USERS"}
    command = [sys.executable, "-m", "ddpm_pipeline.infra.tracking", "--port", "1"]
    told = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    assert told.returncode == 1
    assert told.stderr == "error: DDPM_MLFLOW_USERS is not set: name the file of MLflow's users\n"


def routes_of(app: Any, under: str = "") -> Iterator[tuple[str, str]]:
    """Method and path of every route, also those of included routers, of a FastAPI application."""
    for route in app.routes:
        if hasattr(route, "original_router"):
            yield from routes_of(route.original_router, under + route.include_context.prefix)
        else:
            for method in getattr(route, "methods", None) or ():
                yield method, under + route.path


def every_route() -> list[tuple[str, str]]:
    """Method and a real path for each route of MLflow's server: of its FastAPI and of its Flask application."""
    from mlflow.server import app as flask
    from mlflow.server.fastapi_app import create_fastapi_app

    found = set(routes_of(create_fastapi_app()))
    found |= {(m, str(rule.rule)) for rule in flask.url_map.iter_rules() for m in rule.methods or ()}
    return sorted((method, re.sub(r"<[^>]+>|\{[^}]+\}", "1", path)) for method, path in found)


@pytest.mark.stack
def test_no_route_of_the_real_server_answers_without_the_password(stack: LocalStack) -> None:
    server, direct = (
        os.environ["MLFLOW_TRACKING_URI"],
        urllib.request.build_opener(urllib.request.ProxyHandler({})),
    )
    routes = every_route()
    paths = {path for _, path in routes}
    assert {"/graphql", f"{API}/runs/create", "/ajax-api/3.0/mlflow/assistant/message", "/v1/traces"} <= paths
    assert len(routes) > 500

    def status(method: str, path: str, **headers: str) -> int:
        data = b"{}" if method in ("POST", "PUT", "PATCH") else None
        sent = {"X-Forwarded-For": "127.0.0.1", "Content-Type": "application/json", **headers}
        try:
            with direct.open(
                urllib.request.Request(server + path, data, sent, method=method), timeout=20
            ) as answer:
                return answer.status
        except urllib.error.HTTPError as error:
            return error.code

    open_to_all = {(method, path) for method, path in routes if status(method, path) != 401}
    assert open_to_all == {("GET", OPEN_PATH), ("HEAD", OPEN_PATH)}
    ours = basic(os.environ["MLFLOW_TRACKING_USERNAME"], os.environ["MLFLOW_TRACKING_PASSWORD"])
    assert status("GET", "/", Authorization=ours) == 200
    running = [
        route for route in routes if re.search("assistant|gateway|webhook|/jobs|scorers/.*online", route[1])
    ]
    assert len(running) > 40
    writing = [(method, path) for method, path in running if method in ("POST", "PUT", "PATCH", "DELETE")]
    for method, path in writing:
        assert status(method, path, Authorization=ours) == 403, f"{method} {path}"
