"""Spools are removed once MLflow has all of them, and never before."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from threading import Thread

import pytest

from ddpm_pipeline.errors import UserError
from ddpm_pipeline.tracking import Replayed, replay_all, sweep_spools
from ddpm_pipeline.tracking.journal import Journal, write_identity

LATER = 3600.0
SERVER = "http://127.0.0.1:1"


def spool(root: Path, name: str, delivered: bool = True) -> Path:
    folder = root / name
    write_identity(folder, name, "http://127.0.0.1:1")
    journal = Journal(folder)
    journal.append({"t": 1, "s": 1, "m": {"train/loss": 0.5}})
    if delivered:
        journal.save_offset(journal.read(0, 10)[-1].end)
    journal.close()
    return folder


def sweep(root: Path) -> list[Path]:
    return sweep_spools(root, idle_minutes=30, now_seconds=time.time() + LATER)


def test_only_what_was_delivered_and_is_silent_is_removed(tmp_path: Path) -> None:
    done, waiting, refused = spool(tmp_path, "a"), spool(tmp_path, "b", delivered=False), spool(tmp_path, "c")
    (refused / "refused.jsonl").write_text(json.dumps({"reason": "x", "record": {}}) + "\n")
    recent = spool(tmp_path, "d")
    os.utime(recent / "offset.json", (time.time() + LATER,) * 2)
    (tmp_path / "no-spool").mkdir()
    assert sweep(tmp_path) == [done]
    assert not done.exists()
    assert all(path.exists() for path in (waiting, refused, recent, tmp_path / "no-spool"))


def test_a_file_that_waits_keeps_its_spool(tmp_path: Path) -> None:
    folder = spool(tmp_path, "a")
    journal = Journal(folder)
    journal.append({"t": 1, "p": "figures/final.png", "f": journal.put_file(b"png", ".bin")})
    journal.close()
    assert sweep(tmp_path) == []
    assert folder.exists()


def test_a_spool_that_a_living_process_delivers_is_left_alone(tmp_path: Path) -> None:
    folder = spool(tmp_path, "a")
    living = Journal(folder)
    assert living.claim()
    assert sweep(tmp_path) == []
    living.close()
    assert sweep(tmp_path) == [folder]


def test_a_file_that_goes_while_it_is_looked_at_stops_no_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = spool(tmp_path, "a")
    gone = folder / ".offset.json"  # as a living process renames it into place
    listed = Path.rglob
    monkeypatch.setattr(Path, "rglob", lambda self, pattern: [*listed(self, pattern), gone])
    assert sweep(tmp_path) == [folder]


def test_replaying_many_spools_leaves_no_descriptor_open(tmp_path: Path) -> None:
    folders = [spool(tmp_path, name) for name in "abc"]
    living = Journal(folders[2])
    assert living.claim()
    replay_all(tmp_path, 5, SERVER)  # the first call opens what MLflow's import keeps open
    held = len(os.listdir("/dev/fd"))
    assert replay_all(tmp_path, 5, SERVER) == {folders[0]: Replayed(), folders[1]: Replayed()}
    assert len(os.listdir("/dev/fd")) == held
    living.close()


@pytest.mark.parametrize("root", ["absent", "."])
def test_where_there_is_no_spool_nothing_happens(tmp_path: Path, root: str) -> None:
    assert sweep(tmp_path / root) == []


def test_a_spool_that_is_opened_while_it_is_swept_is_whole_and_keeps_its_points(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = spool(tmp_path, "a")
    opened: list[Journal] = []

    def begin() -> None:
        journal = Journal(folder)
        journal.append({"t": 2, "s": 2, "m": {"train/loss": 0.25}})
        opened.append(journal)

    starting = Thread(target=begin)
    counted = Journal.undelivered

    def undelivered(journal: Journal) -> int:
        if not starting.ident:
            starting.start()  # and waits for the sweep, which is alone with the spool by now
        return counted(journal)

    monkeypatch.setattr(Journal, "undelivered", undelivered)
    assert sweep(tmp_path) == [folder]
    starting.join(10)
    monkeypatch.undo()
    assert opened[0].undelivered() == 1
    assert opened[0].files.is_dir()
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    opened[0].close()


def test_a_spool_that_is_open_is_not_swept(tmp_path: Path) -> None:
    folder = spool(tmp_path, "a")
    living = Journal(folder)  # as a run that starts again: it delivers only later
    assert sweep(tmp_path) == []
    living.close()


def test_a_folder_of_spools_that_another_user_made_is_refused(
    tmp_path: Path, as_another_user: Callable[[], None]
) -> None:
    spool(tmp_path, "a")
    as_another_user()
    with pytest.raises(UserError, match="belongs to"):
        sweep(tmp_path)
    with pytest.raises(UserError, match="belongs to"):
        replay_all(tmp_path, 5, SERVER)
