"""The local stack as a whole: up, status, down."""

import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

from ddpm_pipeline.errors import UserError
from ddpm_pipeline.infra.local import client_environment, ports, processes, ray
from ddpm_pipeline.infra.local.credentials import ray_token_path, s3_keys
from ddpm_pipeline.infra.local.mlflow import PORTS as MLFLOW_PORTS
from ddpm_pipeline.infra.local.mlflow import mlflow_service
from ddpm_pipeline.infra.local.s3_gateway import PORTS as S3_PORTS
from ddpm_pipeline.infra.local.s3_gateway import s3_service
from ddpm_pipeline.infra.local.service import Service, start, wait_until_ready
from ddpm_pipeline.infra.local.stack_state import (
    STATE_FILES,
    ServiceRecord,
    State,
    StoreKind,
    locked,
    own_root,
    read_state,
    write_state,
)

ALL_PORTS = (*S3_PORTS, *MLFLOW_PORTS, *ray.PORTS)
_OWN_FOLDERS = ("s3", "mlflow", "mlflow-file", "files", "logs", "secrets")
_SERVICES = {"s3", "mlflow", "ray", "schedule"}
"""What `up` ends when it is no longer wanted; another process on record (a further Ray node) stays until `down`."""
_PORTS_OF = {"s3": S3_PORTS, "mlflow": MLFLOW_PORTS, "ray": ray.PORTS}
_ORPHAN_SECONDS = 15.0  # for what a killed service left behind to notice that it is alone
_SCHEDULE_READY = b"schedule: every night"
_GRACE_SECONDS = 30.0  # for a running service to answer: on a busy machine late is not hung

Progress = Callable[[int, int], None]
Report = Callable[[str], None]


@dataclass(frozen=True)
class ServiceStatus:
    """One row of `status`."""

    service: str
    state: str
    """running, starting or hung (the process lives but does not answer), stopped, external."""
    url: str
    pid: int | None
    log: Path | None


class LocalStack:
    """S3, MLflow and Ray on this machine's loopback, remembered under `root`.

    `store` and `num_cpus` left at None keep what was chosen before (first: s3, and the machine's cores).
    `schedule` are the words of a `ddpm schedule` to run with it; none end it, and None keeps what was chosen before.
    `environ` is the environment of the user: services it names (AWS_ENDPOINT_URL, MLFLOW_TRACKING_URI,
    RAY_ADDRESS) are used instead of started.
    """

    def __init__(
        self,
        root: Path,
        store: StoreKind | None = None,
        num_cpus: int | None = None,
        environ: Mapping[str, str] | None = None,
        schedule: Sequence[str] | None = None,
    ) -> None:
        self.root = own_root(root)
        self._store: StoreKind | None = store
        self._num_cpus = num_cpus
        self._schedule = None if schedule is None else tuple(schedule)
        self._environ = dict(os.environ if environ is None else environ)
        self._writing = Lock()

    def up(self, progress: Progress | None = None, report: Report | None = None) -> None:
        """Start what does not run; return when every service answers. Raises UserError naming the log."""
        with locked(self.root):
            state = self._plan()
            try:
                self._start_all(state, progress, report)
            except UserError:
                # A port can be taken between its choice and its use: with other ports, once more.
                again = self._plan()
                if again.ports == state.ports:
                    raise
                self._start_all(again, progress, report)

    def status(self) -> list[ServiceStatus]:
        """A row for each service, checked now."""
        state = read_state(self.root)
        if state is None:
            names = ("s3", "mlflow", "ray")
            return [ServiceStatus(name, "stopped", "", None, None) for name in names]
        services = self._services(state)
        rows = [self._row(service, state.services.get(service.name)) for service in services]
        outside = client_environment.external_services(self._own_environment(state))
        urls = {"s3": "AWS_ENDPOINT_URL", "mlflow": "MLFLOW_TRACKING_URI", "ray": "RAY_ADDRESS"}
        shown = [name for name in state.external if name in outside]
        rows += [ServiceStatus(n, "external", self._environ.get(urls[n], ""), None, None) for n in shown]
        return rows

    def down(self, progress: Progress | None = None) -> list[str]:
        """End what this stack started, and nothing else; data stays. Returns the names of what ran."""
        if not self.root.exists():
            return []
        with locked(self.root):
            state = read_state(self.root)
            if state is None:
                return []
            records = list(state.services.items())
            ended: list[str] = []
            # Clients before servers, so that their last requests are answered.
            for done, (name, record) in enumerate(sorted(records, key=_shutdown_order)):
                if processes.end(record.identity) > 0:
                    ended.append(name)
                state = self._forget(name)
                if progress is not None:
                    progress(done + 1, len(records))
            return ended

    def remove(self) -> None:
        """Down, and the stack's data, logs and secrets removed. Other files in its folder stay: where the working
        directory is a home, `.local` is not the stack's alone.
        """
        self.down()
        ray.remove_temp_dir(self.root)
        for name in _OWN_FOLDERS:
            shutil.rmtree(self.root / name, ignore_errors=True)
        for name in STATE_FILES:
            (self.root / name).unlink(missing_ok=True)
        if self.root.is_dir() and not any(self.root.iterdir()):
            self.root.rmdir()

    def _own_environment(self, state: State | None) -> dict[str, str]:
        managed = client_environment.client_variables(self.root, state) if state and state.ports else {}
        return client_environment.users_own(self._environ, managed)

    def _plan(self) -> State:
        """The state to reach: what was remembered, ports that are free or ours, the user's choices."""
        before = self._without_dead()
        own = self._own_environment(before)
        external = client_environment.external_services(own)
        state = before or State()
        store: StoreKind = self._store or (before.store if before else "s3")
        if store == "file":
            external = tuple(name for name in external if name != "s3")
        remembered = {name: port for name, port in state.ports.items() if name in ALL_PORTS}
        ours = self._ports_of_running(state)
        kept = {name: port for name, port in remembered.items() if name in ours or ports.is_free(port)}
        missing = [name for name in ALL_PORTS if name not in kept]
        plan = state.model_copy(
            update={
                "store": store,
                "num_cpus": self._num_cpus or state.num_cpus,
                "schedule": state.schedule if self._schedule is None else self._schedule,
                "external": external,
                "ports": {**kept, **ports.choose(missing, taken=kept.values())},
            }
        )
        write_state(self.root, plan)
        return plan

    def _without_dead(self) -> State | None:
        """What is remembered, less the services that died: their orphans would still hold the ports.

        Ray's agents overwrite the mark that identifies them with their title. Once no process of their session carries
        it, they cannot be ended safely, so they get time to end by themselves.
        """
        state = read_state(self.root)
        for name, record in (state.services if state else {}).items():
            if not processes.is_alive(record.identity):
                processes.end(record.identity)
                state = self._forget(name)
                left = [state.ports[port] for port in _PORTS_OF.get(name, ()) if port in state.ports]
                ports.wait_until_free(left, _ORPHAN_SECONDS)
        return state

    def _ports_of_running(self, state: State) -> set[str]:
        alive = [name for name, record in state.services.items() if processes.is_alive(record.identity)]
        return {port for name in alive for port in _PORTS_OF.get(name, ())}

    def _services(self, state: State) -> list[Service]:
        services: list[Service] = []
        s3 = client_environment.s3_variables(self.root, state)
        if state.store == "s3" and "s3" not in state.external:
            services.append(s3_service(self.root, state.ports, s3_keys(self.root)))
        if "mlflow" not in state.external:
            home = self.root / ("mlflow" if state.store == "s3" else "mlflow-file")
            artifacts = self._artifacts(state, home)
            services.append(mlflow_service(self.root, home, state.ports, artifacts, s3))
        if "ray" not in state.external:
            jobs = client_environment.client_variables(self.root, state)
            jobs = {name: value for name, value in jobs.items() if name != "RAY_ADDRESS"}
            token = ray_token_path(self.root)
            num_cpus = state.num_cpus or default_num_cpus()
            services.append(ray.ray_service(self.root, state.ports, num_cpus, token, jobs))
        if state.schedule:
            services.append(self._scheduler(state))
        return services

    def _scheduler(self, state: State) -> Service:
        """`ddpm schedule`, pointed at the stack; it catches up on the nights missed while the stack was down."""
        own = client_environment.client_variables(self.root, state)
        chosen = {
            name: value for name, value in own.items() if name != "DDPM_ROOT" or name not in self._environ
        }
        replaced = (
            *(client_environment.REPLACED_WITH_S3 if "AWS_ENDPOINT_URL" in own else ()),
            *(client_environment.REPLACED_WITH_MLFLOW if "MLFLOW_TRACKING_URI" in own else ()),
            *(client_environment.REPLACED_WITH_RAY if "RAY_ADDRESS" in own else ()),
        )
        log = self.root / "logs" / "schedule.log"
        return Service(
            name="schedule",
            argv=(
                sys.executable,
                "-u",
                "-m",
                "ddpm_pipeline.jobs.cli",
                "schedule",
                *state.schedule,
                "--catch-up",
            ),
            settings=chosen,
            url="",
            log=log,
            ports=(),
            is_ready=lambda: log.exists() and _SCHEDULE_READY in _first_bytes(log),
            start_seconds=120,
            unset=replaced,
            needs_others=True,
        )

    def _artifacts(self, state: State, home: Path) -> str:
        if state.store == "file":
            return f"file://{home / 'artifacts'}"
        if "s3" in state.external:  # in the user's store nothing is written outside the data root
            root = self._environ.get("DDPM_ROOT", client_environment.data_root(self.root, state))
            return f"{root.rstrip('/')}/mlflow"
        return "s3://mlflow/artifacts"

    def _start_all(self, state: State, progress: Progress | None, report: Report | None) -> None:
        services = self._services(state)
        wanted = {service.name for service in services}
        for name in [name for name in state.services if name in _SERVICES and name not in wanted]:
            processes.end(state.services[name].identity)
            self._forget(name)
        done = 0
        for part in ([s for s in services if not s.needs_others], [s for s in services if s.needs_others]):
            with ThreadPoolExecutor(max_workers=max(1, len(part))) as pool:
                futures = [
                    pool.submit(self._ensure, one, state.services.get(one.name), report) for one in part
                ]
                for future in futures:
                    future.exception()  # wait for all of them before raising one failure
                    done += 1
                    if progress is not None:
                        progress(done, len(services))
            for future in futures:
                future.result()

    def _ensure(self, service: Service, record: ServiceRecord | None, report: Report | None) -> None:
        if record is not None and self._still_serves(service, record):
            _report(report, f"{service.name} runs at {service.url}")
            return
        if record is not None:
            processes.end(record.identity)
        for left in reversed(range(service.starts)):
            _report(report, f"{service.name} starts")
            fresh = start(service, self._environ)
            self._remember(service.name, fresh)
            try:
                wait_until_ready(service, fresh.identity)
                break
            except UserError:
                late = processes.is_alive(fresh.identity)
                processes.end(fresh.identity)
                self._forget(service.name)
                if late or not left:
                    raise
                _report(report, f"{service.name} ended while starting, and is started again")
        _report(report, f"{service.name} is ready at {service.url}")

    def _still_serves(self, service: Service, record: ServiceRecord) -> bool:
        if record.fingerprint != service.fingerprint or not processes.is_alive(record.identity):
            return False
        try:
            wait_until_ready(service, record.identity, _GRACE_SECONDS)
        except UserError:
            return False
        return processes.is_alive(record.identity)  # what answered may have been its orphan

    def _row(self, service: Service, record: ServiceRecord | None) -> ServiceStatus:
        if record is None or not processes.is_alive(record.identity):
            return ServiceStatus(service.name, "stopped", service.url, None, service.log)
        state = "running" if service.is_ready() else "not answering"
        return ServiceStatus(service.name, state, service.url, record.identity.pid, service.log)

    def _remember(self, name: str, record: ServiceRecord) -> None:
        with self._writing:
            state = read_state(self.root) or State()
            write_state(self.root, state.model_copy(update={"services": {**state.services, name: record}}))

    def _forget(self, name: str) -> State:
        with self._writing:
            state = read_state(self.root) or State()
            rest = {key: value for key, value in state.services.items() if key != name}
            state = state.model_copy(update={"services": rest})
            write_state(self.root, state)
            return state


def default_num_cpus() -> int:
    """The cores this process may use; at least two, the fewest for data-parallel training."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(2, cores)


def _shutdown_order(item: tuple[str, ServiceRecord]) -> int:
    return {"ray": 1, "mlflow": 2, "s3": 3}.get(item[0], 0)


def _first_bytes(log: Path) -> bytes:
    with log.open("rb") as file:
        return file.read(4096)


def _report(report: Report | None, text: str) -> None:
    if report is not None:
        report(text)
