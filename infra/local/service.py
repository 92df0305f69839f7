"""One service: how it is started, when it counts as ready, and the error when it does not become ready."""

import hashlib
import http.client
import json
import os
import secrets
import socket
import sys
import time
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from ddpm_pipeline.errors import UserError
from ddpm_pipeline.infra.local import processes
from ddpm_pipeline.infra.local.processes import ProcessIdentity
from ddpm_pipeline.infra.local.stack_state import ServiceRecord
from ddpm_pipeline.installation import import_path

_direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # loopback never goes through a proxy


@dataclass(frozen=True)
class Service:
    """A server of the stack, complete with everything its start depends on."""

    name: str
    argv: tuple[str, ...]
    settings: Mapping[str, str]
    """Environment variables of its own; what else it sees comes from the caller's environment."""
    url: str
    log: Path
    ports: tuple[str, ...]
    """Names of the ports it listens on."""
    is_ready: Callable[[], bool]
    """Quick, never raises for a server that does not answer yet."""
    start_seconds: float
    """Bound on the time from start to ready."""
    starts: int = 1
    """How often it is started before ending early is an error."""
    prepare: Callable[[], None] = lambda: None
    """Done before the process starts (checks, first-time formatting)."""
    unset: tuple[str, ...] = field(default=())
    """Variables of the caller that must not reach it."""
    needs_others: bool = False
    """Whether it is of use only once the services without this mark serve."""

    @property
    def fingerprint(self) -> str:
        """Digest of its command and settings; the caller's environment is not part of it."""
        definition = json.dumps([self.argv, sorted(self.settings.items())])
        return hashlib.sha256(definition.encode()).hexdigest()


def start(service: Service, environ: Mapping[str, str]) -> ServiceRecord:
    """Start the service; `wait_until_ready` waits until it serves."""
    service.prepare()
    if service.log.exists():
        service.log.replace(f"{service.log}.1")  # the previous log; older ones are deleted
    kept = {name: value for name, value in environ.items() if name not in service.unset}
    complete = {**kept, **_paths(environ), **service.settings}
    identity = processes.spawn(service.argv, complete, service.log, mark=secrets.token_hex(8))
    return ServiceRecord(identity=identity, fingerprint=service.fingerprint)


def wait_until_ready(service: Service, identity: ProcessIdentity, seconds: float | None = None) -> None:
    """Return once the service serves; otherwise a UserError that names its log and shows the last line."""
    limit_seconds = service.start_seconds if seconds is None else seconds
    deadline = time.monotonic() + limit_seconds
    while not service.is_ready():
        if not processes.is_alive(identity):
            raise UserError(f"{service.name} ended while starting; {last_log_line(service.log)}")
        if time.monotonic() > deadline:
            waited = f"{service.name} is not ready after {limit_seconds:.0f} s"
            raise UserError(f"{waited}; {last_log_line(service.log)}")
        time.sleep(0.1)


def last_log_line(log: Path) -> str:
    """Path of the log, and its last line that is not blank."""
    lines = [line.strip() for line in _tail(log).splitlines() if line.strip()]
    return f"see {log}, which ends: {lines[-1][-300:]}" if lines else f"{log} is empty"


def get(url: str, headers: Mapping[str, str] | None = None, timeout_seconds: float = 5.0) -> bytes | None:
    """The body of a successful GET, or None for any answer but 200 and for no answer."""
    try:
        request = urllib.request.Request(url, headers=dict(headers or {}))
        with _direct.open(request, timeout=timeout_seconds) as answer:
            return answer.read() if answer.status == 200 else None
    except (OSError, ValueError, http.client.HTTPException):  # the last two also for an invalid address
        return None


def listens(url: str, timeout_seconds: float = 2.0) -> bool:
    """Whether anything takes a connection at the host and port of this URL."""
    try:
        parts = urlsplit(url)
        port = parts.port or (443 if parts.scheme == "https" else 80)
        with socket.create_connection((parts.hostname or "", port), timeout_seconds):
            return True
    except (OSError, ValueError):
        return False


def without_proxy(environ: Mapping[str, str]) -> dict[str, str]:
    """NO_PROXY extended by loopback: a company proxy must not get to see the stack's traffic."""
    names = environ.get("NO_PROXY") or environ.get("no_proxy") or ""
    hosts = [host for host in names.split(",") if host]
    value = ",".join(dict.fromkeys([*hosts, "127.0.0.1", "localhost"]))
    return {"NO_PROXY": value, "no_proxy": value}


def _paths(environ: Mapping[str, str]) -> dict[str, str]:
    # Jobs are started as `python -m ddpm_pipeline.jobs.cli train`: the same Python and the same code as this one.
    programs = [str(Path(sys.executable).parent), environ.get("PATH", os.defpath)]
    # An installed program needs no PYTHONPATH, before which even the standard library would stand back.
    modules = list(filter(None, [import_path(), environ.get("PYTHONPATH")]))
    search = {"PYTHONPATH": os.pathsep.join(dict.fromkeys(modules))} if modules else {}
    return {"PATH": os.pathsep.join(programs), **search, **without_proxy(environ)}


def _tail(log: Path, length_bytes: int = 8192) -> str:
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - length_bytes))
            return file.read().decode(errors="replace")
    except FileNotFoundError:
        return ""
