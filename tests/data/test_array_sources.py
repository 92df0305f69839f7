"""Data sets whose images lie in arrays are packed as their own readers read them."""

import gzip
import io
import os
import pickle
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ddpm_pipeline.config.data import PackConfig
from ddpm_pipeline.data import pack
from ddpm_pipeline.data.formats.npy import decode_npy
from ddpm_pipeline.data.packing import array_formats
from ddpm_pipeline.data.packing.open_source import open_source
from ddpm_pipeline.data.packing.sources import Source
from ddpm_pipeline.errors import UserError

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (7, 32, 32, 3), dtype=np.uint8)
LABELS = [3, 0, 1, 1, 9, 0, 2]
TEN = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def opened(source: Path, **settings: object) -> Source:
    return open_source(PackConfig.model_validate({"source": str(source), "dest": "unused", **settings}))


def pixels(source: Source) -> Any:
    return np.stack([decode_npy(source.read(i)) for i in range(len(source.items))])


def rows(images: Any) -> Any:
    """Each image as CIFAR stores it: 1,024 bytes of red, of green, of blue."""
    return images.transpose(0, 3, 1, 2).reshape(len(images), 3072)


def python_2_pickle(entries: Mapping[str, object]) -> bytes:
    """As CIFAR's authors wrote it: keys are bytes, and NumPy's module has its name of that time."""
    plain = {key.encode(): value for key, value in entries.items()}
    return pickle.dumps(plain, protocol=2).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")


def cifar_10(version: str) -> dict[str, bytes]:
    parts = {"data_batch_1": slice(0, 3), "data_batch_2": slice(3, 5), "test_batch": slice(5, 7)}
    if version == "python":
        files = {
            f"cifar-10-batches-py/{name}": python_2_pickle(
                {"data": rows(IMAGES[part]), "labels": LABELS[part]}
            )
            for name, part in parts.items()
        }
        names = python_2_pickle({"label_names": [name.encode() for name in TEN], "num_vis": 3072})
        return {
            **files,
            "cifar-10-batches-py/batches.meta": names,
            "cifar-10-batches-py/readme.html": b"<html>",
        }
    files = {
        f"cifar-10-batches-bin/{name}.bin": b"".join(
            bytes([label]) + row.tobytes()
            for label, row in zip(LABELS[part], rows(IMAGES[part]), strict=True)
        )
        for name, part in parts.items()
    }
    return {**files, "cifar-10-batches-bin/batches.meta.txt": ("\n".join(TEN) + "\n\n").encode()}


def written(folder: Path, files: Mapping[str, bytes], kind: str) -> Path:
    """The files in a folder, or in an archive of them."""
    if kind == "folder":
        for name, data in files.items():
            (folder / "unpacked" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "unpacked" / name).write_bytes(data)
        return folder / "unpacked"
    path = folder / "archive.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


@pytest.mark.parametrize("kind", ["folder", "tar.gz"])
@pytest.mark.parametrize("version", ["python", "binary"])
def test_cifar_10_is_read_in_both_of_its_versions(tmp_path: Path, version: str, kind: str) -> None:
    source = opened(written(tmp_path, cifar_10(version), kind), split="train")
    assert (pixels(source) == IMAGES[:5]).all()
    assert [item.label for item in source.items] == LABELS[:5]
    assert source.class_names == tuple(TEN)
    assert (source.copied_bytes > 0) == (kind == "tar.gz")  # so one process reads it, not each of a cluster's
    test = opened(written(tmp_path, cifar_10(version), kind), split="test")
    assert (pixels(test) == IMAGES[5:]).all()
    with pytest.raises(UserError, match=r"holds the splits test .* train .*; set split=NAME"):
        opened(written(tmp_path, cifar_10(version), kind))


@pytest.mark.parametrize("level", ["fine", "coarse"])
@pytest.mark.parametrize("version", ["python", "binary"])
def test_cifar_100_has_fine_and_coarse_classes(tmp_path: Path, version: str, level: str) -> None:
    fine, coarse = [f"fine {i:02d}" for i in range(100)], [f"coarse {i:02d}" for i in range(20)]
    coarse_labels = [label // 5 for label in LABELS]
    if version == "python":
        batch = {"data": rows(IMAGES), "fine_labels": LABELS, "coarse_labels": coarse_labels}
        files = {
            "train": python_2_pickle(batch),
            "test": python_2_pickle(batch),
            "meta": python_2_pickle({"fine_label_names": fine, "coarse_label_names": coarse}),
        }
    else:
        data = b"".join(
            bytes([c, f]) + row.tobytes()
            for c, f, row in zip(coarse_labels, LABELS, rows(IMAGES), strict=True)
        )
        files = {"train.bin": data, "test.bin": data}
        files |= {f"{name}_label_names.txt": "\n".join(words).encode()
                  for name, words in (("fine", fine), ("coarse", coarse))}  # fmt: skip
    folder = written(tmp_path, {f"cifar-100/{name}": data for name, data in files.items()}, "folder")
    source = opened(folder, split="train", label_column=level)
    assert (pixels(source) == IMAGES).all()
    wanted = (LABELS, fine) if level == "fine" else (coarse_labels, coarse)
    assert ([item.label for item in source.items], list(source.class_names or ())) == wanted
    with pytest.raises(UserError, match="label_column: medium: CIFAR-100 has the classes"):
        opened(folder, split="train", label_column="medium")


def idx(array: Any) -> bytes:
    sizes = b"".join(size.to_bytes(4) for size in array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes()


@pytest.mark.parametrize("between", ["-", "."])
@pytest.mark.parametrize("packed", [True, False])
def test_mnist_and_its_copies_are_read_from_idx_files(tmp_path: Path, between: str, packed: bool) -> None:
    gray = RNG.integers(0, 256, (5, 28, 28), dtype=np.uint8)
    classes = np.array([4, 0, 9, 1, 1], np.uint8)
    for split, chosen in (("train", slice(0, 4)), ("t10k", slice(4, 5))):
        for name, array in (
            (f"images{between}idx3", gray[chosen]),
            (f"labels{between}idx1", classes[chosen]),
        ):
            path = tmp_path / "MNIST" / "raw" / f"{split}-{name}-ubyte"
            path.parent.mkdir(parents=True, exist_ok=True)
            data = idx(array)
            (path.with_name(path.name + ".gz") if packed else path).write_bytes(
                gzip.compress(data) if packed else data
            )
    train, test = opened(tmp_path, split="train"), opened(tmp_path, split="test")
    assert (pixels(train)[..., 0] == gray[:4]).all()
    assert [item.label for item in (*train.items, *test.items)] == classes.tolist()
    assert train.class_names is None
    assert len({item.name for item in train.items}) == 4
    none = opened(tmp_path, split="train", labels="none")
    assert {item.label for item in none.items} == {-1}


def test_a_file_of_no_images_has_none_whatever_their_size_would_be(tmp_path: Path) -> None:
    (tmp_path / "train-images-idx3-ubyte").write_bytes(bytes([0, 0, 8, 3, 0, 0, 0, 0, *[255] * 8]))
    with pytest.raises(UserError, match="holds no images"):
        opened(tmp_path)


def test_the_images_of_emnist_are_turned_upright(tmp_path: Path) -> None:
    gray = RNG.integers(0, 256, (2, 28, 28), dtype=np.uint8)
    (tmp_path / "emnist-letters-train-images-idx3-ubyte").write_bytes(idx(gray.transpose(0, 2, 1)))
    (tmp_path / "emnist-letters-train-labels-idx1-ubyte").write_bytes(idx(np.array([1, 26], np.uint8)))
    assert (pixels(opened(tmp_path))[..., 0] == gray).all()


@pytest.mark.parametrize(
    ("names", "split"),
    [
        (("images", "labels"), None),
        (("train_images", "train_labels"), "train"),
        (("val_images", "val_labels"), "validation"),
        (("x_train", "y_train"), "train"),
        (("arr_0", "arr_1"), None),
    ],
)
@pytest.mark.parametrize("form", ["NHWC", "NCHW", "labels in a column", "one-hot"])
def test_images_and_labels_of_an_npz_are_known_by_their_names(
    tmp_path: Path, names: tuple[str, str], split: str | None, form: str
) -> None:
    labels = np.array(LABELS)
    given = {"labels in a column": labels[:, None], "one-hot": np.eye(10, dtype=np.uint8)[labels]}.get(
        form, labels
    )
    images = IMAGES.transpose(0, 3, 1, 2) if form == "NCHW" else IMAGES
    np.savez(tmp_path / "set.npz", **{names[0]: images, names[1]: given, "other": np.zeros(3)})
    source = opened(tmp_path / "set.npz", split=split)
    assert (pixels(source) == IMAGES).all()
    assert [item.label for item in source.items] == LABELS


def test_a_packed_array_data_set_has_its_pixels_and_is_recognized_again(tmp_path: Path) -> None:
    np.savez(tmp_path / "set.npz", images=IMAGES, labels=LABELS)
    config = PackConfig(source=str(tmp_path / "set.npz"), dest=f"file://{tmp_path}/out")
    assert pack(config).num_samples == 7
    before = (tmp_path / "out" / "index.json").stat().st_mtime_ns
    assert pack(config).num_samples == 7
    assert (tmp_path / "out" / "index.json").stat().st_mtime_ns == before


class Runs:
    """What a hostile pickle holds: a call."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return (os.system, ("touch /tmp/owned-by-a-pickle",))


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"data_batch_1": pickle.dumps({b"data": Runs()}, protocol=2)}, "system is not expected in it"),
        ({"data_batch_1": b"no pickle"}, "is no batch of CIFAR"),
        ({"data_batch_1": b"}r\xff\xff\xff\x7f."}, "object number 2147483647 in 7 bytes"),
        ({"data_batch_1": python_2_pickle({"labels": [1]})}, "holds no array `data`"),
        ({"data_batch_1": python_2_pickle({"data": rows(IMAGES), "labels": [1]})}, "7 images and 1 labels"),
        ({"data_batch_1": python_2_pickle({"data": np.zeros((2, 3072))})}, "bytes in C order expected"),
        ({"data_batch_1.bin": bytes(3072)}, "no multiple of the 3073 of an image"),
        ({"data_batch_1.bin": b""}, "no multiple of the 3073 of an image"),
        ({"train-images-idx3-ubyte": idx(np.zeros((2, 3, 3), np.uint8))[:-1]}, "but 17 values follow"),
        ({"train-images-idx3-ubyte": b"\x1f\x8b broken"}, "cannot be decompressed"),
        ({"train-images-idx3-ubyte": idx(np.zeros(3, np.uint8))}, "no idx file of bytes with 3 dimensions"),
        (
            {"train-images-idx3-ubyte": idx(np.zeros((2, 3, 3), np.uint8)),
             "train-labels-idx1-ubyte": idx(np.zeros(3, np.uint8))},
            "holds 2 images, train-labels-idx1-ubyte holds 3 labels",
        ),
        (
            {"train-images-idx3-ubyte": bytes([0, 0, 8, 3, 255, 0, 0, 0, 0, 0, 0, 28, 0, 0, 0, 0])},
            r"says \(4278190080, 28, 0\): 4278190080 images without pixels",
        ),
    ],
)  # fmt: skip
def test_a_damaged_or_hostile_file_is_named_in_one_line(
    tmp_path: Path, files: dict[str, bytes], said: str
) -> None:
    folder = written(tmp_path, files, "folder")
    with pytest.raises(UserError, match=said) as error:
        opened(folder)
    assert next(iter(files)) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"images": np.zeros((2, 4, 4), np.float32)}, "images holds float32; images are bytes"),
        ({"images": np.zeros((2, 4), np.uint8)}, r"images has the shape \(2, 4\)"),
        ({"images": np.zeros((2, 4, 4), np.uint8), "labels": np.zeros(3)}, "2 images, labels holds 3 labels"),
        ({"images": np.array([{}], dtype=object)}, "is no npz that can be read"),
        ({"pictures": np.zeros((2, 4, 4), np.uint8)}, "holds no array of a known name"),
        ({"images": np.zeros((0, 4, 4), np.uint8)}, "holds no images"),
        ({"images": np.zeros((10**12, 0, 4), np.uint8)}, "1000000000000 images without pixels"),
        (
            {"images": np.zeros((1, 4, 4), np.uint8), "labels": np.array([[1, 1]])},
            "one class an image is expected",
        ),
    ],
)
def test_an_npz_that_cannot_be_packed_is_refused_in_one_line(
    tmp_path: Path, arrays: dict[str, Any], said: str
) -> None:
    np.savez(tmp_path / "set.npz", **arrays)
    with pytest.raises(UserError, match=said) as error:
        opened(tmp_path / "set.npz")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("shape", ["(1 << 60, 4, 4)", f"({1 << 60}, 4, 4)", "(2, ", "(" * 500])
def test_an_npz_whose_header_numpy_cannot_parse_or_hold_is_refused(tmp_path: Path, shape: str) -> None:
    header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}".encode() + b", }\n"
    array = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header
    with zipfile.ZipFile(tmp_path / "set.npz", "w") as archive:
        archive.writestr("images.npy", array)
    with pytest.raises(UserError, match="is no npz that can be read") as error:
        opened(tmp_path / "set.npz")
    assert "\n" not in str(error.value)


def test_an_npz_that_claims_more_than_memory_should_hold_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(array_formats, "MAX_ARRAY_BYTES", 1000)
    np.savez_compressed(tmp_path / "set.npz", images=np.zeros((100, 8, 8), np.uint8))
    with pytest.raises(UserError, match=r"images\.npy claims 6528 bytes; the limit is 1000"):
        opened(tmp_path / "set.npz")
