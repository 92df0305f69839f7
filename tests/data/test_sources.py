"""What is packed: every image with the class that its source gives it, nothing invented, nothing left out unsaid."""

import json
import os
import zipfile
from pathlib import Path

import pytest

from ddpm_pipeline.config.data import PackConfig
from ddpm_pipeline.data.packing.open_source import open_source
from ddpm_pipeline.data.packing.sources import Source, read_item
from ddpm_pipeline.errors import DamageError, UserError
from tests.data.making import encoded, random_image


def put(root: Path, *names: str, data: bytes | str | None = None) -> Path:
    """Files of these names, images that all differ unless `data` is given."""
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        content = encoded(random_image(sum(name.encode()) + number)) if data is None else data
        (root / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return root


def opened(source: Path | str, **settings: object) -> Source:
    return open_source(PackConfig.model_validate({"source": str(source), "dest": "unused", **settings}))


def labels(source: Source) -> dict[str, str | int | None]:
    """Name to class, by its name where it has one."""
    names = source.class_names
    return {
        item.name: None if item.label < 0 else item.label if names is None else names[item.label]
        for item in source.items
    }


def test_one_wrapping_folder_is_no_class(tmp_path: Path) -> None:
    found = opened(put(tmp_path, "img_align_celeba/1.png", "img_align_celeba/2.png"))
    assert (found.class_names, [item.label for item in found.items]) == (None, [-1, -1])
    assert found.notes == ("one folder holds all images (img_align_celeba): it is no class",)
    inner = opened(put(tmp_path / "in", "flowers/cat/1.png", "flowers/dog/2.png"))
    assert inner.class_names == ("cat", "dog")
    assert opened(tmp_path, labels="folder").class_names == ("img_align_celeba", "in")


@pytest.mark.parametrize(
    "names",
    [
        ["00000/00001.png", "00000/00002.png", "01000/01001.png"],
        ["00000/img00000009.png", "00001/img00000010.png"],
        ["00000/000000001.jpg", "00001/000010000.jpg"],
        ["0a/0a3f.png", "ff/ff01.png"],
    ],
    ids=["FFHQ", "EDM", "img2dataset", "hashes"],
)
def test_buckets_of_files_are_no_classes(tmp_path: Path, names: list[str]) -> None:
    found = opened(put(tmp_path, *names))
    assert {item.label for item in found.items} == {-1}
    assert "are buckets of files, no classes; if they are, set labels=folder" in found.notes[0]
    by_folder = opened(tmp_path, labels="folder")
    assert by_folder.class_names == tuple(sorted({name.split("/")[0] for name in names}))


def test_numbered_folders_whose_files_start_anew_are_classes_in_the_order_of_their_numbers(
    tmp_path: Path,
) -> None:
    put(tmp_path, *(f"{k}/a.png" for k in range(12)))
    assert opened(tmp_path).class_names == tuple(map(str, range(12)))
    signs = opened(put(tmp_path / "in", "00000/00000_00001.png", "00001/00000_00001.png"))
    assert signs.class_names == ("00000", "00001")


@pytest.mark.parametrize(
    ("first", "second"), [("train", "val"), ("seg_train", "seg_test"), ("train2017", "test2017")]
)
def test_splits_are_asked_for(tmp_path: Path, first: str, second: str) -> None:
    put(tmp_path, *(f"{split}/{name}/1.png" for split in (first, second) for name in ("cat", "dog")))
    with pytest.raises(UserError, match=r"holds the splits .*train \(2\).*; set split=NAME .* or split=all"):
        opened(tmp_path)
    found = opened(tmp_path, split="train")
    assert labels(found) == {f"{first}/cat/1.png": "cat", f"{first}/dog/1.png": "dog"}
    assert len(opened(tmp_path, split="all").items) == 4
    with pytest.raises(UserError, match=r"split: .* holds no split 'unlabelled' \(found: "):
        opened(tmp_path, split="unlabelled")


def test_a_class_named_like_a_split_stays_a_class(tmp_path: Path) -> None:
    assert opened(put(tmp_path, "bus/1.png", "car/1.png", "train/1.png")).class_names == (
        "bus",
        "car",
        "train",
    )


def test_linked_class_folders_are_followed_and_circles_are_not(tmp_path: Path) -> None:
    put(tmp_path, "store/1.png", "in/cat/2.png")
    (tmp_path / "in/dog").symlink_to(tmp_path / "store")
    (tmp_path / "in/cat/again").symlink_to(tmp_path / "in")
    found = opened(tmp_path / "in")
    assert labels(found) == {"cat/2.png": "cat", "dog/1.png": "dog"}
    assert found.left_out == {"links in a circle": 1}


def test_a_link_to_nothing_is_an_image_that_cannot_be_read(tmp_path: Path) -> None:
    put(tmp_path, "1.png")
    (tmp_path / "2.png").symlink_to("missing.png")
    found = opened(tmp_path)
    assert [item.name for item in found.items] == ["1.png", "2.png"]
    with pytest.raises(DamageError, match="cannot be read"):
        read_item(found, 1)


def test_a_folder_that_cannot_be_listed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, "cat/1.png", "dog/2.png")
    real = os.scandir

    def scandir(path: str) -> object:
        if path.endswith("dog"):
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(UserError, match=r"dog: cannot be listed \(Permission denied\)"):
        opened(tmp_path)


def test_names_that_are_not_utf8_are_packed(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"caf\xe9.png")).write_bytes(encoded(random_image(1)))
    found = opened(tmp_path)
    assert [item.name for item in found.items] == ["caf\\xe9.png"]
    assert read_item(found, 0) == encoded(random_image(1))


@pytest.mark.parametrize("name", ["cat\ndog", "\x1b[31mred"])
def test_a_class_name_that_no_model_could_hold_is_refused(tmp_path: Path, name: str) -> None:
    put(tmp_path, "ant/1.png")
    (tmp_path / name).mkdir()
    (tmp_path / name / "2.png").write_bytes(encoded(random_image(2)))
    with pytest.raises(UserError, match=r"class name .* rename it"):
        opened(tmp_path)


def test_what_is_left_out_is_counted_by_kind(tmp_path: Path) -> None:
    put(tmp_path, "cat/1.png", "dog/2.gif", "dog/3.jfif", "dog/4.npy", ".cache/5.png")
    put(tmp_path, "cat/a.heic", "cat/b.heic", "notes.txt", "LICENSE", "x.parquet", ".DS_Store", data=b"x")
    found = opened(tmp_path)
    assert len(found.items) == 4
    assert found.left_out == {".heic": 2, ".txt": 1, "LICENSE": 1, ".parquet": 1, "hidden": 1}


def test_a_source_without_images_says_what_it_holds(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no images \(\.heic 2\); these are packed: \.png"):
        opened(put(tmp_path, "a.heic", "b.heic", data=b"x"))


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl"])
def test_metadata_files_give_the_classes(tmp_path: Path, name: str) -> None:
    put(tmp_path, "a/1.png", "a/2.png", "a/3.png")
    rows = [("1.png", "dog"), ("2.png", "cat"), ("3.png", "dog")]
    if name.endswith("csv"):
        text = "file_name,label,text\n" + "".join(f"{n},{c},words\n" for n, c in rows)
    else:
        text = "\n".join(json.dumps({"file_name": n, "meta": {"label": c}}) for n, c in rows)
    put(tmp_path, f"a/{name}", data=text)
    found = opened(tmp_path)
    assert labels(found) == {"a/1.png": "dog", "a/2.png": "cat", "a/3.png": "dog"}
    assert found.notes[-1].endswith("label: 0 cat, 1 dog")
    assert found.other_files == 0
    assert opened(tmp_path, labels="none").class_names is None


def test_metadata_that_leaves_images_out_is_refused_with_one_of_them(tmp_path: Path) -> None:
    put(tmp_path, "1.png", "2.png")
    put(tmp_path, "metadata.csv", data="file_name,label\n1.png,3\n9.png,1\n")
    with pytest.raises(UserError, match=r"1 of 2 images have no label \(2\.png\).*labels=none"):
        opened(tmp_path)


@pytest.mark.parametrize(
    ("extension", "content", "wanted"),
    [
        ("cls", "7", 7),
        ("cls", "-1", None),
        ("cls", "cat\n", "cat"),
        ("label", "3", 3),
        ("json", '{"label": 2, "width": 8}', 2),
        ("json", '{"annotation": {"category": "cat"}}', "cat"),
        ("json", '{"label": [0, 0, 1]}', 2),
        ("json", '{"label": "4"}', 4),
        ("json", '{"label": 1.0}', 1),
        ("json", '{"caption": "a cat"}', None),
    ],
)
def test_a_file_beside_an_image_gives_its_class(
    tmp_path: Path, extension: str, content: str, wanted: str | int | None
) -> None:
    put(tmp_path, "a.b.png", "c.png")
    put(tmp_path, f"a.b.{extension}", f"c.{extension}", data=content)
    assert labels(opened(tmp_path)) == {"a.b.png": wanted, "c.png": wanted}


def test_several_fields_that_could_be_the_class_are_asked_about(tmp_path: Path) -> None:
    put(tmp_path, "1.png")
    put(tmp_path, "1.json", data='{"fine_label": 3, "coarse_label": 1, "size": 9}')
    with pytest.raises(
        UserError, match="each of coarse_label, fine_label could be the class; set label_column"
    ):
        opened(tmp_path)
    assert labels(opened(tmp_path, label_column="size")) == {"1.png": 9}
    with pytest.raises(
        UserError, match=r"label_column: .* has no 'sort'; it has: coarse_label, fine_label, size"
    ):
        opened(tmp_path, label_column="sort")


@pytest.mark.parametrize(
    ("one", "other", "complaint"),
    [
        ("999999999", "0", "has the label 999999999; the limit is 1000000"),
        ("1", "cat", "some labels are numbers"),
        ("0.5", "", "1 of 2 images have no label"),
        ("-7", "1", "a class is a number from 0 or a name"),
        ("x" * 300, "1", "that is a caption"),
    ],
)
def test_what_is_no_class_is_refused_with_the_image(
    tmp_path: Path, one: str, other: str, complaint: str
) -> None:
    put(tmp_path, "1.png", "2.png")
    put(tmp_path, "1.cls", data=one)
    put(tmp_path, "2.cls", data=other)
    with pytest.raises(UserError, match=complaint):
        opened(tmp_path)


def test_captions_under_a_label_are_not_taken_for_classes(tmp_path: Path) -> None:
    names = [f"{n}.png" for n in range(60)]
    put(tmp_path, *names, data=encoded(random_image(0)))
    put(tmp_path, "metadata.csv", data="file_name,label\n" + "".join(f"{n},a cat {n}\n" for n in names))
    with pytest.raises(UserError, match="60 different texts among 60 images, as captions do"):
        opened(tmp_path)
    assert len(opened(tmp_path, label_column="label").class_names or ()) == 60


def zipped(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


@pytest.mark.parametrize("wrapped", ["", "cifar10/"])
def test_a_dataset_json_gives_the_classes_not_the_folders(tmp_path: Path, wrapped: str) -> None:
    names = [f"{n // 2:05d}/img{n:08d}.png" for n in range(4)]
    images = {wrapped + name: encoded(random_image(n)) for n, name in enumerate(names)}
    pairs = [[name, n % 2] for n, name in enumerate(names)]
    for listed, wanted in ((pairs, [0, 1, 0, 1]), (None, [-1] * 4)):
        content = json.dumps({"labels": listed}).encode()
        found = opened(zipped(tmp_path / "x.zip", {**images, f"{wrapped}dataset.json": content}))
        assert [item.label for item in found.items] == wanted
        assert (found.class_names, found.other_files) == (None, 0)


def test_a_zip_with_odd_names_is_read_and_one_name_twice_is_refused(tmp_path: Path) -> None:
    data = [encoded(random_image(n)) for n in range(3)]
    found = opened(
        zipped(tmp_path / "x.zip", {"/cat/1.png": data[0], "C:/cat/2.png": data[1], "./dog/3.png": data[2]})
    )
    assert labels(found) == {"cat/1.png": "cat", "cat/2.png": "cat", "dog/3.png": "dog"}
    assert [read_item(found, n) for n in range(3)] == data
    with zipfile.ZipFile(tmp_path / "twice.zip", "w") as archive:
        archive.writestr("1.png", data[0])
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("1.png", data[1])
    with pytest.raises(UserError, match=r"1\.png occurs twice; keep one"):
        opened(tmp_path / "twice.zip")
    with pytest.raises(UserError, match="names that lead elsewhere"):
        opened(zipped(tmp_path / "up.zip", {"../1.png": data[0]}))


@pytest.mark.parametrize(
    ("source", "remedy"),
    [
        ("gs://bucket/photos", "gcloud storage cp -r gs://bucket/photos FOLDER"),
        ("pipe:cat x.tar", "write what the command prints to a file"),
    ],
)
def test_sources_elsewhere_are_refused_with_a_way_here(source: str, remedy: str) -> None:
    with pytest.raises(UserError, match="this scheme is not read") as refusal:
        opened(source)
    assert remedy in str(refusal.value)


def test_a_file_uri_is_a_path(tmp_path: Path) -> None:
    folder = put(tmp_path / "with space", "1.png")
    assert len(opened(folder.as_uri()).items) == 1
