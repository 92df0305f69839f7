"""Jobs as processes of their own, to be killed and started again with the same command."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil

from ddpm_pipeline.config.base import Settings
from ddpm_pipeline.infra.local import LocalStack
from ddpm_pipeline.infra.local.processes import ProcessIdentity
from ddpm_pipeline.infra.local.ray import remove_temp_dir
from ddpm_pipeline.infra.local.stack_state import read_state
from ddpm_pipeline.jobs.runner import PROGRAM

ROOT = Path(__file__).parents[1]


class Driver:
    """`ddpm COMMAND --config FILE` with fixed settings; `again` is the same command once more."""

    def __init__(
        self,
        name: str,
        config: Settings | None,
        folder: Path,
        variables: Mapping[str, str] | None = None,
        *,
        command: Sequence[str] | None = None,
    ) -> None:
        """`name`: the section that `config` stands under, and the command unless that is given too. `variables` are
        set over the environment of this process.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self._command = [sys.executable, *PROGRAM, *(command or (name,))]
        if config is not None:
            settings = folder / f"{name}.json"
            settings.write_text(json.dumps({name: config.model_dump(mode="json")}))
            self._command.append(f"--config={settings}")
        self._environ = os.environ | dict(variables or {})
        self.log = folder / f"{name}.log"
        self.starts = 0
        self.process = self._start()
        self.others: list[subprocess.Popen[bytes]] = []
        """Processes of the same command beside it."""

    def start_another(self) -> None:
        """The same command a second time, at the same time."""
        self.others.append(self._start())

    def _start(self) -> "subprocess.Popen[bytes]":
        self.starts += 1
        with self.log.open("ab") as out:
            return subprocess.Popen(
                self._command,
                cwd=ROOT,
                env=self._environ,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
            )

    def again(self) -> None:
        """Start anew if it has ended without completing."""
        if self.process.poll() not in (None, 0):
            self.process = self._start()

    def end(self, number: int, timeout_seconds: float = 90) -> int:
        """Send a signal and wait; returns the exit code."""
        self.process.send_signal(number)
        return self.process.wait(timeout_seconds)

    @property
    def said(self) -> str:
        """All it has printed, over all starts."""
        return self.log.read_text(errors="replace")


def guarded(local: LocalStack, keeper_pid: int) -> subprocess.Popen[bytes]:
    """A process that ends the stack should its keeper be killed before it can do so itself."""
    command = [
        sys.executable,
        "-m",
        "ddpm_pipeline.infra.local",
        "guard",
        "--root",
        str(local.root),
        "--pid",
        str(keeper_pid),
    ]
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)


@contextmanager
def ended_after(local: LocalStack) -> Iterator[None]:
    """Whatever happens in the block, or to this process, the stack is ended and Ray's folder removed."""
    guard = guarded(local, os.getpid())
    try:
        yield
    finally:
        local.down()
        remove_temp_dir(local.root)
        guard.terminate()
        guard.wait()


def ray_workers(stack: LocalStack, word: str) -> list[psutil.Process]:
    """Processes on any node of the stack that Ray has named with `word` (an actor's class), oldest first."""
    state = read_state(stack.root)
    assert state is not None
    nodes = [record.identity for name, record in state.services.items() if name.startswith("ray")]
    return sorted((one for node in nodes for one in ray_workers_of(node, word)), key=lambda one: one.pid)


def ray_workers_of(node: ProcessIdentity, word: str) -> list[psutil.Process]:
    """Those of one node; none where it was lost."""
    try:
        family = psutil.Process(node.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []
    return [child for child in family if word in _title(child)]


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""  # ended while we looked
