"""Small data sets to try things on."""

import atexit
import io
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from ddpm_pipeline.config.data import DataConfig, PackConfig
from ddpm_pipeline.data.formats.shards import write_shard
from ddpm_pipeline.data.index import Index
from ddpm_pipeline.data.packing.build_index import build_index
from ddpm_pipeline.data.packing.pack_dataset import pack
from ddpm_pipeline.data.reading.loader import Batch, Loader
from ddpm_pipeline.store import Store, open_store


def random_image(number: int, size: tuple[int, int] = (8, 8), channels: int = 3) -> np.ndarray:
    """uint8 (height, width, channels), different for every number."""
    shape = (size[1], size[0], channels)
    return np.random.default_rng(number).integers(0, 256, shape, np.uint8)


def encoded(pixels: np.ndarray, kind: str = "png", **options: object) -> bytes:
    """An image file."""
    out = io.BytesIO()
    if kind == "npy":
        np.save(out, pixels)
    else:
        Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).save(out, kind, **options)
    return out.getvalue()


def sample(number: int) -> tuple[str, dict[str, bytes]]:
    """A shard's sample with an image and a label."""
    return f"{number:06d}", {"png": encoded(random_image(number)), "cls": str(number % 10).encode()}


def small_set(uri: str, counts: tuple[int, ...] = (13, 7, 20, 11, 9)) -> Index:
    """Shards of these sizes, indexed."""
    store, first = open_store(uri), 0
    for number, count in enumerate(counts):
        store.write(f"{number:03d}.tar", write_shard(sample(i) for i in range(first, first + count)))
        first += count
    return build_index(uri)


def read_through(index: Index, store: Store) -> Index:
    """The index, with its shards read through this object."""
    index = index.model_copy()
    index.__dict__["store"] = store
    return index


def digits(dest: str, **settings: object) -> PackConfig:
    """scikit-learn's digits, packed."""
    config = PackConfig.model_validate(
        {"source": "digits", "dest": dest, "channels": 1, "shard_size": 150, **settings}
    )
    pack(config)
    return config


def sixty(dest: str, **settings: object) -> PackConfig:
    """Sixty small images of three classes, packed into six shards."""
    source = Path(tempfile.gettempdir()) / f"ddpm-tests-sixty-{os.getpid()}"
    if not source.exists():
        folder(source, {"cat": 20, "dog": 20, "newt": 20})
        atexit.register(shutil.rmtree, source)
    config = PackConfig.model_validate({"source": str(source), "dest": dest, "shard_size": 10, **settings})
    pack(config)
    return config


def folder(root: Path, classes: dict[str, int], size: tuple[int, int] = (8, 8)) -> Path:
    """A folder with a sub-folder of images for each class."""
    number = 0
    for name, count in classes.items():
        (root / name).mkdir(parents=True)
        for _ in range(count):
            (root / name / f"{number}.png").write_bytes(encoded(random_image(number, size)))
            number += 1
    return root


def batches(
    index: Index, start: int, stop: int, *, batch: int = 7, world: int = 1, seed: int = 5, **settings: object
) -> list[list[Batch]]:
    """Of each rank in turn, the batches of these steps."""
    config = DataConfig.model_validate({"uri": index.uri, "window_shards": 2, **settings})
    found: list[list[Batch]] = []
    for rank in range(world):
        loader = Loader(config, index, seed, batch, rank, world)
        found.append(list(loader.batches(start, stop)))
        loader.close()
    return found


def by_position(ranks: list[list[Batch]]) -> dict[int, tuple[bytes, int]]:
    """Pixels and label of every position; no position may come twice."""
    found: dict[int, tuple[bytes, int]] = {}
    for batch in (batch for rank in ranks for batch in rank):
        assert batch.labels is not None
        for position, image, label in zip(
            batch.positions.tolist(), batch.images, batch.labels.tolist(), strict=True
        ):
            assert position not in found
            found[position] = (image.numpy().tobytes(), label)
    return found
