"""Nothing is read, written or obeyed that another user may have planted."""

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from ddpm_pipeline.errors import UserError
from ddpm_pipeline.private_files import (
    SAFE_VARIABLE,
    STATE_VARIABLE,
    open_private,
    private_folder,
    read_private,
    require_own,
    state_folder,
)

AsAnotherUser = Callable[[], None]


def test_a_folder_is_made_for_its_user_alone(tmp_path: Path) -> None:
    made = private_folder(tmp_path / "a" / "b")
    assert stat.S_IMODE(made.stat().st_mode) == 0o700
    assert private_folder(made) == made


@pytest.mark.parametrize("mode", [0o770, 0o777, 0o1777, 0o702])
def test_a_folder_that_others_may_write_to_is_refused_with_what_to_do(tmp_path: Path, mode: int) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(mode)
    with pytest.raises(UserError, match=r"open: others may write to it \(mode .*chmod go-w"):
        private_folder(tmp_path / "open")


def test_a_folder_of_another_user_is_refused_unless_it_is_called_safe(
    tmp_path: Path, as_another_user: AsAnotherUser, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = private_folder(tmp_path / "theirs")
    (folder / "file").write_text("x")
    as_another_user()
    with pytest.raises(UserError, match=f"theirs: belongs to user .*set {SAFE_VARIABLE}="):
        require_own(folder)
    with pytest.raises(UserError, match=r"file: belongs to user .*; remove it"):
        open_private(folder / "file")
    monkeypatch.setenv(SAFE_VARIABLE, f"/elsewhere:{folder}")
    require_own(folder)
    assert read_private(folder / "file", 10) == b"x"
    monkeypatch.setenv(SAFE_VARIABLE, f"relative:{folder}-2")
    with pytest.raises(UserError, match="belongs to user"):
        require_own(folder)


def test_a_folder_that_is_removed_while_it_is_looked_at_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, attempts = Path.mkdir, list[Path]()

    def removed_at_first(path: Path, **how: object) -> None:
        attempts.append(path)
        if (
            len(attempts) == 1
        ):  # what Python says where the folder is gone by the time that it asks for its kind
            raise FileExistsError
        make(path, **how)  # type: ignore[arg-type]

    monkeypatch.setattr(Path, "mkdir", removed_at_first)
    assert private_folder(tmp_path / "spool").is_dir()
    assert len(attempts) == 2


def test_a_link_counts_as_its_owner_s_and_as_what_it_points_at(
    tmp_path: Path, as_another_user: AsAnotherUser
) -> None:
    private_folder(tmp_path / "real")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    require_own(tmp_path / "link")
    with pytest.raises(UserError, match="dangling: is no folder"):
        private_folder(tmp_path / "dangling")
    (tmp_path / "real").chmod(0o777)
    with pytest.raises(UserError, match="link: others may write"):
        require_own(tmp_path / "link")
    as_another_user()
    with pytest.raises(UserError, match="link: belongs to"):
        require_own(tmp_path / "link")


def plant(place: Path, victim: Path, kind: str) -> None:
    if kind == "link":
        place.symlink_to(victim)
    elif kind == "hard link":
        place.hardlink_to(victim)
    elif kind == "pipe":
        os.mkfifo(place)
    else:
        place.mkdir()


@pytest.mark.parametrize("kind", ["link", "hard link", "pipe", "folder"])
@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_RDWR | os.O_CREAT, os.O_WRONLY | os.O_CREAT])
def test_what_was_planted_in_a_file_s_place_is_neither_followed_nor_waited_for(
    tmp_path: Path, kind: str, flags: int
) -> None:
    victim = tmp_path / "victim"
    victim.write_text("ten years of work")
    plant(tmp_path / "place", victim, kind)
    with pytest.raises(UserError, match=r"place: is .*; remove it"):
        open_private(tmp_path / "place", flags)
    assert victim.read_text() == "ten years of work"


def test_a_file_is_made_for_its_user_alone_and_read_up_to_a_limit(tmp_path: Path) -> None:
    with open(open_private(tmp_path / "file", os.O_WRONLY | os.O_CREAT), "wb") as file:
        file.write(b"12345")
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o600
    assert read_private(tmp_path / "file", 5) == b"12345"
    with pytest.raises(UserError, match="longer than 4 bytes"):
        read_private(tmp_path / "file", 4)
    with pytest.raises(FileNotFoundError):
        read_private(tmp_path / "none", 4)


def test_state_lies_in_the_user_s_own_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(STATE_VARIABLE, str(tmp_path / "state"))
    assert state_folder("spool") == tmp_path / "state" / "ddpm" / "spool"
    monkeypatch.setenv(STATE_VARIABLE, "relative")  # which the XDG specification says to ignore
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert state_folder("spool") == tmp_path / "home" / ".local" / "state" / "ddpm" / "spool"


def test_where_there_is_no_home_state_lies_in_a_folder_of_one_user_that_nobody_can_plant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "home").write_text("a file, so that nothing can be made below it")
    monkeypatch.delenv(STATE_VARIABLE)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    own = tmp_path / f"ddpm-{os.geteuid()}"
    assert state_folder("locks") == own / "locks"
    own.chmod(0o777)
    with pytest.raises(UserError, match="others may write"):
        state_folder("locks")
