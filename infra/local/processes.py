"""Own processes: started to outlive their parent, recognized for certain later, ended as a whole family."""

import os
import subprocess
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import psutil

from ddpm_pipeline.config.base import Settings

MARK_VARIABLE = "DDPM_SERVICE_MARK"
"""Set to a random value in everything a service starts, so that its orphans are still recognized."""


class ProcessIdentity(Settings):
    """One process for certain: a pid alone may have been given to another program since."""

    pid: int
    """The process number; also the number of its session, because every service leads its own."""
    born: str
    """When it started, in the kernel's own count (exact on Linux: boot id and clock ticks)."""
    mark: str
    """The random value in the environment of all it starts."""


_EXEC_SECONDS = 1.0
_children: dict[int, subprocess.Popen[bytes]] = {}  # kept so that ended children of this process are reaped


def spawn(argv: Sequence[str], environ: Mapping[str, str], log: Path, mark: str) -> ProcessIdentity:
    """Start `argv` in a session of its own, with no input, and both outputs appended to `log`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        child = subprocess.Popen(
            list(argv),
            env={**environ, MARK_VARIABLE: mark},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    _children[child.pid] = child
    return ProcessIdentity(pid=child.pid, born=_born(child.pid) or "ended", mark=mark)


def is_alive(identity: ProcessIdentity) -> bool:
    """Whether this very process still runs: born then, and with the mark that only what was started here carries.

    A zombie or another program with its pid does not count, even if the identity was forged.
    """
    child = _children.get(identity.pid)
    if child is not None and child.poll() is not None:
        del _children[identity.pid]
        return False
    if _born(identity.pid) != identity.born:
        return False
    try:
        process = psutil.Process(identity.pid)
        deadline = time.monotonic() + _EXEC_SECONDS
        while _runs(process):
            if environ := _environ(process.pid):
                return identity.mark == environ.get(MARK_VARIABLE)
            if time.monotonic() > deadline:
                return False
            time.sleep(0.005)  # within `exec` a process has no environment for a moment
        return False
    except (psutil.Error, OSError):  # gone, or another user's
        return False


def variables(identity: ProcessIdentity) -> dict[str, str]:
    """The environment that the process was started with; empty if it has ended."""
    try:
        return _environ(identity.pid) if is_alive(identity) else {}
    except (psutil.Error, OSError):
        return {}


def end(identity: ProcessIdentity, grace_seconds: float = 10.0) -> int:
    """End the process and all its descendants; return how many processes that were.

    The leader gets SIGTERM first and may end its own children in order. What is left after
    `grace_seconds` is killed, repeatedly, because a dying process may still start others.
    """
    members = {member.pid: member for member in family(identity)}
    count = len(members)
    leader = members.get(identity.pid)
    if leader is not None:
        _signal([leader], kill=False)
        _wait([leader], grace_seconds)
    for attempt in range(5):
        rest = {**members, **{member.pid: member for member in family(identity)}}.values()
        living = [member for member in rest if _runs(member)]
        if not living:
            break
        _signal(living, kill=attempt > 0)
        _wait(living, 3.0)
    is_alive(identity)  # reaps our own child
    return count


def kill(identity: ProcessIdentity) -> None:
    """Kill the whole family at one stroke, as a machine that loses its power would."""
    _signal(family(identity), kill=True)
    end(identity)


def family(identity: ProcessIdentity) -> list[psutil.Process]:
    """The leader if it lives, its session, its descendants, and every process that carries its mark.

    A session counts only if a member carries the mark: its number may be another's, or made up.
    """
    # Some programs write their title over their environment: they are found by their session.
    running = [process for process in psutil.process_iter() if process.pid != os.getpid() and _runs(process)]
    marked = {process.pid for process in running if _mark(process) == identity.mark}
    if is_alive(identity):  # it waits where the leader, within `exec`, has no environment yet
        marked.add(identity.pid)
    in_session = {process.pid for process in running if _session(process.pid) == identity.pid}
    # While any member lives, the kernel does not reuse the session's number: a living process of
    # another birth under this pid therefore means that the session is gone.
    # The leader itself, perhaps an unreaped zombie, keeps it.
    session_is_ours = bool(marked & in_session) and _born(identity.pid) in (identity.born, None)
    ours = marked | in_session if session_is_ours else marked
    found = {process.pid: process for process in running if process.pid in ours}
    for process in list(found.values()):
        for descendant in _descendants(process):
            found.setdefault(descendant.pid, descendant)
    found.pop(os.getpid(), None)
    return list(found.values())


def without_listener(identity: ProcessIdentity, ports: Collection[int]) -> set[int]:
    """Those of some TCP ports on which neither the process nor one that came from it takes connections."""
    missing = set(ports)
    for member in family(identity) if missing else ():
        missing -= _listening(member)
        if not missing:  # each look at a process takes milliseconds
            break
    return missing


def wait_for_end(pid: int, poll_seconds: float = 0.5) -> None:
    """Return when the process with this pid (the one living now) has ended."""
    born = _born(pid)
    while born is not None and _born(pid) == born:
        time.sleep(poll_seconds)


def _born(pid: int) -> str | None:
    stat = Path(f"/proc/{pid}/stat")
    try:
        if Path("/proc/self/stat").exists():
            # Field 22, counted behind the program's name, which may itself hold spaces and brackets.
            ticks = stat.read_text(errors="replace").rpartition(")")[2].split()[19]
            return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()}:{ticks}"
        return f"{psutil.Process(pid).create_time():.3f}"
    except (FileNotFoundError, ProcessLookupError, psutil.NoSuchProcess):
        return None


def _session(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except (ProcessLookupError, PermissionError):
        return None


def _mark(process: psutil.Process) -> str | None:
    try:
        return _environ(process.pid).get(MARK_VARIABLE)
    except (psutil.Error, OSError):
        return None


def _environ(pid: int) -> dict[str, str]:
    """The variables a process was started with. Not as psutil reads them, which ends at the first empty one: JuiceFS
    blanks the beginning of its own.
    """
    file = Path(f"/proc/{pid}/environ")
    if not file.exists():
        return psutil.Process(pid).environ()
    pairs = (entry.partition("=") for entry in file.read_text(errors="replace").split("\0"))
    return {name: value for name, _, value in pairs if name}


def _listening(process: psutil.Process) -> set[int]:
    try:
        found = process.net_connections(kind="tcp")
    except psutil.Error:
        return set()
    return {one.laddr.port for one in found if one.status == psutil.CONN_LISTEN and one.laddr}


def _descendants(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _runs(process: psutil.Process) -> bool:
    """Whether anything of it runs; a zombie does not, once its last thread has gone and its ports are closed."""
    try:
        if not process.is_running():
            return False
        return process.status() != psutil.STATUS_ZOMBIE or len(os.listdir(f"/proc/{process.pid}/task")) > 1
    except (psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
        return False


def _wait(waited_for: list[psutil.Process], seconds: float) -> None:
    # Not psutil.wait_procs: where orphans are not reaped (a container without an init), it waits for zombies.
    deadline = time.monotonic() + seconds
    while any(_runs(process) for process in waited_for) and time.monotonic() < deadline:
        time.sleep(0.02)


def _signal(processes: list[psutil.Process], *, kill: bool) -> None:
    for process in processes:
        try:
            if kill:
                process.kill()
            else:
                process.terminate()
                process.resume()  # a stopped process would not hear the request
        except psutil.NoSuchProcess:
            continue
