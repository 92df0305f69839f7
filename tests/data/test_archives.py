"""Tars and parquet as sources: read where they lie, with the labels and splits that they state."""

import bz2
import gzip
import io
import json
import lzma
import shutil
import tarfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ddpm_pipeline.config.data import PackConfig
from ddpm_pipeline.data.packing.pack_dataset import pack
from ddpm_pipeline.data.packing.sources import read_item
from ddpm_pipeline.errors import DiskFull, UserError
from ddpm_pipeline.parallel import ParallelMap
from tests.data.making import encoded, folder, random_image
from tests.data.test_sources import labels, opened

IMAGES = [encoded(random_image(n)) for n in range(6)]


def tarred(path: Path | None, *files: tuple[str, bytes] | tarfile.TarInfo) -> bytes:
    """A tar, written to `path` if there is one."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for file in files:
            if isinstance(file, tarfile.TarInfo):
                tar.addfile(file)
                continue
            info = tarfile.TarInfo(file[0])
            info.size = len(file[1])
            tar.addfile(info, io.BytesIO(file[1]))
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(out.getvalue())
    return out.getvalue()


def link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def compressed_by_arrow(data: bytes) -> bytes:
    return pa.compress(data, codec="zstd", asbytes=True)


@pytest.mark.parametrize(
    ("name", "compress"),
    [
        ("x.tar", bytes),
        ("x.tar.gz", gzip.compress),
        ("x.tar.bz2", bz2.compress),
        ("x.tar.xz", lzma.compress),
        ("x.tar.zst", compressed_by_arrow),
    ],
)
def test_tars_are_read_whatever_they_are_compressed_by(
    tmp_path: Path, name: str, compress: Callable[[bytes], bytes]
) -> None:
    plain = tarred(None, ("cat/1.png", IMAGES[0]), ("dog/2.png", IMAGES[1]))
    (tmp_path / name).write_bytes(compress(plain))
    found = opened(tmp_path / name)
    assert labels(found) == {"cat/1.png": "cat", "dog/2.png": "dog"}
    assert [read_item(found, 0), read_item(found, 1)] == IMAGES[:2]


def test_a_plain_tar_is_not_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> None:
        raise AssertionError("a temporary file was made")

    tarred(tmp_path / "x.tar", ("1.png", IMAGES[0]))
    monkeypatch.setattr("tempfile.TemporaryFile", refused)
    found = opened(tmp_path / "x.tar")
    assert (read_item(found, 0), found.copied_bytes) == (IMAGES[0], 0)


def test_a_full_tmpdir_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(io.BytesIO):
        def write(self, _: object, /) -> int:
            raise OSError(28, "No space left on device")

    (tmp_path / "x.tar.gz").write_bytes(gzip.compress(tarred(None, ("1.png", IMAGES[0]))))
    monkeypatch.setattr("tempfile.TemporaryFile", lambda **_: Full())
    with pytest.raises(UserError, match=r"cannot be unpacked in .* \(No space left on device\); set TMPDIR"):
        opened(tmp_path / "x.tar.gz")


def refuse_to_copy(*_: object, **__: object) -> None:
    raise AssertionError("something was copied")


@pytest.mark.parametrize("kind", ["tar.gz", "tar.zst", "parquet", "folder"])
def test_a_copy_that_cannot_fit_is_refused_before_it_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    plain = tarred(None, ("1.png", IMAGES[0]), ("2.png", IMAGES[1]))
    if kind == "parquet":
        table = pa.table({"image": IMAGES[:2]})
        pq.write_table(table, tmp_path / "x.parquet")
        needed = sum(map(len, IMAGES[:2]))
    elif kind == "folder":
        for name in ("a", "b"):
            (tmp_path / f"{name}.tar.gz").write_bytes(gzip.compress(plain))
        needed = 2 * len(plain)
    else:
        data = gzip.compress(plain) if kind == "tar.gz" else compressed_by_arrow(plain)
        (tmp_path / f"x.{kind}").write_bytes(data)
        needed = len(plain) if kind == "tar.gz" else len(data)
    source = tmp_path if kind == "folder" else tmp_path / f"x.{kind}"
    room = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda _: room._replace(free=needed - 1))
    with monkeypatch.context() as patched:
        patched.setattr("ddpm_pipeline.data.packing.archives.TemporaryCopies.add", refuse_to_copy)
        patched.setattr("shutil.copyfileobj", refuse_to_copy)
        with pytest.raises(DiskFull, match=r"take at least [0-9,]+ bytes in .* are free; set TMPDIR"):
            opened(source)
    monkeypatch.setattr("shutil.disk_usage", lambda _: room)
    found = opened(source)
    assert found.copied_bytes >= needed
    assert read_item(found, 0) == IMAGES[0]


def test_a_source_that_is_copied_is_opened_by_this_process_alone(tmp_path: Path) -> None:
    def nobody(config: PackConfig, count: int) -> AbstractContextManager[ParallelMap]:
        raise AssertionError(f"{count} images of {config.source} were given away")

    (tmp_path / "x.tar.gz").write_bytes(gzip.compress(tarred(None, ("cat/1.png", IMAGES[0]))))
    config = PackConfig(source=str(tmp_path / "x.tar.gz"), dest=(tmp_path / "set").as_uri())
    report = pack(config, open_map=nobody)
    assert any("copied to TMPDIR" in note for note in report.notes)


def test_links_roots_and_odd_bytes_in_a_tar_lose_no_image(tmp_path: Path) -> None:
    tarred(
        tmp_path / "x.tar",
        ("/cat/1.png", IMAGES[0]),
        link("cat/2.png", "cat/1.png", tarfile.LNKTYPE),
        link("dog/3.png", "../cat/2.png"),
        link("dog/4.png", "nowhere.png"),
        link("dog/pipe", "", tarfile.FIFOTYPE),
        ("dog/caf\udce9.png", IMAGES[1]),
    )
    found = opened(tmp_path / "x.tar")
    assert labels(found) == {
        "cat/1.png": "cat", "cat/2.png": "cat", "dog/3.png": "dog", "dog/caf\\xe9.png": "dog",
    }  # fmt: skip
    assert [read_item(found, n) for n in range(4)] == [IMAGES[0]] * 3 + [IMAGES[1]]
    assert found.left_out == {"links to nothing": 1, "devices": 1}


def test_a_tar_of_a_tar_for_each_class_is_read(tmp_path: Path) -> None:
    inner = [tarred(None, (f"{n}_1.JPEG", IMAGES[n])) for n in range(2)]
    tarred(tmp_path / "x.tar", ("n01440764.tar", inner[0]), ("n01443537.tar", inner[1]))
    found = opened(tmp_path / "x.tar")
    assert labels(found) == {"n01440764/0_1.JPEG": "n01440764", "n01443537/1_1.JPEG": "n01443537"}
    assert read_item(found, 1) == IMAGES[1]


def test_a_tar_cut_at_a_member_is_refused(tmp_path: Path) -> None:
    whole = tarred(None, ("1.png", IMAGES[0]), ("2.png", IMAGES[1]))
    (tmp_path / "x.tar").write_bytes(whole[: 512 + len(IMAGES[0]) + -len(IMAGES[0]) % 512])
    with pytest.raises(UserError, match="it is truncated"):
        opened(tmp_path / "x.tar")


def shards(tmp_path: Path, *numbers: int, name: str = "t") -> Path:
    for number in numbers:
        tarred(tmp_path / f"{name}-{number:02d}.tar", ("0.png", IMAGES[number]), ("0.cls", b"%d" % number))
    return tmp_path


def test_shards_are_packed_together_by_folder_or_pattern(tmp_path: Path) -> None:
    shards(tmp_path, 0, 1)
    wanted = {"t-00.tar/0.png": 0, "t-01.tar/0.png": 1}
    for source in (tmp_path, tmp_path / "*.tar", tmp_path / "t-{00..01}.tar"):
        assert labels(opened(source)) == wanted
    with pytest.raises(UserError, match=r"8 of the files it names are missing: .*t-02\.tar"):
        opened(tmp_path / "t-{00..09}.tar")


def test_shards_of_several_splits_are_asked_about(tmp_path: Path) -> None:
    shards(tmp_path, 0, 1, name="train")
    shards(tmp_path, 2, name="val")
    with pytest.raises(UserError, match=r"holds the splits train \(2\), validation \(1\)"):
        opened(tmp_path)
    assert labels(opened(tmp_path, split="val")) == {"val-02.tar/0.png": 2}


def test_a_set_that_was_packed_keeps_its_class_names(tmp_path: Path) -> None:
    source = folder(tmp_path / "in", {"cat": 2, "dog": 1})
    dest = tmp_path / "set"
    pack(PackConfig(source=str(source), dest=dest.as_uri()))
    for again in (dest, dest / "shards/000000.tar"):
        found = opened(again)
        assert found.class_names == ("cat", "dog")
        assert sorted(item.label for item in found.items) == [0, 0, 1]
        assert found.other_files == 0
    (dest / "index.json").unlink()
    with pytest.raises(UserError, match="is a pack that was interrupted; run that pack again first"):
        opened(dest)


def test_two_images_of_a_sample_are_asked_about(tmp_path: Path) -> None:
    files = [(f"{n}.{kind}", IMAGES[n]) for n in range(2) for kind in ("input.jpg", "target.png")]
    tarred(tmp_path / "x.tar", *files, ("0.cls", b"5"), ("1.cls", b"6"))
    with pytest.raises(
        UserError, match=r"several images each: input\.jpg \(2\), target\.png \(2\); set image_col"
    ):
        opened(tmp_path / "x.tar")
    found = opened(tmp_path / "x.tar", image_column="input.jpg")
    assert labels(found) == {"0.input.jpg": 5, "1.input.jpg": 6}
    assert "image_column input.jpg: 2 other images are skipped" in found.notes
    assert len(opened(tmp_path / "x.tar", image_column="all").items) == 4
    with pytest.raises(UserError, match=r"image_column: .* holds no image named …\.webp"):
        opened(tmp_path / "x.tar", image_column="webp")


def test_dots_in_names_make_no_samples(tmp_path: Path) -> None:
    tarred(tmp_path / "x.tar", *((f"v{n}.{m}.png", IMAGES[n]) for n in range(2) for m in range(2)))
    assert len(opened(tmp_path / "x.tar").items) == 4


def table(path: Path, column: str, values: pa.Array | list[object], names: list[str] | None = None) -> Path:
    """Parquet of images with one more column."""
    images = [{"bytes": IMAGES[n % 6], "path": f"{n}.png"} for n in range(len(values))]
    made = pa.table({"image": images, column: values})
    features = {column: {"names": names, "_type": "ClassLabel"}} if names else {}
    made = made.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(made, path)
    return path


@pytest.mark.parametrize(
    "column", ["label", "fine_label", "target", "class", "class_id", "digit", "category", "y"]
)
def test_label_columns_of_the_usual_names_are_taken(tmp_path: Path, column: str) -> None:
    found = opened(table(tmp_path / "x.parquet", column, [2, 0]))
    assert list(labels(found).values()) == [2, 0]
    assert found.notes == (f"labels from column {column}: the numbers 0, 2",)


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        (["dog", "cat"], ["dog", "cat"]),
        ([1.0, 0.0], [1, 0]),
        (pa.array(["dog", "cat"]).dictionary_encode(), ["dog", "cat"]),
        (["3", "1"], [3, 1]),
        ([[0, 1], [1, 0]], [1, 0]),
        ([True, False], [1, 0]),
        ([{"category": "dog"}, {"category": "cat"}], ["dog", "cat"]),
        ([-1, -1], [None, None]),
        ([None, None], [None, None]),
    ],
    ids=["text", "float", "categorical", "digits", "one-hot", "bool", "nested", "minus one", "null"],
)
def test_labels_of_every_type_are_taken(tmp_path: Path, values: list[object], wanted: list[object]) -> None:
    assert list(labels(opened(table(tmp_path / "x.parquet", "label", values))).values()) == wanted


def test_a_column_of_another_name_is_pointed_out_and_can_be_named(tmp_path: Path) -> None:
    file = table(tmp_path / "x.parquet", "sort", ["dog", "cat"])
    assert opened(file).notes == ("no labels: none of the columns sort has the usual name of a class column",)
    assert opened(file, label_column="sort").class_names == ("cat", "dog")
    by_metadata = table(tmp_path / "y.parquet", "sort", [0, 1], ["ant", "bee"])
    assert opened(by_metadata).class_names == ("ant", "bee")


def test_splits_and_names_that_disagree_are_refused(tmp_path: Path) -> None:
    table(tmp_path / "data/train-00000-of-00001.parquet", "label", [0, 1], ["a", "b"])
    table(tmp_path / "data/test-00000-of-00001.parquet", "label", [1, 0, 1], ["a", "b"])
    table(tmp_path / ".cache/old.parquet", "label", [0], ["a", "b"])
    with pytest.raises(UserError, match=r"holds the splits test \(1\), train \(1\); set split"):
        opened(tmp_path)
    assert len(opened(tmp_path, split="test").items) == 3
    assert len(opened(tmp_path, split="all").items) == 5
    table(tmp_path / "data/train-00001-of-00002.parquet", "label", [0], ["b", "a"])
    with pytest.raises(UserError, match="name their classes differently"):
        opened(tmp_path, split="train")


def test_labels_on_some_files_only_are_refused_before_work(tmp_path: Path) -> None:
    table(tmp_path / "0.parquet", "label", [0, 1])
    table(tmp_path / "1.parquet", "width", [8, 8])
    with pytest.raises(UserError, match="2 of 4 images have no label"):
        opened(tmp_path)
    assert opened(tmp_path, labels="none").class_names is None


def test_the_image_is_taken_from_the_column_named_so(tmp_path: Path) -> None:
    rows = {
        "id": [b"1", b"2"],
        "conditioning_image": [{"bytes": IMAGES[5], "path": ""}] * 2,
        "image": [{"bytes": data, "path": ""} for data in IMAGES[:2]],
    }
    pq.write_table(pa.table(rows), tmp_path / "x.parquet")
    found = opened(tmp_path / "x.parquet")
    assert [read_item(found, n) for n in range(2)] == IMAGES[:2]
    assert "column conditioning_image also holds bytes and is skipped" in found.notes
    pq.write_table(pa.table({"before": rows["image"], "after": rows["image"]}), tmp_path / "y.parquet")
    with pytest.raises(
        UserError, match="each of the columns before, after could be the image; set image_column"
    ):
        opened(tmp_path / "y.parquet")
    assert len(opened(tmp_path / "y.parquet", image_column="after").items) == 2


def test_images_beside_the_parquet_are_read_by_their_paths_and_no_others(tmp_path: Path) -> None:
    (tmp_path / "in/images").mkdir(parents=True)
    (tmp_path / "in/images/1.png").write_bytes(IMAGES[1])
    rows = pa.table({"image": [{"bytes": None, "path": "images/1.png"}], "label": ["cat"]})
    pq.write_table(rows, tmp_path / "in/x.parquet")
    found = opened(tmp_path / "in/x.parquet")
    assert (read_item(found, 0), found.class_names) == (IMAGES[1], ("cat",))
    (tmp_path / "secret.png").write_bytes(IMAGES[2])
    for path in ("../secret.png", str(tmp_path / "secret.png")):
        pq.write_table(pa.table({"file_name": [path]}), tmp_path / "in/y.parquet")
        with pytest.raises(UserError, match=r"outside .*set image_root"):
            opened(tmp_path / "in/y.parquet")
    assert read_item(opened(tmp_path / "in/y.parquet", image_root=str(tmp_path)), 0) == IMAGES[2]


def test_tables_about_images_do_not_hide_them(tmp_path: Path) -> None:
    folder(tmp_path, {"cat": 1, "dog": 1})
    pq.write_table(pa.table({"url": ["u"], "status": ["success"]}), tmp_path / "annotations.parquet")
    found = opened(tmp_path)
    assert found.class_names == ("cat", "dog")
    assert found.left_out == {".parquet": 1}
    table(tmp_path / "more.parquet", "label", [0])
    with pytest.raises(UserError, match="holds images and parquet with images; name one of them"):
        opened(tmp_path)


def test_metadata_of_parquet_nested_beyond_sense_is_passed_over(tmp_path: Path) -> None:
    made = pa.table({"image": [IMAGES[0]], "label": [1]})
    deep = made.replace_schema_metadata({"huggingface": "[" * 100_000 + "]" * 100_000})
    pq.write_table(deep, tmp_path / "x.parquet")
    assert list(labels(opened(tmp_path / "x.parquet")).values()) == [1]
