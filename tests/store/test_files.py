"""What is particular to `file://`."""

import os
import signal
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.store import FileStore, atomic_file, open_store


def test_a_plain_path_and_a_file_uri_are_the_same_store(tmp_path: Path) -> None:
    folder = tmp_path / "with space"
    assert open_store(str(folder)).uri == open_store(folder.as_uri()).uri
    open_store(folder.as_uri()).write("x", b"1")
    assert (folder / "x").read_bytes() == b"1"


@pytest.mark.parametrize(
    ("uri", "complaint"),
    [
        ("", "is empty"),
        ("s3://", "no bucket"),
        ("gs://bucket/x", "unknown scheme 'gs'"),
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


def test_a_writer_killed_halfway_is_never_seen(tmp_path: Path) -> None:
    script = """
        import sys, pathlib
        from pipeline.store import atomic_file
        with atomic_file(pathlib.Path(sys.argv[1]) / "x") as file:
            file.write(b"half")
            file.flush()
            print("half", flush=True)
            sys.stdin.read()
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"half\n"
        child.send_signal(signal.SIGKILL)
    assert os.listdir(tmp_path) != []
    assert list(open_store(str(tmp_path)).list()) == []


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
