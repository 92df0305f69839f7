"""MLflow's web application behind the users and rules of `access`; `python -m ddpm_pipeline.infra.tracking` serves it.

MLflow's own authentication (`--app-name basic-auth`) is not used: with it, every user may also have the
server's assistant run shell commands, and no role may register models without deleting them.
"""

import json
import os
import re
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from pathlib import Path
from typing import Any

from ddpm_pipeline.errors import UserError
from ddpm_pipeline.infra.tracking.access import OPEN_PATH, Right, Users, permits, read_users, right_for

USERS_VARIABLE = "DDPM_MLFLOW_USERS"
"""Names the file of `read_users`."""
_MAX_BODY_BYTES = 1 << 20  # of the one request whose body is parsed
_CREATES_EXPERIMENT = re.compile(r"/(?:ajax-)?api/[23]\.0/mlflow/experiments/create")
_REALM = [(b"www-authenticate", b'Basic realm="MLflow"')]

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class PasswordGate:
    """An ASGI application that passes to `app` only what a user's role permits; /health is open."""

    def __init__(self, app: App, users: Users) -> None:
        self._app = app
        self._users = users

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 401 or 403, or let `app` answer."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] != "http":  # MLflow's pages use no WebSocket
            await send({"type": "websocket.close", "code": 1008})
        elif scope["path"] == OPEN_PATH and scope["method"] in ("GET", "HEAD"):
            await self._app(scope, receive, send)
        else:
            await self._authorize(scope, receive, send)

    async def _authorize(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope["headers"])
        role = self._users.role_of(headers.get(b"authorization", b"").decode("latin-1"))
        if role is None:
            text = "MLflow requires a user and a password: MLFLOW_TRACKING_USERNAME, MLFLOW_TRACKING_PASSWORD"
            await _refuse(send, 401, "UNAUTHENTICATED", text)
            return
        method, path = scope["method"], scope["path"]
        needed = right_for(method, path)
        if needed is not None and _CREATES_EXPERIMENT.fullmatch(path):
            receive, needed = await _inspect_experiment(receive, needed)
        if permits(role, needed):
            await self._app(scope, receive, send)
        else:
            await _refuse(send, 403, "PERMISSION_DENIED", f"a {role} may not {method} {path}")


def create_app() -> App:
    """What uvicorn serves."""
    from mlflow.server.fastapi_app import create_fastapi_app

    return PasswordGate(create_fastapi_app(), users_of_server())


def users_of_server(environ: Mapping[str, str] = os.environ) -> Users:
    """Those of the file that the environment names. Raises UserError where none is named or it cannot be read."""
    path = environ.get(USERS_VARIABLE)
    if not path:
        raise UserError(f"{USERS_VARIABLE} is not set: name the file of MLflow's users")
    return read_users(Path(path))


async def _inspect_experiment(receive: Receive, needed: Right) -> tuple[Receive, Right]:
    """The same request, and the right it needs: an experiment that names a place for its artifacts could have
    the server read any file of its machine.
    """
    messages: list[Message] = []
    body = b""
    while True:
        message = await receive()
        messages.append(message)
        body += message.get("body", b"")
        if not message.get("more_body") or len(body) > _MAX_BODY_BYTES:
            break
    try:
        content = json.loads(body)
    except ValueError:
        content = None
    plain = isinstance(content, dict) and set(content) <= {"name", "tags"}

    async def again() -> Message:
        return messages.pop(0) if messages else await receive()

    return again, needed if plain else Right.ERASE


async def _refuse(send: Send, status: int, code: str, text: str) -> None:
    body = json.dumps({"error_code": code, "message": text}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += _REALM if status == 401 else []
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
