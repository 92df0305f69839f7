"""Packing: the same bytes every time, nothing lost unsaid, nothing begun that cannot be finished."""

import io
import json
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
import yaml
from PIL import Image

from ddpm_pipeline.config.data import PackConfig
from ddpm_pipeline.data.index import load_index
from ddpm_pipeline.data.packing.inspect_dataset import inspect
from ddpm_pipeline.data.packing.pack_dataset import held_out_uri, pack
from ddpm_pipeline.data.reading.sequential import read_sequential
from ddpm_pipeline.errors import DamageError, UserError
from ddpm_pipeline.store import open_store
from tests.data.making import digits, encoded, folder, random_image, sixty


def contents(uri: str) -> dict[str, bytes]:
    """Every object, but for the index, which holds the place and the store's tags."""
    store = open_store(uri)
    return {info.key: store.read(info.key) for info in store.list() if info.key != "index.json"}


def pixels_of(uri: str) -> dict[bytes, int]:
    """Pixels to label."""
    return {sample.pixels.tobytes(): sample.label for sample in read_sequential(load_index(uri))}


def test_the_digits_are_packed_as_they_are(any_uri: str) -> None:
    from sklearn.datasets import load_digits

    digits(any_uri)
    index = load_index(any_uri)
    assert (index.num_samples, index.num_classes, str(index.image)) == (1797, 10, "8x8x1")
    assert index.class_names == tuple("0123456789")
    assert sorted(s.num_samples for s in index.shards) == [149] * 3 + [150] * 9
    real = load_digits()
    wanted = {
        np.round(im * 255 / 16).astype(np.uint8).tobytes(): int(t)
        for im, t in zip(real.images, real.target, strict=True)
    }
    assert pixels_of(any_uri) == wanted
    values = np.concatenate(
        [np.frombuffer(p, np.uint8) for p in (s.pixels.tobytes() for s in read_sequential(index))]
    )
    assert index.channel_mean == pytest.approx([values.mean()])
    assert index.channel_std == pytest.approx([values.std()])


def test_packs_are_byte_identical_whatever_the_threads_and_the_place(tmp_path: Path) -> None:
    places = [(tmp_path / name).as_uri() for name in "abc"]
    sixty(places[0], num_threads=1)
    sixty(places[1], num_threads=7)
    sixty(places[2], seed=1)
    assert contents(places[0]) == contents(places[1])
    assert load_index(places[0]).digest == load_index(places[1]).digest != load_index(places[2]).digest
    assert pixels_of(places[0]) == pixels_of(places[2])


def test_no_shard_holds_one_class_only(uri: str, tmp_path: Path) -> None:
    folder(tmp_path / "in", {"cat": 30, "dog": 30, "newt": 30})
    pack(PackConfig(source=str(tmp_path / "in"), dest=uri, shard_size=30))
    index = load_index(uri)
    for shard in range(3):
        labels = [s.label for s in read_sequential(index, [shard])]
        assert set(labels) == {0, 1, 2}


def test_webdataset_reads_a_pack(uri: str) -> None:
    sixty(uri, shard_size=30)
    path = Path(uri.removeprefix("file://")) / "shards" / "{000000..000001}.tar"
    found = list(webdataset.WebDataset(str(path), shardshuffle=False).decode("rgb8").to_tuple("png", "cls"))
    assert len(found) == 60
    assert found[0][0].shape == (8, 8, 3)


def test_a_packs_card_names_its_shards_to_hugging_face_and_is_left_alone_once_there(uri: str) -> None:
    open_store(uri).write("README.md", b"mine")
    sixty(uri)
    assert open_store(uri).read("README.md") == b"mine"
    sixty(f"{uri}-other")
    card = open_store(f"{uri}-other").read("README.md").decode()
    (config,) = yaml.safe_load(card.split("---")[1])["configs"]
    named = Path(f"{uri}-other".removeprefix("file://")).glob(config["data_files"][0]["path"])
    assert sorted(path.name for path in named) == [f"{number:06d}.tar" for number in range(6)]


def zipped(source: Path, out: Path) -> Path:
    with zipfile.ZipFile(out.with_suffix(".zip"), "w") as archive:
        for path in sorted(source.rglob("*.png")):
            archive.write(path, f"wrapped/{path.relative_to(source)}")
    return out.with_suffix(".zip")


def tarred(source: Path, out: Path) -> Path:
    with tarfile.open(out.with_suffix(".tar"), "w") as archive:
        archive.add(source, ".")
    return out.with_suffix(".tar")


def gzipped(source: Path, out: Path) -> Path:
    with tarfile.open(out.with_suffix(".tar.gz"), "w:gz") as archive:
        archive.add(source, "wrapped")
    return out.with_suffix(".tar.gz")


def parquet(source: Path, out: Path) -> Path:
    paths = sorted(source.rglob("*.png"))
    classes = sorted({path.parent.name for path in paths})
    table = pa.table(
        {
            "image": [{"bytes": path.read_bytes(), "path": path.name} for path in paths],
            "label": [classes.index(path.parent.name) for path in paths],
        }
    )
    features = {"info": {"features": {"label": {"names": classes, "_type": "ClassLabel"}}}}
    pq.write_table(
        table.replace_schema_metadata({"huggingface": json.dumps(features)}), out.with_suffix(".parquet")
    )
    return out.with_suffix(".parquet")


@pytest.mark.parametrize("make", [zipped, tarred, gzipped, parquet])
def test_every_kind_of_source_gives_the_same_samples(
    uri: str, tmp_path: Path, make: Callable[[Path, Path], Path]
) -> None:
    source = folder(tmp_path / "in", {"cat": 5, "dog": 4})
    pack(PackConfig(source=str(source), dest=f"{uri}/folder"))
    pack(PackConfig(source=str(make(source, tmp_path / "packed")), dest=f"{uri}/other"))
    assert pixels_of(f"{uri}/other") == pixels_of(f"{uri}/folder")
    assert load_index(f"{uri}/other").class_names == ("cat", "dog")


def test_a_parquet_file_damaged_inside_is_refused_by_its_name(uri: str, tmp_path: Path) -> None:
    file = parquet(folder(tmp_path / "in", {"cat": 5}), tmp_path / "packed")
    data = bytearray(file.read_bytes())
    data[4:200] = b"\xff" * 196  # the pages; the footer at the end is whole
    file.write_bytes(data)
    with pytest.raises(UserError, match=r"packed\.parquet: damaged .*; get the file again"):
        pack(PackConfig(source=str(file), dest=uri))


def test_a_webdataset_tar_is_a_source_too(uri: str, tmp_path: Path) -> None:
    sixty(f"{uri}/first", shard_size=100)
    shard = Path(uri.removeprefix("file://")) / "first" / "shards" / "000000.tar"
    pack(PackConfig(source=str(shard), dest=f"{uri}/second", payload="npy"))
    assert pixels_of(f"{uri}/second") == pixels_of(f"{uri}/first")


def test_images_without_class_folders_have_no_labels(uri: str, tmp_path: Path) -> None:
    folder(tmp_path / "in", {"only": 4})
    report = pack(PackConfig(source=str(tmp_path / "in" / "only"), dest=uri))
    assert report.samples_per_class is None
    assert load_index(uri).num_classes is None


def test_images_are_scaled_with_anti_aliasing_and_the_middle_is_kept(uri: str, tmp_path: Path) -> None:
    # Stripes of one pixel: without anti-aliasing they come out black or white, with it gray. Red margins are cut.
    stripes = np.zeros((64, 96, 3), np.uint8)
    stripes[:, ::2] = 255
    stripes[:, :16] = stripes[:, -16:] = (255, 0, 0)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "stripes.png").write_bytes(encoded(stripes))
    pack(PackConfig(source=str(tmp_path / "in"), dest=uri, image_size=8, resize_filter="box"))
    (sample,) = read_sequential(load_index(uri))
    assert sample.pixels.shape == (8, 8, 3)
    assert np.abs(sample.pixels.astype(int) - 127).max() <= 1


@pytest.mark.parametrize(
    ("image", "channels", "wanted"),
    [
        (Image.new("RGBA", (2, 2), (255, 0, 0, 0)), 3, (10, 20, 30)),
        (Image.new("RGBA", (2, 2), (255, 0, 0, 255)), 3, (255, 0, 0)),
        (Image.new("LA", (2, 2), (200, 255)), 1, (200,)),
        (Image.new("L", (2, 2), 77), 3, (77, 77, 77)),
        (Image.new("1", (2, 2), 1), 1, (255,)),
        (Image.fromarray(np.full((2, 2), 257 * 99, np.uint16)), 1, (99,)),
        (Image.new("RGB", (2, 2), (200, 200, 200)), 1, (200,)),
        (Image.new("P", (2, 2), 0), 3, (0, 0, 0)),
    ],
    ids=["clear", "opaque", "gray-alpha", "gray", "bits", "16-bit", "to-gray", "palette"],
)
def test_every_kind_of_pixel_becomes_the_wanted_channels(
    uri: str, tmp_path: Path, image: Image.Image, channels: int, wanted: tuple[int, ...]
) -> None:
    (tmp_path / "in").mkdir()
    image.save(tmp_path / "in" / "x.png")
    config = {"source": str(tmp_path / "in"), "dest": uri, "channels": channels, "background": (10, 20, 30)}
    pack(PackConfig.model_validate(config))
    (sample,) = read_sequential(load_index(uri))
    assert (sample.pixels == wanted).all()


def test_a_photograph_turned_by_its_camera_is_put_upright(uri: str, tmp_path: Path) -> None:
    image = Image.fromarray(np.repeat(random_image(0, (16, 8)), 1, axis=0))
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "in").mkdir()
    image.save(tmp_path / "in" / "x.webp", lossless=True, exif=exif)
    pack(PackConfig(source=str(tmp_path / "in"), dest=uri))
    (sample,) = read_sequential(load_index(uri))
    assert np.array_equal(sample.pixels, np.rot90(np.asarray(image), -1))


def test_duplicates_and_other_files_are_reported(uri: str, tmp_path: Path) -> None:
    source = folder(tmp_path / "in", {"cat": 3, "dog": 2})
    (source / "dog" / "copy.png").write_bytes((source / "cat" / "0.png").read_bytes())
    (source / "notes.txt").write_text("hello")
    report = pack(PackConfig(source=str(source), dest=uri))
    assert report.duplicates == (("cat/0.png", "dog/copy.png"),)
    assert report.other_files == 1
    assert report.samples_per_class == {"cat": 3, "dog": 3}
    written = json.loads(open_store(uri).read("pack-report.json"))
    assert written["duplicates"] == [["cat/0.png", "dog/copy.png"]]
    assert written["num_samples"] == 6


def test_an_unreadable_image_ends_the_job_before_anything_is_written(uri: str, tmp_path: Path) -> None:
    source = folder(tmp_path / "in", {"cat": 3})
    whole = encoded(random_image(9, (64, 64)))
    (source / "cat" / "torn.png").write_bytes(whole[: len(whole) // 2])
    (source / "cat" / "text.jpg").write_text("no image")
    with pytest.raises(
        UserError, match=r"2 of 5 images.*cat/text\.jpg: not a PNG.*cat/torn\.png: .*truncated.*skip"
    ):
        pack(PackConfig(source=str(source), dest=uri, image_size=8))
    assert list(open_store(uri).list()) == []
    report = pack(PackConfig(source=str(source), dest=uri, image_size=8, on_unreadable="skip"))
    assert [name for name, _ in report.unreadable] == ["cat/text.jpg", "cat/torn.png"]
    assert report.num_samples == load_index(uri).num_samples == 3


@pytest.mark.parametrize(
    ("prepare", "complaint"),
    [
        (lambda root: None, "does not exist"),
        (lambda root: root.mkdir(), "holds no images"),
        (lambda root: root.write_text("x"), "of an unknown kind"),
        (
            lambda root: (folder(root, {"a": 1}), (root / "loose.png").write_bytes(encoded(random_image(7)))),
            "loose.png",
        ),
        (lambda root: (folder(root, {"a": 1}), folder(root / "b", {"b": 1}, (9, 9))), "set image_size"),
    ],
    ids=["missing", "empty", "unknown", "loose", "sizes"],
)
def test_unusable_sources_are_refused_before_anything_is_written(
    uri: str, tmp_path: Path, prepare: Callable[[Path], object], complaint: str
) -> None:
    prepare(tmp_path / "in")
    with pytest.raises(UserError, match=complaint):
        pack(PackConfig(source=str(tmp_path / "in"), dest=uri))
    assert list(open_store(uri).list()) == []


def test_a_broken_zip_is_named(uri: str, tmp_path: Path) -> None:
    (tmp_path / "x.zip").write_bytes(b"PK no")
    with pytest.raises(UserError, match="not a zip"):
        pack(PackConfig(source=str(tmp_path / "x.zip"), dest=uri))


def test_a_damaged_member_of_a_zip_is_an_unreadable_image(uri: str, tmp_path: Path) -> None:
    archive = zipped(folder(tmp_path / "in", {"cat": 3}), tmp_path / "x")
    data = bytearray(archive.read_bytes())
    data[data.index(b"IDAT") + 20] ^= 1
    archive.write_bytes(bytes(data))
    with pytest.raises(
        UserError, match=r"1 of 3 images cannot be read: cat/0\.png: cannot be read: Bad CRC-32"
    ):
        pack(PackConfig(source=str(archive), dest=uri))


def test_packing_again_does_nothing_and_says_so(any_uri: str) -> None:
    first = pack(sixty(any_uri))
    assert first.already_complete
    assert first.index_digest == load_index(any_uri).digest
    before = {info.key: info.etag for info in open_store(any_uri).list()}
    assert pack(sixty(any_uri)).already_complete
    assert {info.key: info.etag for info in open_store(any_uri).list()} == before


def test_a_place_that_holds_another_pack_or_other_data_is_refused(uri: str) -> None:
    sixty(uri)
    with pytest.raises(UserError, match="contains a pack of other images or settings"):
        sixty(uri, seed=1)
    open_store(f"{uri}/other").write("x.tar", b"")
    with pytest.raises(UserError, match=r"contains other data \(x\.tar\)"):
        sixty(f"{uri}/other")


def test_a_job_stopped_at_any_write_goes_on_to_the_same_bytes(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ddpm_pipeline.store import FileStore

    sixty(uri, shard_size=20)
    wanted, digest = contents(uri), load_index(uri).digest
    real, real_upload, interrupted = FileStore.write, FileStore.upload, 0
    for stop in range(30):
        dest = (tmp_path / f"again-{stop}").as_uri()
        left = [stop]

        def write(
            self: FileStore, key: str, data: bytes, left: list[int] = left, **conditions: Any
        ) -> object:
            if left[0] == 0:
                raise KeyboardInterrupt
            left[0] -= 1
            return real(self, key, data, **conditions)

        def upload(self: FileStore, key: str, path: Path, left: list[int] = left) -> object:
            if left[0] == 0:
                raise KeyboardInterrupt
            left[0] -= 1
            return real_upload(self, key, path)

        with monkeypatch.context() as patch:
            patch.setattr(FileStore, "write", write)
            patch.setattr(FileStore, "upload", upload)
            try:
                sixty(dest, shard_size=20, num_threads=1)
                break
            except KeyboardInterrupt:
                interrupted += 1
        sixty(dest, shard_size=20)
        assert contents(dest) == wanted
        assert load_index(dest).digest == digest
    assert (
        interrupted == 3 + 3 * 3 + 5
    )  # two claims, the plan; of each of three shards tar, table, record; report, card, tables, index, source


def test_progress_counts_images_and_ends_at_their_number(uri: str, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    pack(
        PackConfig(source=str(folder(tmp_path / "in", {"a": 9})), dest=uri, shard_size=4),
        lambda done, total: seen.append((done, total)),
    )
    assert seen[-1] == (9, 9)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_inspect_tells_what_is_there(any_uri: str) -> None:
    sixty(any_uri)
    found = inspect(any_uri)
    index = load_index(any_uri)
    assert found.damage == ()
    assert (found.num_samples, found.num_shards, found.size_bytes) == (60, 6, index.size_bytes)
    assert found.shapes == {"8x8x3": 60}
    assert found.classes == {"cat": 20, "dog": 20, "newt": 20}
    assert found.channel_mean == pytest.approx(index.channel_mean)
    assert found.channel_std == pytest.approx(index.channel_std)
    assert found.contact_sheet.shape[2] == 3


def test_inspect_finds_all_damage_and_goes_on(uri: str) -> None:
    sixty(uri)
    store = open_store(uri)
    torn, flipped = "shards/000003.tar", bytearray(store.read("shards/000005.tar"))
    store.write(torn, store.read(torn)[:5_000])
    flipped[512 + 60] ^= 255
    store.write("shards/000005.tar", bytes(flipped))
    found = inspect(uri)
    assert found.index_digest is None
    text = "\n".join(found.damage)
    assert "000003.tar has 5000 bytes" in text
    assert "000003.tar: ends at byte 5000" in text
    assert "000005.tar: sample" in text
    assert 40 < found.num_samples < 60


def test_a_set_read_forward_gives_each_sample_once_and_notices_a_change(any_uri: str) -> None:
    sixty(any_uri, payload="npy")
    index = load_index(any_uri)
    assert len([s.key for s in read_sequential(index)]) == len({s.key for s in read_sequential(index)}) == 60
    store = open_store(any_uri)
    data = store.read("shards/000001.tar")
    store.write("shards/000001.tar", data[:700] + bytes([data[700] ^ 1]) + data[701:])
    with pytest.raises(DamageError, match=r"000001\.tar"):
        list(read_sequential(index))
    with pytest.raises(DamageError, match=r"000001\.tar: its SHA-256"):
        list(read_sequential(index.model_copy(update={"made_at": "elsewhere"}), [1]))


def test_a_tar_of_png_and_one_of_npy_hold_the_same_pixels(uri: str) -> None:
    sixty(f"{uri}/png")
    sixty(f"{uri}/npy", payload="npy")
    assert pixels_of(f"{uri}/png") == pixels_of(f"{uri}/npy")
    with tarfile.open(fileobj=io.BytesIO(open_store(f"{uri}/npy").read("shards/000000.tar"))) as tar:
        member = tar.extractfile("000000000.npy")
        assert member is not None
        assert np.load(io.BytesIO(member.read()), allow_pickle=False).shape == (8, 8, 3)


def test_an_images_side_follows_from_its_bytes_and_survives_more_images(tmp_path: Path) -> None:
    def images(folder: Path, numbers: range) -> str:
        folder.mkdir()
        for number in numbers:
            pixels = np.full((4, 4), number, np.uint8)
            Image.fromarray(pixels).save(folder / f"{number:03d}.png")
            Image.fromarray(pixels).save(folder / f"twin-{number:03d}.png")
        return str(folder)

    def levels(uri: str) -> list[int]:
        return sorted(int(sample.pixels[0, 0, 0]) for sample in read_sequential(load_index(uri)))

    few, many = images(tmp_path / "few", range(60)), images(tmp_path / "many", range(120))
    sides: list[tuple[list[int], list[int]]] = []
    for source in (few, many):
        dest = f"{source}-packed"
        config = PackConfig(source=source, dest=dest, channels=1, held_out=0.3, seed=5)
        first = pack(config)
        again = pack(config)
        assert first.held_out is not None
        assert again.held_out is not None
        assert (again.already_complete, again.held_out.already_complete) == (True, True)
        sides.append((levels(dest), levels(held_out_uri(dest))))
    for (kept, held), count in zip(sides, (60, 120), strict=True):
        assert sorted(kept + held) == sorted([*range(count), *range(count)])
        assert not set(kept) & set(held)  # twins stay together
        assert 0.15 < len(held) / (2 * count) < 0.45
    assert set(sides[0][1]) == {level for level in sides[1][1] if level < 60}
    with pytest.raises(UserError, match=r"held_out: 1e-06 selects no images"):
        pack(PackConfig(source=few, dest=str(tmp_path / "none"), channels=1, held_out=1e-6))
