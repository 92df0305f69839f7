"""Sources on the web and in S3 are packed as the same files on disk are, and fetched once."""

import io
import os
import shutil
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO
from unittest.mock import Mock

import pytest

from ddpm_pipeline.config.data import PackConfig
from ddpm_pipeline.data import pack
from ddpm_pipeline.data.index import load_index
from ddpm_pipeline.data.packing.fetch import Entry, FileVersion, RemoteFile
from ddpm_pipeline.data.packing.open_source import open_source, require_source
from ddpm_pipeline.data.packing.pack_dataset import PackReport
from ddpm_pipeline.data.packing.remote_source import fetch_source
from ddpm_pipeline.errors import DamageError, DiskFull, UserError
from ddpm_pipeline.progress import no_progress
from ddpm_pipeline.store import Store, StoreUnreachable, open_store
from tests.data.making import encoded, folder, random_image
from tests.data.web_server import Site, serving
from tests.store.conftest import moto, moto_server, one_loader

__all__ = ["moto", "moto_server", "one_loader"]  # fixtures


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return folder(tmp_path / "images", {"cat": 4, "dog": 3})


@pytest.fixture
def archive(images: Path, tmp_path: Path) -> bytes:
    path = tmp_path / "images.tar"
    with tarfile.open(path, "w") as tar:
        for name in ("cat", "dog"):
            tar.add(images / name, name)
    return path.read_bytes()


@pytest.fixture
def site(archive: bytes) -> Site:
    return Site({"/set/images.tar": archive})


@pytest.fixture
def address(site: Site) -> Iterator[str]:
    with serving(site) as url:
        yield f"{url}/set/images.tar"


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def config(source: str, cache: Path, **settings: object) -> PackConfig:
    dest = (cache.parent / "dest").as_uri()
    return PackConfig.model_validate({"source": source, "dest": dest, "fetch_dir": str(cache), **settings})


def digest_of(source: Path | str, dest: Path) -> str:
    pack(PackConfig(source=str(source), dest=dest.as_uri()))
    return load_index(dest.as_uri()).digest


def bodies(site: Site) -> int:
    """How many files were sent from their first byte on; the question for a version counts as one."""
    return sum(not range_ for _, range_ in site.requests)


def test_an_archive_on_the_web_is_packed_as_the_one_on_disk(
    site: Site, address: str, archive: bytes, cache: Path, tmp_path: Path
) -> None:
    (tmp_path / "images.tar").write_bytes(archive)
    progress: list[tuple[int, int]] = []

    def report(done: int, total: int, note: str = "") -> None:
        progress.append((done, total))

    local = fetch_source(config(address, cache), report)
    assert Path(local.config.source).read_bytes() == archive
    assert progress[-1] == (len(archive), len(archive))
    made = pack(config(address, cache))
    assert (made.num_samples, made.already_complete) == (7, False)
    assert load_index((tmp_path / "dest").as_uri()).digest == digest_of(
        tmp_path / "images.tar", tmp_path / "other"
    )
    assert any(note.startswith(f"fetched {address}: {len(archive):,} bytes, SHA-256 ") for note in made.notes)
    assert pack(config(address, cache)).already_complete
    assert bodies(site) == 4  # a question each time, and the file once


def test_a_changed_archive_is_fetched_again(site: Site, address: str, archive: bytes, cache: Path) -> None:
    assert Path(fetch_source(config(address, cache)).config.source).read_bytes() == archive
    site.files["/set/images.tar"] = archive[:-512]
    assert Path(fetch_source(config(address, cache)).config.source).read_bytes() == archive[:-512]


@pytest.mark.parametrize("changed", [False, True])
def test_an_interrupted_fetch_goes_on_unless_the_file_changed(
    site: Site, address: str, archive: bytes, cache: Path, changed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ddpm_pipeline.data.packing.fetch.CHUNK_BYTES", 1000)

    def interrupt(done: int, total: int, note: str = "") -> None:
        if done > len(archive) // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch_source(config(address, cache), interrupt)
    assert not list(cache.glob("*/images.tar"))
    if changed:
        site.files["/set/images.tar"] = archive = archive[::-1]
    site.requests.clear()
    local = fetch_source(config(address, cache))
    assert Path(local.config.source).read_bytes() == archive
    resumed = [range_ for _, range_ in site.requests if range_]
    assert bool(resumed) != changed


def test_a_server_without_tags_is_asked_for_the_whole_file_again(
    site: Site, address: str, archive: bytes, cache: Path
) -> None:
    site.sends_tag = False
    for _ in range(2):
        assert Path(fetch_source(config(address, cache)).config.source).read_bytes() == archive
    assert bodies(site) == 4


def test_broken_connections_and_an_unknown_size_give_the_same_file(
    site: Site, address: str, archive: bytes, cache: Path
) -> None:
    site.cut = lambda size: max(1, size // 2)
    assert Path(fetch_source(config(address, cache)).config.source).read_bytes() == archive
    site.cut, site.sends_size = (lambda size: size), False
    site.files["/set/images.tar"] = archive[::-1]
    assert Path(fetch_source(config(address, cache)).config.source).read_bytes() == archive[::-1]


@pytest.mark.parametrize("sends_size", [True, False])
def test_a_source_larger_than_allowed_is_refused(
    site: Site, address: str, archive: bytes, cache: Path, sends_size: bool
) -> None:
    site.sends_size = sends_size
    with pytest.raises(UserError, match=r"^fetch_bytes: .* has [\d,]+ bytes or more, and 999 are allowed"):
        fetch_source(config(address, cache, fetch_bytes=999))
    assert not list(cache.glob("*/images.tar"))
    assert bodies(site) == (1 if sends_size else 2)


def test_a_source_that_does_not_fit_the_disk_is_refused_before_it_is_fetched(
    address: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nearly_full = shutil.disk_usage(cache.parent)._replace(free=100)
    monkeypatch.setattr("shutil.disk_usage", Mock(return_value=nearly_full))
    with pytest.raises(DiskFull, match=r"bytes and 100 are free; free disk space, or set fetch_dir"):
        fetch_source(config(address, cache))


def test_what_was_fetched_is_private(address: str, cache: Path) -> None:
    local = fetch_source(config(address, cache))
    file = Path(local.config.source)
    assert [path.stat().st_mode & 0o777 for path in (cache, file.parent, file)] == [0o700, 0o700, 0o600]
    cache.chmod(0o777)
    with pytest.raises(UserError, match="others may write to it"):
        fetch_source(config(address, cache))


def test_a_pattern_of_archives_on_the_web_is_one_source(images: Path, cache: Path, tmp_path: Path) -> None:
    files = {}
    for number, name in enumerate(("cat", "dog")):
        with tarfile.open(tmp_path / "part.tar", "w") as tar:
            tar.add(images / name, name)
        files[f"/part-{number}.tar"] = (tmp_path / "part.tar").read_bytes()
    with serving(Site(files)) as url:
        local = fetch_source(config(url + "/part-{0..1}.tar", cache))
        source = open_source(local.config)
        assert (len(source.items), source.class_names) == (7, ("cat", "dog"))
        with pytest.raises(UserError, match=r"/part-2\.tar: the server answers 404"):
            fetch_source(config(url + "/part-{0..2}.tar", cache))
        with pytest.raises(UserError, match=r"names part-0\.tar twice"):
            fetch_source(config(url + "/part-0.tar{,?again}", cache))


@pytest.mark.parametrize(
    ("place", "complaint"),
    [
        ("/", "names no file; give the address of an archive"),
        ("/x.exe", r"x\.exe is of an unknown kind; give the address of an archive \(\.tar "),
    ],
)
def test_an_address_without_an_archive_is_refused(place: str, complaint: str, cache: Path) -> None:
    with serving(Site({"/": b"x", "/x.exe": b"x"})) as url, pytest.raises(UserError, match=complaint):
        fetch_source(config(url + place, cache))


@pytest.mark.parametrize("name", ["../../up.tar", "a/b.tar", ".hidden.tar", "x\\y.tar", "n\0.tar"])
def test_no_name_that_a_server_gives_leads_out_of_the_cache(name: str, cache: Path, archive: bytes) -> None:
    said = {"Content-Disposition": f'attachment; filename="{name}"'}
    with (
        serving(Site({"/get": archive}, headers=said)) as url,
        pytest.raises(UserError, match="get is of an unknown"),
    ):
        fetch_source(config(f"{url}/get", cache))
    said = {"Content-Disposition": 'attachment; filename="images.tar"'}
    with serving(Site({"/get": archive}, headers=said)) as url:
        assert Path(fetch_source(config(f"{url}/get", cache)).config.source).name == "images.tar"


class Listed(RemoteFile):
    """A file as a bucket or hub might list it."""

    def __init__(self, name: str) -> None:
        self.name, self.where = name, f"s3://bucket/{name}"

    def stat(self) -> FileVersion:
        return FileVersion(size_bytes=1, tag="x")

    def open(self, start: int, version: FileVersion) -> BinaryIO:
        return io.BytesIO(b"x")


@pytest.mark.parametrize(
    "name", ["../up.tar", "a/../../up.tar", "/up.tar", "a//b.tar", "n\0.tar", ".tmp-x/y.tar"]
)
def test_no_listed_name_leads_out_of_the_cache(name: str, cache: Path) -> None:
    with pytest.raises(DamageError, match=r"key .*(are not allowed|must be non-empty and relative)"):
        Entry(cache, "entry").fetch([Listed(name)], 10, no_progress)
    assert not list(cache.parent.rglob("*.tar"))


def test_a_link_planted_in_the_cache_is_not_written_through(cache: Path, tmp_path: Path) -> None:
    entry = Entry(cache, "entry")
    (tmp_path / "elsewhere").mkdir()
    (entry.folder / "a").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="is a link, which may lead elsewhere; remove it"):
        entry.fetch([Listed("a/x.tar")], 10, no_progress)
    assert not list((tmp_path / "elsewhere").iterdir())


def test_a_dry_run_tells_the_size_and_fetches_nothing(address: str, archive: bytes, cache: Path) -> None:
    assert require_source(config(address, cache)) == f"1 files, {len(archive):,} bytes, to be fetched"
    assert not cache.exists()
    with pytest.raises(StoreUnreachable, match="cannot be reached"):
        require_source(config("http://127.0.0.1:9/x.tar", cache))


def test_nothing_is_fetched_for_a_destination_that_is_taken(site: Site, address: str, cache: Path) -> None:
    open_store((cache.parent / "dest").as_uri()).write("index.json", b"{}")
    with pytest.raises(UserError, match="contains other data"):
        pack(config(address, cache))
    assert site.requests == []


# S3


@pytest.fixture(params=["moto", pytest.param("gateway", marks=pytest.mark.stack)])
def bucket(request: pytest.FixtureRequest) -> Store:
    if request.param == "moto":
        return open_store(f"s3://{request.getfixturevalue('moto')}/some/prefix")
    return open_store(request.getfixturevalue("prefix"))


def uploaded(store: Store, root: Path, prefix: str = "") -> str:
    for path in sorted(root.rglob("*")):
        if path.is_file():
            store.upload(f"{prefix}{path.relative_to(root)}", path)
    return f"{store.uri}/{prefix}".rstrip("/")


def test_image_files_in_s3_are_packed_where_they_are(
    bucket: Store, images: Path, cache: Path, tmp_path: Path
) -> None:
    source = uploaded(bucket, images, "images/")
    bucket.write("images/notes.txt", b"words")
    bucket.write("images/.hidden/x.png", b"words")
    report = pack(config(source, cache))
    assert report.left_out == {".txt": 1, "hidden": 1}
    assert load_index((tmp_path / "dest").as_uri()).digest == digest_of(images, tmp_path / "other")
    assert not cache.exists()
    assert pack(config(source, cache)).already_complete
    bucket.write("images/cat/new.png", encoded(random_image(99)))
    with pytest.raises(UserError, match="contains a pack of other images"):
        pack(config(source, cache))


def test_side_files_in_s3_give_the_classes(bucket: Store, images: Path, cache: Path) -> None:
    rows = [
        f"{path.relative_to(images)},{number}" for number, path in enumerate(sorted(images.rglob("*.png")))
    ]
    (images / "metadata.csv").write_text("\n".join(["file_name,label", *rows]))
    found = open_source(config(uploaded(bucket, images), cache))
    assert [item.label for item in found.items] == list(range(7))


def one(store: Store, archive: bytes) -> str:
    store.write("a/images.tar", archive)
    return f"{store.uri}/a/images.tar"


def a_pattern(store: Store, archive: bytes) -> str:
    store.write("a/other.tar", b"not this")
    return one(store, archive).replace("images.tar", "im{ages,ages}.tar")


def a_prefix(store: Store, archive: bytes) -> str:
    store.write("a/notes.txt", b"words")
    return one(store, archive).rpartition("/")[0]


@pytest.mark.parametrize("name", [one, a_pattern, a_prefix])
def test_archives_in_s3_are_fetched_once(
    bucket: Store, archive: bytes, cache: Path, name: Callable[[Store, bytes], str]
) -> None:
    source = name(bucket, archive)
    first = fetch_source(config(source, cache))
    assert len(open_source(first.config).items) == 7
    (kept,) = cache.glob("*/images.tar")
    before = kept.stat()
    assert fetch_source(config(source, cache)).config == first.config
    assert (kept.stat().st_mtime_ns, kept.stat().st_ino) == (before.st_mtime_ns, before.st_ino)


def test_what_left_an_s3_prefix_leaves_the_cache(bucket: Store, archive: bytes, cache: Path) -> None:
    source = a_prefix(bucket, archive)
    bucket.write("a/old.tar", archive)
    assert len(open_source(fetch_source(config(source, cache)).config).items) == 14
    bucket.delete("a/old.tar")
    assert len(open_source(fetch_source(config(source, cache)).config).items) == 7


def test_a_fetch_from_s3_goes_on_where_it_stopped(bucket: Store, archive: bytes, cache: Path) -> None:
    source = one(bucket, archive)

    def interrupt(done: int, total: int, note: str = "") -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch_source(config(source, cache), interrupt)
    (part,) = (cache / ".state").glob("*/images.tar.part")
    assert part.stat().st_size > 0
    assert Path(fetch_source(config(source, cache)).config.source).read_bytes() == archive


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("/nothing", "there are no objects under this prefix; check the name"),
        ("/nothing.zip", "1 of the files it names are missing: nothing.zip"),
        ("/x-{0..1}.tar", "2 of the files it names are missing"),
    ],
)
def test_what_is_not_in_s3_is_named(bucket: Store, source: str, complaint: str, cache: Path) -> None:
    with pytest.raises(UserError, match=complaint):
        fetch_source(config(bucket.uri + source, cache))


def test_an_s3_prefix_larger_than_allowed_is_refused(bucket: Store, images: Path, cache: Path) -> None:
    with pytest.raises(UserError, match=r"^fetch_bytes: .* has [\d,]+ bytes, and 99 are allowed"):
        fetch_source(config(uploaded(bucket, images), cache, fetch_bytes=99))


def test_the_cache_of_this_user_is_the_default(address: str) -> None:
    local = fetch_source(PackConfig(source=address, dest="unused"))
    assert Path(local.config.source).is_relative_to(Path(os.environ["XDG_CACHE_HOME"]) / "ddpm" / "sources")


def test_the_report_names_no_secret(site: Site, address: str, cache: Path) -> None:
    report: PackReport = pack(config(address.replace("//", "//user:secret@") + "?key=secret", cache))
    assert "secret" not in str(report)
    assert not [path for path in cache.rglob("*") if "secret" in path.name]
