"""What is written stays written, and damage is skipped and does not spread."""

import errno
import json
import logging
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ddpm_pipeline.errors import UserError
from ddpm_pipeline.tracking import journal as journal_module
from ddpm_pipeline.tracking.journal import Journal, SpoolIdentity, read_identity, write_identity
from ddpm_pipeline.tracking.spool_records import PointRecord


def _steps(journal: Journal, offset: int = 0) -> list[int]:
    return [e.record.s for e in journal.read(offset, 10_000) if isinstance(e.record, PointRecord)]


def _point(step: int) -> dict[str, object]:
    return {"t": 1000 + step, "s": step, "m": {"loss": 0.5}}


def test_records_come_back_in_order_and_from_any_offset(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    for step in range(5):
        journal.append(_point(step))
    entries = journal.read(0, 2)
    assert len(entries) == 2
    assert _steps(journal, entries[-1].end) == [2, 3, 4]


def test_a_torn_last_line_costs_only_itself(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Journal(tmp_path).append(_point(0))
    with (tmp_path / "points.jsonl").open("ab") as stream:
        stream.write(b'{"t": 1, "s": 1, "m"')
    journal = Journal(tmp_path)
    journal.append(_point(2))
    with caplog.at_level(logging.WARNING):
        assert _steps(journal) == [0, 2]
    assert "damaged line" in caplog.text


def test_a_line_still_being_written_is_not_read_yet(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.append(_point(0))
    with (tmp_path / "points.jsonl").open("ab") as stream:
        stream.write(b'{"t": 1, "s": 1')
        stream.flush()
        seen = journal.read(0, 10)
        assert len(seen) == 1
        stream.write(b', "m": {"loss": 1}}\n')
    assert _steps(journal, seen[-1].end) == [1]


def test_a_full_disk_loses_nothing_once_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = Journal(tmp_path)
    journal.append(_point(0))
    real_write, refusals = os.write, iter([True] * 3)

    def write(fd: int, data: bytes) -> int:
        if next(refusals, False):
            raise OSError(errno.ENOSPC, "No space left on device")
        return real_write(fd, data)

    monkeypatch.setattr(journal_module.os, "write", write)
    for step in (1, 2, 3):
        journal.append(_point(step))
    assert _steps(journal) == [0]
    assert journal.undelivered() == 4
    journal.sync()
    assert _steps(journal) == [0, 1, 2, 3]
    assert journal.lost == 0


def test_a_half_written_line_is_written_again_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(tmp_path)
    real_write, cuts = os.write, iter([10])
    monkeypatch.setattr(journal_module.os, "write", lambda fd, data: real_write(fd, data[: next(cuts, None)]))
    journal.append(_point(0))
    journal.append(_point(1))
    assert _steps(journal) == [0, 1]


def test_memory_stays_bounded_while_the_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    journal = Journal(tmp_path)
    monkeypatch.setattr(journal_module.os, "write", full)
    monkeypatch.setattr(journal_module, "_MAX_PENDING_LINES", 10)
    for step in range(25):
        journal.append(_point(step))
    assert journal.lost == 15
    assert journal.undelivered() == 10


@pytest.mark.parametrize(
    "saved", ["", "nonsense", '{"offset": -4}', '{"offset": 999999}', '{"offset": "5"}', "[]"]
)
def test_an_unusable_offset_means_from_the_start(tmp_path: Path, saved: str) -> None:
    journal = Journal(tmp_path)
    journal.append(_point(0))
    (tmp_path / "offset.json").write_text(saved)
    assert journal.offset() == 0


def test_what_waits_is_counted_in_points_and_files(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.append({"t": 1, "s": 0, "m": {"a": 1.0, "b": 2.0}})
    journal.append({"t": 1, "s": 0, "i": "samples", "f": journal.put_file(b"png", ".png")})
    assert journal.undelivered() == 3
    journal.save_offset(journal.read(0, 1)[-1].end)
    assert journal.undelivered() == 1


def test_only_one_process_delivers_and_death_frees_the_place(tmp_path: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path; from ddpm_pipeline.tracking.journal import Journal\n"
        "print(Journal(Path(sys.argv[1])).claim(), flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline().strip() == "True"
        journal = Journal(tmp_path)
        assert not journal.claim()
    finally:
        holder.kill()
        holder.wait()
    assert journal.claim()


def test_a_directory_belongs_to_one_run(tmp_path: Path) -> None:
    write_identity(tmp_path, "run-a", "http://127.0.0.1:1")
    write_identity(tmp_path, "run-a", "http://127.0.0.1:2")
    assert read_identity(tmp_path) == SpoolIdentity(run_id="run-a", tracking_uri="http://127.0.0.1:2")
    with pytest.raises(UserError, match="run-a, not run-b"):
        write_identity(tmp_path, "run-b", "http://127.0.0.1:1")


def test_a_directory_whose_owner_cannot_be_read_is_named_with_what_to_do(tmp_path: Path) -> None:
    deep, path = "[" * 60_000, '{"run_id": "../../home", "tracking_uri": "http://127.0.0.1:1"}'
    for torn in (
        "",
        "[]",
        "{}",
        '{"run_id": "a"',
        deep,
        "9" * 5000,
        path,
        '{"run_id": "\\ud800"}',
        "x" * 100_000,
    ):
        (tmp_path / "run.json").write_text(torn)
        with pytest.raises(UserError, match=r"run\.json: .*remove"):
            read_identity(tmp_path)
        with pytest.raises(UserError, match=r"run\.json: .*remove"):
            write_identity(tmp_path, "run-a", "http://127.0.0.1:1")


def test_a_directory_s_owner_is_on_the_disk_before_it_is_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (order.append("sync"), sync(fd))[1])
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append("replace"), replace(a, b))[1])
    write_identity(tmp_path, "run-a", "http://127.0.0.1:1")
    assert order[:2] == ["sync", "replace"]


def test_refused_records_are_kept_with_their_reason(tmp_path: Path) -> None:
    Journal(tmp_path).dead_letter(_point(3), "too long")
    kept = json.loads((tmp_path / "refused.jsonl").read_text())
    assert kept == {"reason": "too long", "record": _point(3)}


@pytest.mark.parametrize(
    "line",
    [
        '{"t": 1, "p": "x.bin", "f": "/etc/passwd"}',
        '{"t": 1, "p": "x.bin", "f": "../../run.json"}',
        '{"t": 1, "p": "../x.bin", "f": "0123456789abcdef0123456789abcdef.bin"}',
        '{"t": 1, "p": "/x.bin", "f": "0123456789abcdef0123456789abcdef.bin"}',
        '{"t": 1, "s": 1, "i": "a/../\\u0000", "f": "0123456789abcdef0123456789abcdef.png"}',
        '{"t": 1, "s": 1, "m": {"loss": 1.0}, "f": "/etc/passwd"}',
        '{"t": 1, "s": 1, "m": {"a\\u001b[2J": 1.0}}',
        '{"t": 1, "s": 1e400, "m": {}}',
        '{"t": 1, "s": 99999999999999999999, "m": {"loss": 1.0}}',
        '{"t": 1, "s": 1, "m": {"loss": "x"}}',
        "[" * 100_000,
    ],
)
def test_a_line_that_names_what_no_spool_holds_is_passed_over_with_its_reason(
    tmp_path: Path, line: str, caplog: pytest.LogCaptureFixture
) -> None:
    journal = Journal(tmp_path)
    journal.append(_point(0))
    with (tmp_path / "points.jsonl").open("a") as stream:
        stream.write(line + "\n")
    journal.append(_point(2))
    with caplog.at_level(logging.WARNING):
        assert _steps(journal) == [0, 2]
    assert "damaged line" in caplog.text
    assert journal.undelivered() == 2
    assert b"passwd" not in journal.undelivered_lines()


def test_values_that_are_no_finite_number_survive(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.append({"t": 1, "s": 0, "m": {"a": math.inf, "b": -math.inf, "c": math.nan}})
    (entry,) = journal.read(0, 10)
    assert isinstance(entry.record, PointRecord)
    assert (entry.record.m["a"], entry.record.m["b"]) == (math.inf, -math.inf)
    assert math.isnan(entry.record.m["c"])


def test_a_spool_that_another_user_made_is_refused(
    tmp_path: Path, as_another_user: Callable[[], None]
) -> None:
    folder = tmp_path / "spool"
    write_identity(folder, "run-a", "http://127.0.0.1:1")
    as_another_user()
    for use in (Journal, read_identity):
        with pytest.raises(UserError, match=r"belongs to user .*; use a place of your own"):
            use(folder)


@pytest.mark.parametrize("name", ["points.jsonl", "lock", "files", "run.json"])
def test_a_link_in_a_spool_is_not_followed(tmp_path: Path, name: str) -> None:
    (tmp_path / "spool").mkdir(mode=0o700)
    victim = tmp_path / "precious"
    victim.write_text("ten years of work")
    (tmp_path / "spool" / name).symlink_to(victim)

    def use() -> None:
        write_identity(tmp_path / "spool", "run-a", "http://127.0.0.1:1")
        Journal(tmp_path / "spool").claim()

    with pytest.raises(UserError, match=f"{name}: is (a link|no folder)"):
        use()
    assert victim.read_text() == "ten years of work"
