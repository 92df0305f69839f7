import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from ddpm_pipeline.infra.local import processes

SLEEP = "import time; time.sleep(60)"


def spawn(code: str, tmp_path: Path) -> processes.ProcessIdentity:
    return processes.spawn(
        [sys.executable, "-c", code], os.environ, tmp_path / "log", mark=f"mark-{tmp_path.name}"
    )


def wait_until(is_so: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def offspring(detached: bool) -> str:
    """A program that starts a child, says its pid, and waits."""
    return (
        "import subprocess, sys, time; "
        f"c = subprocess.Popen([sys.executable, '-c', '{SLEEP}'], start_new_session={detached}); "
        "print(c.pid, flush=True); time.sleep(60)"
    )


@pytest.mark.parametrize("detached", [False, True], ids=["in its session", "in a session of its own"])
@pytest.mark.parametrize("leader_lives", [True, False], ids=["leader alive", "leader killed"])
def test_a_service_ends_with_all_that_came_from_it(
    tmp_path: Path, detached: bool, leader_lives: bool
) -> None:
    leader = spawn(offspring(detached), tmp_path)
    log = tmp_path / "log"
    wait_until(lambda: log.read_text().endswith("\n"))
    child = int(log.read_text())
    if not leader_lives:
        psutil.Process(leader.pid).kill()
        wait_until(lambda: not processes.is_alive(leader))
    assert processes.end(leader, grace_seconds=1) == 1 + leader_lives
    assert not runs(leader.pid)
    assert not runs(child)


def test_a_session_is_ended_also_while_nobody_reaps_its_leader(tmp_path: Path) -> None:
    """As in a container without an init; the second child has no environment, as one that writes its title over it."""
    start = f"subprocess.Popen([sys.executable, '-c', '{SLEEP}']"
    leader = spawn(
        f"import subprocess, sys, time; a = {start}); b = {start}, env={{}}); print(a.pid, b.pid, flush=True); "
        "time.sleep(60)",
        tmp_path,
    )
    log = tmp_path / "log"
    wait_until(lambda: log.read_text().endswith("\n"))
    unreaped = processes._children.pop(leader.pid)
    psutil.Process(leader.pid).kill()
    wait_until(lambda: not runs(leader.pid))
    try:
        assert processes.end(leader, grace_seconds=1) == 2
        assert not any(runs(int(pid)) for pid in log.read_text().split())
    finally:
        unreaped.wait()


def test_a_process_that_ignores_the_request_is_killed(tmp_path: Path) -> None:
    deaf = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); " + SLEEP
    leader = spawn(deaf, tmp_path)
    wait_until(lambda: "deaf" in (tmp_path / "log").read_text())
    processes.end(leader, grace_seconds=0.2)
    assert not runs(leader.pid)


def test_another_program_that_was_given_the_same_pid_is_left_alone(tmp_path: Path) -> None:
    stranger = subprocess.Popen([sys.executable, "-c", SLEEP], start_new_session=True)
    try:
        earlier = processes.ProcessIdentity(pid=stranger.pid, born="an earlier birth", mark="not this one's")
        assert not processes.is_alive(earlier)
        assert processes.end(earlier) == 0
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


def test_a_child_that_ended_does_not_count_as_alive(tmp_path: Path) -> None:
    leader = spawn("pass", tmp_path)
    wait_until(lambda: not processes.is_alive(leader))
    assert processes.family(leader) == []


def test_a_process_without_the_mark_is_not_ended_however_well_it_is_known(tmp_path: Path) -> None:
    ours = spawn(SLEEP, tmp_path)
    stranger = subprocess.Popen([sys.executable, "-c", SLEEP], start_new_session=True)
    born = processes._born(stranger.pid)
    assert born is not None
    try:
        wait_until(lambda: psutil.Process(stranger.pid).environ() != {})
        for mark in ("x", ours.mark):
            planted = processes.ProcessIdentity(pid=stranger.pid, born=born, mark=mark)
            assert not processes.is_alive(planted)
            assert stranger.pid not in {member.pid for member in processes.family(planted)}
        assert processes.end(planted) == 1  # what carries the mark is ours, and ends
        assert not runs(ours.pid)
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


def test_a_session_in_which_nobody_carries_the_mark_is_left_alone(tmp_path: Path) -> None:
    leader = subprocess.Popen(
        [sys.executable, "-c", offspring(detached=False)], start_new_session=True, stdout=subprocess.PIPE
    )
    assert leader.stdout is not None
    child = int(leader.stdout.readline())
    leader.kill()
    leader.wait()
    try:
        planted = processes.ProcessIdentity(pid=leader.pid, born="an earlier birth", mark="x")
        assert processes.end(planted) == 0
        assert runs(child)
    finally:
        psutil.Process(child).kill()


@pytest.mark.parametrize("blanked", [0.5, 1.0], ids=["its beginning", "all of it"])
def test_a_process_that_blanks_its_environment_holds_nobody_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, blanked: float
) -> None:
    leader, read = spawn(SLEEP, tmp_path), Path.read_text
    mark = f"{processes.MARK_VARIABLE}={leader.mark}"

    def text(path: Path, *_: object, **how: str) -> str:
        if path == Path(f"/proc/{leader.pid}/environ"):
            return "\0" * 15 + (mark + "\0" if blanked < 1 else "")
        return read(path, **how)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", text)
        patch.setattr(processes, "_EXEC_SECONDS", 0.05)
        assert processes.is_alive(leader) == (blanked < 1)
    assert processes.end(leader, grace_seconds=1) == 1


def test_a_process_is_ended_in_the_moment_in_which_it_has_no_environment_yet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leader, read = spawn(SLEEP, tmp_path), Path.read_text
    empty = ["", "", ""]

    def text(path: Path, *_: object, **how: str) -> str:
        if path == Path(f"/proc/{leader.pid}/environ") and empty:
            return empty.pop()
        return read(path, **how)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", text)
        patch.setattr(processes, "_EXEC_SECONDS", 60.0)
        assert processes.end(leader, grace_seconds=1) == 1
    assert not runs(leader.pid)
