"""What reads bytes that others wrote: each reader as a function of bytes, and a sound document to start from.

A reader may refuse (UserError, DamageError, one line each) or take what it is given. Anything else that comes out
of it is a finding.
"""

import hashlib
import io
import json
import pickle
import tarfile
import tempfile
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from safetensors.torch import save

from ddpm_pipeline.config.data import PackConfig
from ddpm_pipeline.config.generation import GenerateConfig
from ddpm_pipeline.config.load import load_settings
from ddpm_pipeline.config.training import TrainConfig
from ddpm_pipeline.data.formats.images import encode_image
from ddpm_pipeline.data.formats.npy import decode_npy, encode_npy
from ddpm_pipeline.data.formats.provenance import read_mark, synthetic_mark
from ddpm_pipeline.data.index import load_index
from ddpm_pipeline.data.packing.dataset_card import (
    class_features,
    configurations,
    default_configuration,
    parse_card,
)
from ddpm_pipeline.data.packing.open_source import open_source
from ddpm_pipeline.data.packing.pack_dataset import pack
from ddpm_pipeline.data.packing.scan_shard import index_shard
from ddpm_pipeline.errors import DamageError, UserError
from ddpm_pipeline.generate.layout import MANIFEST_KEY, SPEC_KEY
from ddpm_pipeline.generate.manifest import read_manifest
from ddpm_pipeline.generate.plan import shards
from ddpm_pipeline.generate.spec import read_spec
from ddpm_pipeline.generate.stored_generation import Generation
from ddpm_pipeline.nets.model_files import CARD_FILE, load_card
from ddpm_pipeline.store import Store, open_store
from ddpm_pipeline.train.checkpoint import RECORD, STATE, load_checkpoint, save_checkpoint
from tests.generate.tiny import fill, settings, tiny_model

LONGEST_MESSAGE = 2000
SECTIONS = {"train": TrainConfig, "generate": GenerateConfig, "pack": PackConfig}


@dataclass(frozen=True)
class Target:
    """A reader of one kind of document."""

    name: str
    read: Callable[[bytes], object]
    """Puts the bytes where the program looks for them, and looks."""
    sound: bytes
    """A document it takes."""
    is_json: bool

    def refuses_or_takes(self, data: bytes) -> str | None:
        """The refusal, or None. Raises whatever else the reader lets out, and ValueError for a refusal that
        is not one line of bounded length.
        """
        try:
            self.read(data)
        except (UserError, DamageError) as error:
            said = str(error)
            if "\n" in said or not said or len(said) > LONGEST_MESSAGE:
                raise ValueError(f"not one line of at most {LONGEST_MESSAGE} characters: {said!r}") from error
            return said
        return None


@contextmanager
def all_targets() -> Generator[dict[str, Target]]:
    """Every reader, over files in a folder that lasts as long as the context."""
    with tempfile.TemporaryDirectory(prefix="ddpm-fuzz-") as folder:
        made = [
            *_data_targets(Path(folder) / "data"),
            *_array_targets(Path(folder) / "arrays"),
            _mark_target(),
            _parquet_target(Path(folder) / "parquet"),
            *_label_targets(Path(folder) / "labels"),
            *_generation_targets(Path(folder) / "generation"),
            *_training_targets(Path(folder) / "training"),
            _settings_target(Path(folder)),
        ]
        yield {target.name: target for target in made}


def _data_targets(folder: Path) -> Iterator[Target]:
    store = open_store(f"file://{folder}")
    tars = open_store(f"file://{folder}-tars")

    def read_tar(data: bytes) -> object:
        tars.write("a.tar", data)
        return index_shard(tars, "a.tar", pixels=True)

    yield Target("tar", read_tar, _small_tar(), is_json=False)
    yield Target("npy", decode_npy, encode_npy(np.arange(12, dtype=np.uint8).reshape(3, 4)), is_json=False)
    pack(PackConfig(source="digits", dest=store.uri, channels=1, shard_size=1000), None)

    def read_index(data: bytes) -> object:
        store.write("index.json", data)
        return load_index(store.uri)

    yield Target("index", read_index, store.read("index.json"), is_json=True)


def _mark_target() -> Target:
    marked = encode_image(np.zeros((4, 4, 3), np.uint8), "png", synthetic_mark("0" * 64, 3))
    return Target("image mark", read_mark, marked, is_json=False)


def _image_reader(folder: Path, name: str) -> Callable[[bytes], object]:
    """Opens the bytes as a data set in one file of this name, and reads all of its images."""
    file = folder / name.replace(".", "-") / name
    file.parent.mkdir(parents=True)
    source = str(file if file.suffix else file.parent)

    def read(data: bytes) -> object:
        file.write_bytes(data)
        opened = open_source(PackConfig(source=source, dest="unused"))
        return [opened.read(number) for number in range(len(opened.items))]

    return read


def _array_targets(folder: Path) -> Iterator[Target]:
    images, labels = np.arange(96, dtype=np.uint8).reshape(2, 48), [1, 0]
    idx = bytes([0, 0, 8, 3, 0, 0, 0, 2, 0, 0, 0, 6, 0, 0, 0, 8]) + images.tobytes()
    yield Target("idx", _image_reader(folder, "train-images-idx3-ubyte"), idx, is_json=False)
    batch = {b"data": np.zeros((2, 3072), np.uint8), b"labels": labels}
    yield Target(
        "CIFAR batch", _image_reader(folder, "data_batch_1"), pickle.dumps(batch, protocol=2), is_json=False
    )
    npz = io.BytesIO()
    np.savez(npz, images=images.reshape(2, 6, 8), labels=labels)
    yield Target("npz", _image_reader(folder, "set.npz"), npz.getvalue(), is_json=False)


def _parquet_target(folder: Path) -> Target:
    """Images with their classes, as Hugging Face keeps them."""
    picture = io.BytesIO()
    Image.new("RGB", (4, 4), (10, 200, 30)).save(picture, "PNG")
    rows = io.BytesIO()
    pq.write_table(pa.table({"image": [{"bytes": picture.getvalue()}] * 2, "label": [0, 1]}), rows)
    return Target("image parquet", _image_reader(folder, "train.parquet"), rows.getvalue(), is_json=False)


def _label_targets(folder: Path) -> Iterator[Target]:
    """Files that give the classes of the images beside them."""

    def reader(name: str, **settings: str) -> Callable[[bytes], object]:
        place = folder / name.replace(".", "-")
        place.mkdir(parents=True)
        Image.new("RGB", (4, 4), (10, 200, 30)).save(place / "1.png")

        def read(data: bytes) -> object:
            (place / name).write_bytes(data)
            config = PackConfig.model_validate({"source": str(place), "dest": "unused", **settings})
            return open_source(config).items

        return read

    rows = io.BytesIO()
    pq.write_table(pa.table({"file_name": ["1.png"], "label": ["cat"]}), rows)
    yield Target("metadata.parquet", reader("metadata.parquet"), rows.getvalue(), is_json=False)
    yield Target("metadata.csv", reader("metadata.csv"), b"file_name,label\n1.png,cat\n", is_json=False)
    faces = b"1\nSmiling Young\n1.png -1  1\n"
    celeba = reader("list_attr_celeba.txt", label_column="Young")
    yield Target("CelebA table", celeba, faces, is_json=False)
    yield Target("data set card", _read_card, _CARD, is_json=False)
    yield Target("dataset.json", reader("dataset.json"), b'{"labels": [["1.png", 3]]}', is_json=True)


_CARD = b"""---
dataset_info:
  features:
  - name: label
    dtype: {class_label: {names: {'0': cat, '1': dog}}}
configs:
- config_name: small
  data_files: [{split: train, path: data/train-*}]
---
"""


def _read_card(data: bytes) -> object:
    card = parse_card(data.decode(errors="replace"))
    files = [
        files.matches("data/train-0.parquet") for some in configurations(card).values() for files in some
    ]
    return files, default_configuration(card), class_features(card, ["small"])


def _generation_targets(folder: Path) -> Iterator[Target]:
    model = tiny_model(folder / "model")
    config = settings(model, f"file://{folder}/out", count=20)
    spec = fill(config)
    store = open_store(config.output)
    unit = next(iter(shards(spec)))
    yield _object("spec", store, SPEC_KEY, lambda: read_spec(store))
    yield _object("manifest", store, MANIFEST_KEY, lambda: read_manifest(store))
    yield _object("done-record", store, unit.done_key, lambda: Generation(store, spec).read_record(unit))
    yield _object("model card", open_store(f"file://{model}"), CARD_FILE, lambda: load_card(model))


def _training_targets(folder: Path) -> Iterator[Target]:
    store = open_store(f"file://{folder}")
    tensors = {"net/weight": torch.arange(6.0).reshape(2, 3), "step": torch.tensor(8)}
    save_checkpoint(store, 8, tensors, "identity")
    where = f"checkpoints/{8:012d}"
    yield _object("checkpoint record", store, f"{where}/{RECORD}", lambda: load_checkpoint(store, 8))

    other = open_store(f"file://{folder}-state")

    def read_state(data: bytes) -> object:
        record = {"step": 8, "sha256": hashlib.sha256(data).hexdigest(), "size_bytes": len(data)}
        other.write(f"{where}/{STATE}", data)
        other.write(f"{where}/{RECORD}", json.dumps({**record, "identity": "identity"}).encode())
        return load_checkpoint(other, 8)

    yield Target("checkpoint state", read_state, save(tensors), is_json=False)


def _settings_target(folder: Path) -> Target:
    file = folder / "settings.yaml"

    def read(data: bytes) -> object:
        file.write_bytes(data)
        return [
            load_settings(model, name, [file], sections=list(SECTIONS)) for name, model in SECTIONS.items()
        ]

    sound = b"""
pack: {source: digits, dest: file:///x, channels: 1, shard_size: 300}
generate: {model: m@champion, output: file:///y, count: 5}
train:
  name: tiny
  data: {uri: file:///x}
  net: {image_size: 8, in_channels: 1, out_channels: 1, base_channels: 8, multipliers: [1], norm_groups: 4}
  steps: 10
"""
    return Target("settings", read, sound, is_json=False)


def _object(name: str, store: Store, key: str, read: Callable[[], object]) -> Target:
    def put_and_read(data: bytes) -> object:
        store.write(key, data)
        return read()

    return Target(name, put_and_read, store.read(key), is_json=True)


def _small_tar() -> bytes:
    out = io.BytesIO()
    picture = io.BytesIO()
    Image.new("RGB", (4, 4), (10, 200, 30)).save(picture, "PNG")
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, data in (("0.png", picture.getvalue()), ("0.cls", b"3"), ("1.png", picture.getvalue())):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
        member = tarfile.TarInfo("1.json")
        member.size = len(label := b'{"label": 3}')
        tar.addfile(member, io.BytesIO(label))
    return out.getvalue()
