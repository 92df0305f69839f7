"""Data sets in the layouts of other programs are packed with the pixels and classes that their own readers see."""

import csv
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
from PIL import Image

from ddpm_pipeline.config.data import PackConfig
from ddpm_pipeline.data import pack
from ddpm_pipeline.data.index import load_index
from ddpm_pipeline.data.packing.open_source import open_source
from ddpm_pipeline.data.packing.pack_dataset import PackReport
from ddpm_pipeline.errors import UserError
from tests.data.making import encoded, random_image

COUNT = 6
IMAGES = [random_image(number, (12, 10)) for number in range(COUNT)]
CLASSES = [2, 0, 1, 1, 0, 2]
CELEBA = "list_attr_celeba.txt"

Samples = dict[bytes, Any]
"""RGB pixels of each image, and its class."""


def webdataset_samples(shards: list[str]) -> list[dict[str, Any]]:
    library: Any = webdataset
    return list(library.WebDataset(shards, shardshuffle=False).decode("rgb8"))


def packed(source: Path, dest: Path, **settings: object) -> tuple[Samples, PackReport]:
    """What plain webdataset reads from the pack; the class is its name, where it has one."""
    config = PackConfig.model_validate({"source": str(source), "dest": dest.as_uri(), **settings})
    report = pack(config)
    names = load_index(config.dest).class_names
    shards = sorted(map(str, dest.glob("shards/*.tar")))
    found: Samples = {}
    for sample in webdataset_samples(shards):
        label = sample.get("cls")
        found[sample["png"].tobytes()] = label if label is None or names is None else names[label]
    assert len(found) == report.num_samples
    return found, report


def seen(data: bytes) -> bytes:
    """RGB pixels as Pillow decodes them."""
    return Image.open(io.BytesIO(data)).convert("RGB").tobytes()


def jpeg(number: int) -> bytes:
    return encoded(IMAGES[number], "jpeg", quality=90)


def write(root: Path, files: dict[str, bytes | str]) -> Path:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data.encode() if isinstance(data, str) else data)
    return root


def zipped(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


@pytest.mark.parametrize("labelled", [True, False])
def test_a_zip_of_edms_dataset_tool(tmp_path: Path, labelled: bool) -> None:
    names = [f"{number // 2:05d}/img{number:08d}.png" for number in range(COUNT)]
    listed = [[name, label] for name, label in zip(names, CLASSES, strict=True)] if labelled else None
    images = {name: encoded(image) for name, image in zip(names, IMAGES, strict=True)}
    path = zipped(
        tmp_path / "cifar10-32x32.zip", {**images, "dataset.json": json.dumps({"labels": listed}).encode()}
    )
    with zipfile.ZipFile(path) as archive:
        table = dict(json.load(archive.open("dataset.json"))["labels"] or {})
        wanted = {seen(archive.read(name)): table.get(name) for name in names}
    assert packed(path, tmp_path / "set")[0] == wanted


def test_a_folder_of_class_folders_as_torchvision_numbers_them(tmp_path: Path) -> None:
    folders = ["beta", "alpha", "Gamma"]
    root = write(tmp_path / "in", {f"{folders[label]}/{n}.jpeg": jpeg(n) for n, label in enumerate(CLASSES)})
    classes = sorted(entry.name for entry in root.iterdir() if entry.is_dir())
    wanted = {
        seen(path.read_bytes()): name for name in classes for path in sorted((root / name).rglob("*.jpeg"))
    }
    found, _ = packed(root, tmp_path / "set")
    assert found == wanted
    assert load_index((tmp_path / "set").as_uri()).class_names == tuple(classes)


ATTRIBUTES = ["5_o_Clock_Shadow", "Smiling", "Young"]
FACES = [[-1, 1, 1], [1, -1, 1], [-1, -1, -1], [1, 1, -1], [-1, 1, -1], [1, -1, -1]]
PARTITION = [0, 0, 0, 1, 2, 2]


def celeba_tables() -> dict[str, str]:
    faces = [f"{n + 1:06d}.jpg " + " ".join(f"{v:2d}" for v in row) for n, row in enumerate(FACES)]
    splits = [f"{n + 1:06d}.jpg {split}" for n, split in enumerate(PARTITION)]
    return {
        CELEBA: "\n".join([str(COUNT), " ".join(ATTRIBUTES) + " ", *faces]) + "\n",
        "list_eval_partition.txt": "\n".join(splits) + "\n",
        "identity_CelebA.txt": "\n".join(f"{n + 1:06d}.jpg {2880 + n}" for n in range(COUNT)),
    }


def celeba_as_kaggle_has_it(root: Path) -> Path:
    """Tables with commas, and a folder around the folder of images."""
    faces = [f"{n + 1:06d}.jpg," + ",".join(map(str, row)) for n, row in enumerate(FACES)]
    splits = [f"{n + 1:06d}.jpg,{split}" for n, split in enumerate(PARTITION)]
    tables = {
        "list_attr_celeba.csv": "\n".join([",".join(["image_id", *ATTRIBUTES]), *faces]),
        "list_eval_partition.csv": "\n".join(["image_id,partition", *splits]),
    }
    images = {f"img_align_celeba/img_align_celeba/{n + 1:06d}.jpg": jpeg(n) for n in range(COUNT)}
    return write(root, {**images, **tables})


def celeba_unpacked(root: Path) -> Path:
    images = {f"img_align_celeba/{n + 1:06d}.jpg": jpeg(n) for n in range(COUNT)}
    return write(root, {**images, **celeba_tables()})


def celeba_as_downloaded(root: Path) -> Path:
    """Images in their zip, the tables beside it."""
    write(root, dict(celeba_tables()))
    zipped(
        root / "img_align_celeba.zip", {f"img_align_celeba/{n + 1:06d}.jpg": jpeg(n) for n in range(COUNT)}
    )
    return root


CELEBA_LAYOUTS = pytest.mark.parametrize(
    "layout", [celeba_unpacked, celeba_as_downloaded, celeba_as_kaggle_has_it]
)


@CELEBA_LAYOUTS
def test_an_attribute_of_celeba_is_the_class_and_its_table_the_split(
    tmp_path: Path, layout: Callable[[Path], Path]
) -> None:
    root = layout(tmp_path / "celeba")
    table = celeba_tables()[CELEBA].strip().splitlines()
    parsed = list(csv.reader(table, delimiter=" ", skipinitialspace=True))  # as torchvision does
    column = 1 + parsed[1].index("Smiling")
    wanted = {
        seen(jpeg(n)): "Smiling" if (int(row[column]) + 1) // 2 else "not Smiling"
        for n, row in enumerate(parsed[2:])
    }
    found, report = packed(root, tmp_path / "all", label_column="Smiling")
    assert found == wanted
    assert "images of all splits are packed; split=train, validation or test chooses one" in report.notes
    of_split = {split: {seen(jpeg(n)) for n in range(COUNT) if PARTITION[n] == number}
                for number, split in enumerate(("train", "val", "test"))}  # fmt: skip
    for split, images in of_split.items():
        part, report = packed(root, tmp_path / split, label_column="Smiling", split=split)
        assert part == {pixels: wanted[pixels] for pixels in images}
        assert f"split {split}: {len(images)} of {COUNT} images" in report.notes


@CELEBA_LAYOUTS
def test_celeba_without_a_chosen_attribute_has_no_class_and_names_the_choice(
    tmp_path: Path, layout: Callable[[Path], Path]
) -> None:
    found, report = packed(layout(tmp_path / "celeba"), tmp_path / "set")
    assert found == {seen(jpeg(n)): None for n in range(COUNT)}
    assert any("3 attributes (5_o_Clock_Shadow, Smiling, Young" in note for note in report.notes)
    assert report.left_out == ({".txt": 1} if layout is not celeba_as_kaggle_has_it else {})


@pytest.mark.parametrize(
    ("file", "text", "complaint"),
    [
        (CELEBA, "1\nSmiling Young\n000001.jpg 1", r"a line of 2 words \('000001.jpg 1'\), 3 expected"),
        (CELEBA, "1\nSmiling\n000001.jpg 7", "holds '7'; 1 or -1 expected"),
        (CELEBA, "", "no rows; get the file again"),
        (CELEBA, "1\nYoung\n000001.jpg 1", r"has no 'Smiling'; it has: Young"),
        (CELEBA, "1\nSmiling\n000009.jpg 1", r"names none of the images \(img_align_celeba/000001.jpg\)"),
        ("list_eval_partition.txt", "000001.jpg 5", "holds the split '5'; 0, 1 or 2 expected"),
    ],
)
def test_damaged_tables_of_celeba_are_named(tmp_path: Path, file: str, text: str, complaint: str) -> None:
    tables = {CELEBA: "1\nSmiling\n000001.jpg 1", file: text}
    write(tmp_path, {"img_align_celeba/000001.jpg": jpeg(0), **tables})
    split = {"split": "train"} if file != CELEBA else {}
    with pytest.raises(UserError, match=complaint):
        packed(tmp_path, tmp_path / "set", label_column="Smiling", **split)


def img2dataset_record(number: int) -> dict[str, object]:
    """The json of a sample, with a column that was carried along (`--save_additional_columns`)."""
    return {
        "label": CLASSES[number], "caption": f"a picture {number}", "url": f"https://example.org/{number}.jpg",
        "key": f"{number:09d}", "status": "success", "error_message": None, "width": 12, "height": 10,
        "original_width": 120, "original_height": 100, "exif": "{}", "sha256": "0" * 64,
    }  # fmt: skip


def img2dataset_tables(root: Path) -> None:
    """What img2dataset writes beside each shard, or each folder, of two samples."""
    for shard in range(COUNT // 2):
        rows = [img2dataset_record(number) for number in (2 * shard, 2 * shard + 1)]
        pq.write_table(pa.Table.from_pylist(rows), root / f"{shard:05d}.parquet")
        (root / f"{shard:05d}_stats.json").write_text(json.dumps({"count": 2, "successes": 2}))


def test_tars_of_img2dataset_as_webdataset_reads_them(tmp_path: Path) -> None:
    root = tmp_path / "in"
    root.mkdir()
    for shard in range(COUNT // 2):
        with tarfile.open(root / f"{shard:05d}.tar", "w") as tar:
            for number in (2 * shard, 2 * shard + 1):
                record = img2dataset_record(number)
                for kind, data in (
                    ("jpg", jpeg(number)),
                    ("txt", str(record["caption"]).encode()),
                    ("json", json.dumps(record, indent=4).encode()),
                ):
                    member = tarfile.TarInfo(f"{record['key']}.{kind}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    img2dataset_tables(root)
    shards = sorted(map(str, root.glob("*.tar")))
    wanted = {sample["jpg"].tobytes(): sample["json"]["label"] for sample in webdataset_samples(shards)}
    assert packed(root, tmp_path / "set")[0] == wanted
    assert set(packed(root, tmp_path / "none", labels="none")[0].values()) == {None}


def test_files_of_img2dataset(tmp_path: Path) -> None:
    root = tmp_path / "in"
    for number in range(COUNT):
        record, stem = img2dataset_record(number), f"{number // 2:05d}/{number:09d}"
        write(root, {f"{stem}.jpg": jpeg(number), f"{stem}.txt": str(record["caption"])})
        write(root, {f"{stem}.json": json.dumps(record, indent=4)})
    img2dataset_tables(root)
    found, _ = packed(root, tmp_path / "set")
    assert found == {seen(jpeg(number)): label for number, label in enumerate(CLASSES)}


@pytest.mark.parametrize("split", [None, "train"])
@pytest.mark.parametrize("column", ["file_name", "image_file_name"])
@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_hugging_faces_imagefolder_with_a_metadata_table(
    tmp_path: Path, kind: str, column: str, split: str | None
) -> None:
    root, words = tmp_path / "in", ["cat", "dog", "newt"]
    for part in ("train", "test") if split else (".",):
        rows = [
            {column: f"images/{n}.jpg", "label": words[label], "text": f"caption {n}"}
            for n, label in enumerate(CLASSES)
        ]
        write(root / part, {f"images/{n}.jpg": jpeg(n if part != "test" else 5 - n) for n in range(COUNT)})
        if kind == "csv":
            with (root / part / "metadata.csv").open("w", newline="") as file:
                table = csv.DictWriter(file, list(rows[0]))
                table.writeheader()
                table.writerows(rows)
        elif kind == "jsonl":
            write(root / part, {"metadata.jsonl": "\n".join(map(json.dumps, rows))})
        else:
            pq.write_table(pa.Table.from_pylist(rows), root / part / "metadata.parquet")
    found, report = packed(root, tmp_path / "set", **({"split": split} if split else {}))
    assert found == {seen(jpeg(n)): words[label] for n, label in enumerate(CLASSES)}
    assert report.other_files == 0


def test_a_metadata_parquet_of_absurdly_many_rows_is_refused_unread(tmp_path: Path) -> None:
    write(tmp_path, {"1.jpg": jpeg(0)})
    rows = pa.table({"file_name": pa.array(["1.jpg"] * 2000), "label": pa.array(np.zeros(2000, np.int64))})
    pq.write_table(rows, tmp_path / "metadata.parquet")
    with pytest.raises(UserError, match=r"metadata\.parquet has 2,000 rows; the limit is 200"):
        open_source(PackConfig(source=str(tmp_path), dest="unused"))
