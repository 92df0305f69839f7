"""MLflow servers as teams run them, for tests: processes on loopback, on PostgreSQL or SQLite, that can be killed."""

import os
import pwd
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from ddpm_pipeline.infra.tracking.access import Role, user_line
from ddpm_pipeline.infra.tracking.app import USERS_VARIABLE

PROGRAMS = max(Path("/usr/lib/postgresql").glob("*/bin"), default=None)
"""Of Debian's package postgresql; None where it is not installed."""
PASSWORD = "a long password of a test"
_PATIENCE_SECONDS = 120.0
_QUIET = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}


class PostgreSQL:
    """A server on a socket in a folder of its own; as root it runs as `postgres`, since it refuses to be root."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._data = folder, folder / "data"
        self._user = "postgres" if os.geteuid() == 0 else None
        if self._user is not None:
            os.chown(folder, pwd.getpwnam(self._user).pw_uid, -1)
        self._run("initdb", "--auth=trust", "--username=mlflow", f"--pgdata={self._data}")
        self.start()
        self._run("createdb", f"--host={folder}", "--username=mlflow", "mlflow")

    @property
    def uri(self) -> str:
        return f"postgresql+psycopg2://mlflow@/mlflow?host={self._folder}"

    def start(self) -> None:
        command = [self._program("postgres"), "-D", str(self._data), "-k", str(self._folder)]
        command += ["-c", "listen_addresses="]
        self._server = subprocess.Popen(command, user=self._user, cwd="/", stderr=subprocess.DEVNULL)
        ready = [self._program("pg_isready"), "--quiet", f"--host={self._folder}"]
        wait_until(lambda: subprocess.run(ready, check=False).returncode == 0, "PostgreSQL")

    def kill(self) -> None:
        """As a power cut: without a word to its processes."""
        children = Path(f"/proc/{self._server.pid}/task/{self._server.pid}/children").read_text().split()
        for pid in (self._server.pid, *map(int, children)):
            os.kill(pid, signal.SIGKILL)
        self._server.wait()

    def _run(self, program: str, *options: str) -> None:
        subprocess.run(
            [self._program(program), *options],
            user=self._user,
            cwd="/",
            check=True,
            stdout=subprocess.DEVNULL,
        )

    def _program(self, name: str) -> str:
        assert PROGRAMS is not None
        return str(PROGRAMS / name)


class TrackingServer:
    """MLflow on a fixed port, with one worker; `log` is what it says."""

    def __init__(
        self, folder: Path, program: Sequence[str], options: Sequence[str], variables: Mapping[str, str]
    ) -> None:
        """`program`: what Python is given to run a server; `variables`: of the server alone."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port: int = free.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self.log = folder / "mlflow.log"
        place = ["--host", "127.0.0.1", "--port", str(self.port), "--workers", "1"]
        self._command = [sys.executable, *program, *place, *options]
        # With a server's address in its environment, it would be its own client.
        others = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
        self._environ = {**others, **_QUIET, **variables}
        self.start()

    def start(self) -> None:
        with self.log.open("a") as log:
            self._server = subprocess.Popen(
                self._command, env=self._environ, stdout=log, stderr=log, start_new_session=True
            )
        wait_until(self._answers, "MLflow")

    def kill(self) -> None:
        os.killpg(self._server.pid, signal.SIGKILL)
        self._server.wait()

    def _answers(self) -> bool:
        assert self._server.poll() is None, self.log.read_text()[-2000:]
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=5):
                return True
        except (urllib.error.URLError, OSError):
            return False


def own_server(
    folder: Path, database: str, users: Mapping[str, Role], more: Sequence[str] = ()
) -> TrackingServer:
    """As infra/docker starts it: users with roles, who all have `PASSWORD`, and artifacts through the server.

    `more`: options.
    """
    file = folder / "users"
    file.write_text("".join(user_line(name, role, PASSWORD) for name, role in users.items()))
    file.chmod(0o600)
    options = ["--backend-store-uri", database, "--artifacts-destination", f"file://{folder}/artifacts"]
    return TrackingServer(
        folder, ["-m", "ddpm_pipeline.infra.tracking"], [*options, *more], {USERS_VARIABLE: str(file)}
    )


def direct_server(folder: Path, database: str, artifacts: str) -> TrackingServer:
    """MLflow's own, without passwords; clients write artifacts to the store at `artifacts` themselves.

    It has no key of that store.
    """
    options = ["--backend-store-uri", database, "--no-serve-artifacts", "--default-artifact-root", artifacts]
    keyless = {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": "", "AWS_EC2_METADATA_DISABLED": "true"}
    return TrackingServer(folder, ["-m", "mlflow", "server"], options, keyless)


def basic_auth_server(folder: Path, database: str, default_permission: str) -> TrackingServer:
    """MLflow's own with its passwords and permissions; its user `admin` has `PASSWORD`."""
    settings = folder / "basic_auth.ini"
    lines = {
        "default_permission": default_permission,
        "database_uri": f"sqlite:///{folder}/users.db",
        "admin_username": "admin",
        "admin_password": PASSWORD,
        "auth_cache_ttl_seconds": "60",  # or each request computes a slow hash: a second on a small machine
        "authorization_function": "mlflow.server.auth:authenticate_request_basic_auth",
    }
    settings.write_text("[mlflow]\n" + "".join(f"{name} = {value}\n" for name, value in lines.items()))
    options = ["--app-name", "basic-auth", "--backend-store-uri", database]
    options += ["--artifacts-destination", f"file://{folder}/artifacts"]
    variables = {"MLFLOW_AUTH_CONFIG_PATH": str(settings), "MLFLOW_FLASK_SERVER_SECRET_KEY": "of a test"}
    return TrackingServer(folder, ["-m", "mlflow", "server"], options, variables)


def clients_of(server: TrackingServer, user: str | None = None) -> dict[str, str]:
    """The variables with which a client is this user."""
    signed_in = (
        {} if user is None else {"MLFLOW_TRACKING_USERNAME": user, "MLFLOW_TRACKING_PASSWORD": PASSWORD}
    )
    return {"MLFLOW_TRACKING_URI": server.uri, **signed_in}


def wait_until(holds: Callable[[], bool], what: str) -> None:
    """Raise AssertionError if it does not within two minutes."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while not holds():
        assert time.monotonic() < deadline, f"{what} does not answer"
        time.sleep(0.2)
