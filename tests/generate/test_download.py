"""A download is the generation or data set itself, and nothing that is not whole is ever seen in its folder."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest

from ddpm_pipeline.data.formats.images import PixelShape, decode_image
from ddpm_pipeline.data.formats.shards import read_shard
from ddpm_pipeline.data.index import Index, ShardEntry, content_digest, load_index
from ddpm_pipeline.data.packing.build_index import build_index
from ddpm_pipeline.data.reading.download_dataset import Download, RemoteObject
from ddpm_pipeline.data.reading.sequential import read_sequential
from ddpm_pipeline.data.reading.unpack import folder_names
from ddpm_pipeline.errors import DamageError, DiskFull, UserError
from ddpm_pipeline.generate.verification import verify
from ddpm_pipeline.jobs.download import run
from ddpm_pipeline.jobs.runner import DONE, FAILED, INTERRUPTED, REFUSED, handle_errors
from ddpm_pipeline.store import FileStore, StoreUnreachable, open_store
from ddpm_pipeline.store.download_folder import MARKER, Folder
from ddpm_pipeline.store.interface import TEMP_PREFIX
from tests.data.making import sixty, small_set
from tests.effort import long
from tests.generate.tiny import contents, fill, settings, tiny_model


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a generation of 23 samples in three shards, and a packed set of sixty in six."""
    place = tmp_path_factory.mktemp("made")
    fill(settings(tiny_model(place / "model"), f"file://{place}/generation", count=23))
    sixty(f"file://{place}/set")
    return place


@pytest.fixture(params=["generation", "set"])
def source(
    request: pytest.FixtureRequest, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A copy of either."""
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(made / request.param, tmp_path / "source"))


@pytest.fixture
def generation(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(made / "generation", tmp_path / "source"))


@pytest.fixture
def packed(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(made / "set", tmp_path / "source"))


def files(folder: Path) -> dict[str, bytes]:
    """Everything below a folder but temporary files and the mark of a download."""
    found = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(TEMP_PREFIX))
    return {str(path.relative_to(folder)): path.read_bytes() for path in found if path.name != MARKER}


def wanted(source: Path) -> dict[str, bytes]:
    """What a download of it has: all but the papers of a pack that is under way."""
    return {
        name: data
        for name, data in files(source).items()
        if name not in ("pack-plan.json", "pack-source.json")
    }


def last(source: Path) -> str:
    return "manifest.json" if (source / "manifest.json").exists() else "index.json"


def some_shard(source: Path) -> Path:
    return sorted(source.rglob("*.tar"))[1]


def rot(path: Path) -> None:
    """Change a byte in the middle, so that size and name stay what they were."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    stamp = path.stat()
    path.write_bytes(data)
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))


def test_everything_is_there_byte_for_byte(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(str(source), "here") == DONE
    assert files(Path("here")) == wanted(source)
    again = "ddpm verify file://" if last(source) == "manifest.json" else "ddpm inspect "
    assert f"next     {again}{Path('here').absolute()}\n" in capsys.readouterr().out


def test_a_downloaded_generation_is_sound(generation: Path) -> None:
    run(str(generation), "here", unpack=True)
    assert verify("here").ok


def test_a_downloaded_data_set_opens_with_the_same_digest(packed: Path) -> None:
    run(str(packed), "here")
    assert load_index("here").digest == load_index(str(packed)).digest


class Killed(BaseException):
    """The process is gone."""


def die_at(number: int, monkeypatch: pytest.MonkeyPatch) -> Callable[[], bool]:
    """No file takes its place from the `number`-th on, and nothing is cleared away; tells whether it came to that."""
    replace, unlink, done = os.replace, Path.unlink, [0]

    def counted(old: Path, new: Path) -> None:
        done[0] += 1
        if done[0] > number:
            raise Killed
        replace(old, new)

    def kept(path: Path, missing_ok: bool = False) -> None:
        if not path.name.startswith(TEMP_PREFIX):
            unlink(path, missing_ok)

    monkeypatch.setattr(os, "replace", counted)
    monkeypatch.setattr(Path, "unlink", kept)
    return lambda: done[0] > number


def test_killed_at_any_write_it_shows_nothing_half_and_goes_on(
    source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, kills, died = wanted(source), 0, True
    while died:
        shutil.rmtree("here", ignore_errors=True)
        with pytest.MonkeyPatch.context() as patch:
            dead = die_at(kills, patch)
            try:
                run(str(source), "here")
            except Killed:
                there = files(Path("here"))
                assert last(source) not in there
                assert there.items() <= whole.items()
            died = dead()
        shards = len(list(Path("here").rglob("*.tar")))
        assert run(str(source), "here", as_json=True) == DONE
        assert files(Path("here")) == whole
        if died:
            printed = json.loads(capsys.readouterr().out)
            assert printed["shards_kept"] == shards
            kills += 1
    assert kills > len(list(source.rglob("*.tar")))


def test_a_file_that_is_there_and_rotten_is_fetched_again(
    source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(str(source), "here")
    rot(some_shard(Path("here")))
    capsys.readouterr()
    run(str(source), "here", as_json=True)
    assert json.loads(capsys.readouterr().out)["shards_fetched"] == 1
    assert files(Path("here")) == wanted(source)


def test_a_rotten_shard_is_named_the_rest_is_brought_and_nothing_says_whole(source: Path) -> None:
    shard = some_shard(source)
    sound = shard.read_bytes()
    rot(shard)
    with pytest.raises(
        DamageError, match=rf"{shard.name}: is damaged: .*; everything else was downloaded; (run|restore) "
    ):
        run(str(source), "here")
    shards = len(list(source.rglob("*.tar")))
    assert len(list(Path("here").rglob("*.tar"))) == shards - 1
    assert not (Path("here") / last(source)).exists()
    stamp = shard.stat()
    shard.write_bytes(sound)
    os.utime(shard, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert run(str(source), "here") == DONE
    assert files(Path("here")) == wanted(source)


def test_an_incomplete_generation_is_refused_with_the_remedy(generation: Path) -> None:
    (generation / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"is not complete; the same ddpm generate command .*count=23"):
        run(str(generation), "here")
    assert not Path("here").exists()


def test_a_generation_that_lost_a_shard_is_refused(generation: Path) -> None:
    some_shard(generation).unlink()
    with pytest.raises(UserError, match=r"shards/000001.tar: is missing.*ddpm verify"):
        run(str(generation), "here")
    assert not Path("here").exists()


def test_a_place_with_neither_kind_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert handle_errors(lambda: run("nothing", "here")) == REFUSED
    assert not Path("here").exists()


def test_another_generation_in_the_folder_is_refused_and_kept(made: Path, generation: Path) -> None:
    fill(settings(made / "model", Path("here").absolute().as_uri(), count=5, seed=1))
    before = files(Path("here"))
    with pytest.raises(UserError, match=r"already holds another generation .seed: 1 stored, 0 requested"):
        run(str(generation), "here")
    assert files(Path("here")) == before


def test_a_folder_with_anything_else_in_it_is_refused_and_kept(source: Path) -> None:
    Path("here").mkdir()
    Path("here/letter.txt").write_text("mine")
    with pytest.raises(UserError, match=r"already holds letter.txt; choose an empty folder"):
        run(str(source), "here")
    assert files(Path("here")) == {"letter.txt": b"mine"}


def test_another_data_set_in_the_folder_is_refused(packed: Path) -> None:
    small_set(Path("other").absolute().as_uri())
    run("other", "here")
    with pytest.raises(UserError, match=r"holds the data set .*, not the data set "):
        run(str(packed), "here")


@pytest.mark.parametrize("place", ["source", "source/inside", "s3://bucket/x"])
def test_only_a_folder_apart_from_the_source_will_do(generation: Path, place: str) -> None:
    assert handle_errors(lambda: run("source", place)) == REFUSED


def test_a_larger_count_replaces_the_tail_that_was_brought_before(made: Path, generation: Path) -> None:
    run(str(generation), "here")
    shutil.rmtree(generation)
    fill(settings(made / "model", generation.as_uri(), count=38))
    assert run(str(generation), "here") == DONE
    assert contents(open_store("here")) == contents(open_store(str(generation)))
    assert sorted(path.name for path in Path("here/shards").glob("*-*")) == ["000003-0008.tar"]


def test_unpacked_images_of_a_generation_have_the_pixels_of_its_samples(generation: Path) -> None:
    run(str(generation), "here", unpack=True)
    samples = {
        key: (parts["png"], json.loads(parts["json"])["class"])
        for shard in sorted(generation.rglob("*.tar"))
        for key, parts in read_shard(shard)
    }
    names = ("nought", "one", "two")
    assert files(Path("here-images")) == {
        f"{names[label]}/{key}.png": data for key, (data, label) in samples.items()
    }
    assert len(samples) == 23


def test_unpacked_images_of_a_data_set_have_its_pixels(packed: Path) -> None:
    run(str(packed), "here", unpack=True)
    index = load_index(str(packed))
    there = files(Path("here-images"))
    assert len(there) == 60
    for number, sample in enumerate(read_sequential(index)):
        assert index.class_names is not None
        data = there[f"{index.class_names[sample.label]}/{number:012d}.png"]
        assert np.array_equal(decode_image(data, (8, 8, 3)), sample.pixels)


def test_unpacking_goes_on_and_mends_what_was_cut(generation: Path) -> None:
    run(str(generation), "here", unpack=True)
    whole = files(Path("here-images"))
    kept = Path("here-images/one/000000000001.png").stat()
    Path("here-images/two/000000000002.png").write_bytes(b"")
    Path("here-images/two/000000000005.png").unlink()
    run(str(generation), "here", unpack=True)
    assert files(Path("here-images")) == whole
    assert Path("here-images/one/000000000001.png").stat() == kept


def test_a_pattern_of_tars_without_labels_comes_with_its_own_index(tmp_path: Path) -> None:
    made: Index = small_set(f"{tmp_path.as_uri()}/set")
    assert run(f"file://{tmp_path}/set", f"{tmp_path}/plain") == DONE
    build_index(f"file://{tmp_path}/set/00{{0..2}}.tar")
    assert run(f"file://{tmp_path}/set/00{{0..2}}.tar", f"{tmp_path}/part") == DONE
    assert load_index(f"{tmp_path}/part/00{{0..2}}.tar").num_samples == int(made.counts[:3].sum())
    assert sorted(path.name for path in (tmp_path / "part").glob("*.tar")) == [
        "000.tar",
        "001.tar",
        "002.tar",
    ]


def test_a_full_disk_is_one_line(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int) -> None:
        if "/here/" in os.readlink(f"/proc/self/fd/{fd}"):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskFull, match=r"here/.*: no room left on the disk; make room there"):
        run(str(source), "here")
    assert handle_errors(lambda: run(str(source), "here")) == FAILED
    assert files(Path("here")) == {}


@pytest.mark.parametrize(
    "name", ["../out.tar", "/out.tar", "a/../../out.tar", "./out.tar", "a//out.tar", "a\\..\\x"]
)
def test_a_name_from_a_bucket_leads_nowhere_else(packed: Path, name: str) -> None:
    with pytest.raises(DamageError):
        Folder(Path("here")).put(name, b"x")
    document = json.loads((packed / "index.json").read_bytes())
    document["shards"][0]["name"] = name
    (packed / "index.json").write_text(json.dumps(document))
    assert handle_errors(lambda: run(str(packed), "here")) == FAILED
    assert files(Path("here")) == {}


def leave_free(num_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage

    def told(path: Path) -> object:
        return usage(path)._replace(free=num_bytes)

    monkeypatch.setattr(shutil, "disk_usage", told)


def test_what_cannot_fit_is_refused_before_a_shard_is_fetched(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave_free(30_000, monkeypatch)
    with pytest.raises(DiskFull, match=r"here: [0-9,]+ bytes to download and 30,000 free; free disk space"):
        run(str(source), "here")
    assert list(Path("here").rglob("*.tar")) == []


def test_what_is_there_needs_no_room(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(str(source), "here")
    leave_free(0, monkeypatch)
    assert run(str(source), "here") == DONE


class Endless(FileStore):
    """One object fails after a while, the others never end."""

    def open(self, key: str, *, start: int = 0, etag: str | None = None) -> BinaryIO:
        class Stream(BytesIO):
            asked = 0

            def read(self, size: int | None = -1) -> bytes:
                self.asked += 1
                if key == "fails" and self.asked == 100:
                    raise StoreUnreachable("away")
                return b"x"

        return Stream()


def test_an_outage_in_one_shard_ends_the_others_at_once(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "here")
    download = Download(Endless(tmp_path), folder, 1, lambda done, total: None)
    pieces = [RemoteObject(key, 1 << 40, "0" * 64) for key in ("fails", "goes-on")]
    with pytest.raises(StoreUnreachable):
        download.process_all(download.download, pieces, "")
    assert list(folder.root.iterdir()) == []


INTERRUPTED_DOWNLOAD = """
import sys, time
from io import BytesIO
from threading import Event, Lock
from ddpm_pipeline.jobs.download import run
from ddpm_pipeline.jobs.runner import handle_errors
from ddpm_pipeline.store import FileStore

source, folder, manner = sys.argv[1:]
count, lock, opened = 0, Lock(), FileStore.open

class Slow(BytesIO):
    def read(self, size=-1):
        self.reads = getattr(self, "reads", 0) + 1
        if self.reads == 1:
            return super().read(100)
        if manner == "hangs":
            Event().wait()
        time.sleep(0.01)
        return b"x"

def open_slowly(self, key, **how):
    global count
    if not key.endswith(".tar") or "source" not in self.uri:
        return opened(self, key, **how)
    with lock:
        count += 1
        if count == 3:
            print("under way", flush=True)
    return Slow(opened(self, key, **how).read())

FileStore.open = open_slowly
sys.exit(handle_errors(lambda: run(source, folder)))
"""


@pytest.mark.parametrize("manner", [long("hangs"), "is slow"])
def test_ctrl_c_ends_a_download_without_waiting_for_its_shards(packed: Path, manner: str) -> None:
    command = [sys.executable, "-c", INTERRUPTED_DOWNLOAD, str(packed), "here", manner]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "under way\n"
            process.send_signal(signal.SIGINT)
            _, printed = process.communicate(timeout=100)  # waiting for the shards would take for ever
        finally:
            process.kill()
    assert process.returncode == INTERRUPTED
    assert "stopped: shards that are whole stay; the same command fetches the rest" in printed
    assert "Traceback" not in printed
    there = files(Path("here"))
    assert not [name for name in there if name.endswith(".tar") or name == last(packed)]
    if manner == "is slow":  # a thread that hangs leaves what a killed process does
        assert not [path for path in Path("here").rglob(f"{TEMP_PREFIX}*") if path.is_file()]
    assert run(str(packed), "here") == DONE
    assert files(Path("here")) == wanted(packed)


def test_an_index_that_gives_a_shard_its_own_name_is_refused(packed: Path) -> None:
    document = json.loads((packed / "index.json").read_bytes())
    document["shards"][0]["name"] = "index.json"
    shards = [ShardEntry.model_validate(shard) for shard in document["shards"]]
    document["digest"] = content_digest(shards, PixelShape(**document["image"]), document["class_names"])
    (packed / "index.json").write_text(json.dumps(document))
    assert handle_errors(lambda: run(str(packed), "here")) in (FAILED, REFUSED)
    assert not Path("here").exists()


def test_links_in_the_folder_are_not_followed(source: Path) -> None:
    run(str(source), "here")
    Path("elsewhere").mkdir()
    Path("elsewhere/secret").write_text("mine")
    shards = Path("here/shards")
    first = sorted(shards.iterdir())[0]
    first.unlink()
    first.symlink_to(Path("elsewhere/secret").absolute())
    assert run(str(source), "here") == DONE
    assert files(Path("here")) == wanted(source)
    shutil.rmtree(shards)
    shards.symlink_to(Path("elsewhere").absolute())
    with pytest.raises(UserError, match="here/shards: is a link"):
        run(str(source), "here")
    assert files(Path("elsewhere")) == {"secret": b"mine"}


def test_class_names_become_folders_that_differ_and_lead_nowhere() -> None:
    names = [
        "../../etc",
        "a/b",
        "a_b",
        "A_B",
        "",
        "..",
        "cat\x1b[31m",
        "n01440764: tench",
        "日本",
        "x" * 500,
        "-rf",
    ]
    folders = folder_names(names)
    assert folders[:4] == ["_.._etc", "a_b", "a_b-2", "A_B-3"]
    assert folders[7:9] == ["n01440764_ tench", "日本"]
    assert len({name.casefold() for name in folders}) == len(names)
    assert all(
        name and "/" not in name and name[0] not in ".-" and len(name.encode()) <= 110 for name in folders
    )
    assert all(name.isprintable() for name in folders)


def test_progress_counts_every_byte_once(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(str(source), "here")
    total = sum(path.stat().st_size for path in source.rglob("*.tar"))
    assert f"download {total}/{total} bytes (100%)" in capsys.readouterr().err


def test_the_folder_may_be_opened_as_a_store_and_brought_once_more(source: Path) -> None:
    run(str(source), "here")
    assert run("here", "there") == DONE
    assert files(Path("there")) == files(Path("here"))
    assert open_store("there").stat(last(source)) is not None
