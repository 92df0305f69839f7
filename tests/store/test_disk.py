"""Disks that are full, failing, read-only or out of names: one line with the place and what to do, by kind."""

import errno
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ddpm_pipeline.disk_errors import disk_error, disk_errors_at
from ddpm_pipeline.errors import DiskFull, Outage, UserError
from ddpm_pipeline.jobs.runner import FAILED, REFUSED, handle_errors
from ddpm_pipeline.store import FileStore, Store, StoreUnreachable
from ddpm_pipeline.store import file_store as files_module
from tests.store.hostile_s3 import Answer, answering

FULL = "no room left on the disk; make room there, or choose another place"


@pytest.mark.parametrize(
    ("number", "kind", "words", "code"),
    [
        (errno.ENOSPC, DiskFull, FULL, FAILED),
        (errno.EDQUOT, DiskFull, "this user's quota is used up; make room there", FAILED),
        (errno.EIO, StoreUnreachable, "the disk does not read or write; look at its health", FAILED),
        (errno.ESTALE, StoreUnreachable, "the file server has lost it; mount it anew", FAILED),
        (errno.ENOTCONN, StoreUnreachable, "the file server is gone; mount it anew", FAILED),
        (errno.EROFS, UserError, "the file system is read-only; choose another place", REFUSED),
        (errno.EACCES, UserError, "no permission; change its mode", REFUSED),
        (errno.EMFILE, UserError, r"too many files are open in this process; raise its limit \(ulimit -n\)", REFUSED),
        (errno.ENFILE, UserError, "too many files are open on this machine; raise its limit", REFUSED),
        (errno.EFBIG, UserError, "the file is too large", REFUSED),
    ],
)  # fmt: skip
def test_what_the_system_refuses_a_file_store_is_a_line_of_the_right_kind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[UserError], words: str, code: int
) -> None:
    store = FileStore(tmp_path / "root")
    store.write("here", b"1")

    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files_module.os, "fsync", refuse)
    (tmp_path / "source").write_bytes(b"2")
    writes: list[Callable[[], object]] = [
        lambda: store.write("a/x", b"2"),
        lambda: store.upload("a/x", tmp_path / "source"),
        lambda: store.download("here", tmp_path / "down"),
    ]
    for write in writes:
        with pytest.raises(UserError, match=rf"({store.uri}/a/x|{tmp_path}/down): {words}") as caught:
            write()
        assert isinstance(caught.value, DiskFull) == (kind is DiskFull)
        assert isinstance(caught.value, Outage) == (kind is StoreUnreachable)
        assert handle_errors(lambda write=write: int(bool(write()))) == code
    assert [info.key for info in store.list()] == ["here"]
    assert not [name for _, _, names in os.walk(tmp_path) for name in names if name.startswith(".tmp")]


@contextmanager
def no_more_files() -> Iterator[None]:
    """No further file can be opened."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with open("/dev/null") as lowest:
        number = lowest.fileno()
    resource.setrlimit(resource.RLIMIT_NOFILE, (number, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_too_many_open_files_are_a_line_for_every_call(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    store.write("a/x", b"1")
    calls: list[Callable[[], object]] = [
        lambda: store.read("a/x"),
        lambda: store.read_range("a/x", 0, 1),
        lambda: store.open("a/x"),
        lambda: store.write("a/y", b"2"),
        lambda: list(store.list()),
    ]
    with no_more_files():
        for call in calls:
            with pytest.raises(UserError, match=r"too many files are open in this process; raise its limit"):
                call()


@pytest.mark.parametrize("call", ["write", "list", "stat", "read"])
def test_a_name_that_no_file_system_takes_is_a_line(tmp_path: Path, call: str) -> None:
    store: Store = FileStore(tmp_path)
    key = "n" * 300
    calls: dict[str, Callable[[], object]] = {
        "write": lambda: store.write(key, b""),
        "stat": lambda: store.stat(key),
        "read": lambda: store.read(key),
        "list": lambda: list(FileStore(tmp_path / key).list()),
    }
    with pytest.raises(UserError, match="the name is too long for the file system; choose a shorter one"):
        calls[call]()


def test_a_file_in_place_of_a_folder_and_a_folder_in_place_of_a_file_are_told(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    store.write("file", b"1")
    store.write("folder/x", b"1")
    with pytest.raises(UserError, match=r"file/x: a file stands where a folder is needed; remove it"):
        store.write("file/x", b"2")
    with pytest.raises(UserError, match=r"folder: a folder stands in its place; remove it"):
        store.write("folder", b"2")


def test_a_full_disk_under_a_download_from_s3_is_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ddpm_pipeline.store.s3_store import S3Store

    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "k")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s")
    answer = Answer(206, b"12345", {"ETag": '"new"', "Content-Range": "bytes 0-4/5"})
    with answering(lambda _: answer) as address:
        monkeypatch.setenv("AWS_ENDPOINT_URL", address)

        def full(*_: object) -> None:
            raise OSError(errno.ENOSPC, "no")

        monkeypatch.setattr(files_module.os, "fsync", full)
        with pytest.raises(DiskFull, match=rf"{tmp_path}/x: {FULL}"):
            S3Store("bucket").download("x", tmp_path / "x")
    assert os.listdir(tmp_path) == []


def test_what_rust_says_of_the_disk_is_understood_and_other_errors_pass(tmp_path: Path) -> None:
    from safetensors import SafetensorError

    with pytest.raises(DiskFull, match=FULL), disk_errors_at(tmp_path):
        raise SafetensorError("I/O error: No space left on device (os error 28)")
    with pytest.raises(FileNotFoundError), disk_errors_at(tmp_path):
        raise FileNotFoundError(errno.ENOENT, "gone")
    assert disk_error(OSError(errno.EACCES, "a port")) is None  # no file is in question
    assert isinstance(disk_error(OSError(errno.ENOSPC, "somewhere")), DiskFull)
