"""What is particular to `file://`."""

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ddpm_pipeline.errors import UserError
from ddpm_pipeline.store import FileStore, atomic_file, open_store
from ddpm_pipeline.store.file_store import TEMP_AGE_SECONDS


def test_a_plain_path_and_a_file_uri_are_the_same_store(tmp_path: Path) -> None:
    folder = tmp_path / "with space"
    assert open_store(str(folder)).uri == open_store(folder.as_uri()).uri
    open_store(folder.as_uri()).write("x", b"1")
    assert (folder / "x").read_bytes() == b"1"


@pytest.mark.parametrize("name", ["a#b", "what?", "100%", "a b", "x#y?z=1", "ü"])
def test_what_a_file_uri_names_is_the_place_that_is_written_to(tmp_path: Path, name: str) -> None:
    for uri in (f"file://{tmp_path}/{name}", (tmp_path / name).as_uri(), str(tmp_path / name)):
        store = open_store(uri)
        store.write("x", uri.encode())
        assert (tmp_path / name / "x").read_bytes() == uri.encode()
        assert open_store(store.uri).uri == store.uri


@pytest.mark.parametrize(
    ("uri", "complaint"),
    [
        ("", "is empty"),
        ("s3://", "no bucket"),
        ("gs://bucket/x", "unknown scheme 'gs'"),
        ("s3://[bucket/x", "Invalid IPv6 URL; write s3://bucket/prefix"),
        ("file://host/x", "not an absolute path"),
    ],
)
def test_addresses_of_no_known_kind_are_refused(uri: str, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        open_store(uri)


def test_a_file_in_place_of_the_directory_is_named(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"")
    with pytest.raises(UserError, match="is a file, not a directory"):
        open_store(str(tmp_path / "f")).require_container()


def test_a_write_that_fails_halfway_leaves_the_old_object_and_nothing_else(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    store.write("x", b"old")

    def write_half() -> None:
        with atomic_file(tmp_path / "x") as file:
            file.write(b"ne")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write_half()
    assert store.read("x") == b"old"
    assert os.listdir(tmp_path) == ["x"]


WRITER = """
    import sys, pathlib
    from ddpm_pipeline.store import atomic_file
    with atomic_file(pathlib.Path(sys.argv[1]) / "x") as file:
        file.write(b"half")
        file.flush()
        print("half", flush=True)
        sys.stdin.read()
"""


@contextlib.contextmanager
def halfway(folder: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """A process in the middle of writing an object; killed afterwards, if it is still there."""
    command = [sys.executable, "-c", textwrap.dedent(WRITER), str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"half\n"
        yield child
        child.send_signal(signal.SIGKILL)


def make_old(folder: Path) -> Path:
    """The one temporary file there, as if written long ago."""
    (temp,) = folder.glob(".tmp-*")
    long_ago = time.time() - 2 * TEMP_AGE_SECONDS
    os.utime(temp, (long_ago, long_ago))
    return temp


def test_a_writer_killed_halfway_is_never_seen_and_swept_in_time(tmp_path: Path) -> None:
    with halfway(tmp_path):
        pass
    store = open_store(str(tmp_path))
    assert list(store.list()) == []
    assert (
        len(os.listdir(tmp_path)) == 1
    )  # it is young: it may be another machine's, whose lock is not seen here
    make_old(tmp_path)
    assert list(store.list()) == []
    assert os.listdir(tmp_path) == []


def test_a_living_writers_file_is_never_swept_however_old(tmp_path: Path) -> None:
    with halfway(tmp_path) as writer:
        temp = make_old(tmp_path)
        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(lambda _: list(open_store(str(tmp_path)).list()), range(40))) == [[]] * 40
        assert temp.exists()
        writer.communicate(b"", timeout=60)
        assert writer.returncode == 0
    assert (tmp_path / "x").read_bytes() == b"half"


def test_many_sweepers_of_one_leftover_do_not_disturb_each_other(tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    for number in range(30):
        (tmp_path / "shards" / f".tmp-{number}").write_bytes(b"left")
        os.utime(tmp_path / "shards" / f".tmp-{number}", (0, 0))
    store = open_store(str(tmp_path))
    store.write("shards/a", b"1")
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: [info.key for info in store.list()], range(16)))
    assert found == [["shards/a"]] * 16
    assert os.listdir(tmp_path / "shards") == ["a"]


def test_deleting_the_last_object_of_a_directory_removes_the_directory(tmp_path: Path) -> None:
    store = FileStore(tmp_path / "root")
    store.write("a/b/c", b"1")
    store.delete("a/b/c")
    assert os.listdir(tmp_path / "root") == []


def test_a_directory_that_another_process_empties_meanwhile_is_made_again(tmp_path: Path) -> None:
    store = FileStore(tmp_path / "root")

    def come_and_go(name: int) -> None:
        for _ in range(100):
            store.write(f"a/b/{name}", b"1")
            store.delete(f"a/b/{name}")

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(come_and_go, range(4)))
    assert os.listdir(tmp_path / "root") == []
