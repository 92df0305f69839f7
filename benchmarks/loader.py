"""How fast samples reach the trainer: `python -m benchmarks.loader [--json] [--s3 s3://bucket/prefix]`.

The same pictures (crops of scikit-learn's two photographs, PNG by Pillow), the same decoder (Pillow), one process, in
one run, taking turns; images per second of CPU time, so that neighbours on the machine do not count, and of wall time:
- bare: the decoder alone, from bytes in memory;
- ours: Loader over plain tars in its shuffled order, without holding decoded samples;
- ours packed: the same pictures as `ddpm pack` writes them;
- webdataset, litdata, streaming: each on its own format (the `bench` extra; what is not installed is left out);
- with --s3: ours through a cold cache, and webdataset through boto3, from the object store.
Further: memory of a process on 10 million samples in 1,000 shards, and the time of a cold seek there.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from pipeline.config.data import DataConfig
from pipeline.data import Index, Loader, build_index, load_index, write_shard
from pipeline.data.index import assemble_index, content_digest
from pipeline.data.location import Location
from pipeline.data.order import GlobalOrder
from pipeline.data.png import encode_png
from pipeline.data.samples import SampleSource
from pipeline.data.scan import index_shard
from pipeline.store import open_store

EDGE, BATCH = 32, 128
Rates = dict[str, float]


@dataclass(frozen=True)
class Setting:
    """Where things are, and how much is measured."""

    work: Path
    num_samples: int
    num_shards: int
    s3: str | None


def decode(data: bytes) -> np.ndarray:
    """What every contender decodes with."""
    return np.asarray(Image.open(io.BytesIO(data)))


def pictures(count: int) -> Iterator[np.ndarray]:
    """Crops of real photographs, halved with anti-aliasing, uint8 (EDGE, EDGE, 3)."""
    from sklearn.datasets import load_sample_images

    photos, source = load_sample_images().images, np.random.default_rng(0)
    for _ in range(count):
        photo = photos[source.integers(len(photos))]
        top, left = (int(source.integers(size - 2 * EDGE)) for size in photo.shape[:2])
        crop = Image.fromarray(photo[top : top + 2 * EDGE, left : left + 2 * EDGE])
        yield np.asarray(crop.resize((EDGE, EDGE), Image.Resampling.LANCZOS))


def png(pixels: np.ndarray) -> bytes:
    """As most tools write it."""
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def write_tars(uri: str, files: list[bytes], num_shards: int) -> Index:
    """Plain tars of these pictures, indexed."""
    store, each = open_store(uri), len(files) // num_shards
    for number in range(num_shards):
        rows = range(number * each, (number + 1) * each)
        samples = ((f"{row:08d}", {"png": files[row], "cls": b"%d" % (row % 10)}) for row in rows)
        store.write(f"{number:05d}.tar", write_shard(samples))
    return build_index(uri)


def count_images(batches: Iterable[Any]) -> int:
    """Exhaust an iterable of samples; how many there were."""
    return sum(1 for _ in batches)


def ours(index: Index, **settings: object) -> int:
    """One epoch through the loader."""
    config = DataConfig.model_validate({"uri": index.uri, "memory_bytes": 0, **settings})
    loader = Loader(config, index, 0, BATCH)
    count = sum(len(batch.images) for batch in loader.batches(0, index.num_samples // BATCH))
    loader.close()
    return count


def webdataset_epoch(urls: list[str]) -> int:
    """One shuffled epoch of webdataset, in batches."""
    import webdataset

    def image(sample: dict[str, Any]) -> tuple[np.ndarray, int]:
        return decode(sample["png"]), int(sample["cls"])

    found = webdataset.WebDataset(urls, shardshuffle=len(urls)).shuffle(1000).map(image)
    return count_images(picture for batch in found.batched(BATCH) for picture in batch[0])


def open_s3_for_webdataset() -> None:
    """webdataset has no s3 scheme of its own."""
    import boto3
    from webdataset.gopen import gopen_schemes

    client = boto3.client("s3")

    def opened(url: str, *_: object, **__: object) -> Any:
        bucket, _, key = url.removeprefix("s3://").partition("/")
        return client.get_object(Bucket=bucket, Key=key)["Body"]

    gopen_schemes["s3"] = opened


def litdata_set(folder: Path, files: list[bytes]) -> Callable[[], int]:
    """The pictures in litdata's format, and an epoch of them."""
    from litdata import StreamingDataset
    from litdata.streaming.writer import BinaryWriter

    folder.mkdir()
    writer = BinaryWriter(str(folder), chunk_bytes="32MB")
    for row, data in enumerate(files):
        writer[row] = {"image": data, "label": row % 10}
    writer.done()
    writer.merge()

    def epoch() -> int:
        return count_images(decode(sample["image"]) for sample in StreamingDataset(str(folder), shuffle=True))

    return epoch


def streaming_set(folder: Path, files: list[bytes]) -> Callable[[], int]:
    """The pictures in MosaicML's format, and an epoch of them."""
    from streaming import MDSWriter, StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    clean_stale_shared_memory()
    with MDSWriter(out=str(folder), columns={"image": "bytes", "label": "int"}) as writer:
        for row, data in enumerate(files):
            writer.write({"image": data, "label": row % 10})
    dataset = StreamingDataset(local=str(folder), shuffle=True, batch_size=BATCH)
    return lambda: count_images(decode(sample["image"]) for sample in dataset)


def contenders(setting: Setting, files: list[bytes], packed: list[bytes]) -> dict[str, Callable[[], int]]:
    """Each name's epoch, ready to run again and again."""
    work = setting.work
    plain = write_tars((work / "tars").as_uri(), files, setting.num_shards)
    own = write_tars((work / "packed").as_uri(), packed, setting.num_shards)
    urls = [str(work / "tars" / shard.name) for shard in plain.shards]
    found: dict[str, Callable[[], int]] = {
        "bare": lambda: count_images(decode(data) for data in files),
        "ours": lambda: ours(plain),
        "ours_packed": lambda: ours(own),
        "webdataset": lambda: webdataset_epoch(urls),
    }
    if importlib.util.find_spec("litdata"):
        found["litdata"] = litdata_set(work / "litdata", files)
    if importlib.util.find_spec("streaming"):
        found["streaming"] = streaming_set(work / "mds", files)
    if setting.s3:
        remote = write_tars(setting.s3, files, setting.num_shards)
        open_s3_for_webdataset()
        found["ours_s3"] = lambda: ours(remote, cache_dir=tempfile.mkdtemp(dir=work))
        found["webdataset_s3"] = lambda: webdataset_epoch(
            [f"{setting.s3}/{shard.name}" for shard in remote.shards]
        )
    return found


def measure(epochs: dict[str, Callable[[], int]], rounds: int) -> tuple[Rates, Rates]:
    """Median images per CPU second and per wall second, the contenders taking turns."""
    cpu: dict[str, list[float]] = {name: [] for name in epochs}
    wall: dict[str, list[float]] = {name: [] for name in epochs}
    for number in range(rounds + 1):
        for name, epoch in epochs.items():
            began, began_wall = time.process_time(), time.perf_counter()
            count = epoch()
            if number:  # the first round warms imports and the page cache
                cpu[name].append(count / (time.process_time() - began))
                wall[name].append(count / (time.perf_counter() - began_wall))
    return tuple({name: statistics.median(rates) for name, rates in each.items()} for each in (cpu, wall))


def large_index(folder: Path) -> str:
    """1,000 shards of 10,000 samples; each is the same tar under another name, which costs no disk."""
    store, shards = open_store(folder.as_uri()), 1000
    shard = write_shard(
        (f"{row:08d}", {"png": data}) for row, data in enumerate([encode_png(_dot(i)) for i in range(10_000)])
    )
    store.write("000.tar", shard)
    for number in range(1, shards):
        os.link(folder / "000.tar", folder / f"{number:03d}.tar")
    entry, table = index_shard(store, "000.tar")
    entries = [entry.model_copy(update={"name": f"{number:03d}.tar"}) for number in range(shards)]
    index = assemble_index(Location.of(store.uri), ((each, table) for each in entries))
    assert index.digest == content_digest(index.shards, index.image, index.class_names)
    return store.uri


def _dot(number: int) -> np.ndarray:
    pixels = np.zeros((8, 8, 1), np.uint8)
    pixels.reshape(-1)[number % 64] = 1 + number // 64
    return pixels


def one_worker(uri: str) -> dict[str, float]:
    """Run in a process of its own: a cold seek to position 1e8, and memory after reading across ten windows."""
    import psutil

    torch.set_num_threads(1)
    index = load_index(uri, check=False)
    GlobalOrder(index.counts[:10], 1, 8).lookup(np.arange(4))
    began = time.perf_counter()
    GlobalOrder(index.counts, 0, 8).lookup(np.array([100_000_000]))
    seek_seconds = time.perf_counter() - began
    source = SampleSource(DataConfig(uri=uri, memory_bytes=0), index, 0)
    for window in range(10):
        source.get(np.arange(BATCH) + window * 80_000)
    memory = psutil.Process().memory_full_info()
    return {
        "cold_seek_ms": seek_seconds * 1e3,
        "memory_rss_mb": memory.rss / 1e6,
        "memory_own_mb": memory.uss / 1e6,
    }


def ratios(cpu: Rates) -> dict[str, float]:
    """The named comparisons of images per CPU second."""
    found = {
        "ours_over_bare": cpu["ours"] / cpu["bare"],
        "ours_packed_over_bare": cpu["ours_packed"] / cpu["bare"],
    }
    for peer in ("webdataset", "litdata", "streaming"):
        if peer in cpu:
            found[f"ours_over_{peer}"] = cpu["ours"] / cpu[peer]
    if "webdataset_s3" in cpu:
        found["ours_s3_over_webdataset_s3"] = cpu["ours_s3"] / cpu["webdataset_s3"]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object of ratios")
    parser.add_argument(
        "--s3", help="a prefix to write the tars to and read them from; the AWS variables say where"
    )
    parser.add_argument("--samples", type=int, default=16_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(one_worker(options.worker)))
        return 0
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="ddpm-bench-") as folder:
        setting = Setting(Path(folder), options.samples, 8, options.s3)
        pixels = list(pictures(setting.num_samples))
        epochs = contenders(setting, [png(each) for each in pixels], [encode_png(each) for each in pixels])
        cpu, wall = measure(epochs, options.rounds)
        command = [sys.executable, "-m", "benchmarks.loader", "--worker", large_index(Path(folder) / "large")]
        worker = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    found = {**ratios(cpu), **worker}
    if options.json:
        print(json.dumps({name: round(value, 3) for name, value in found.items()}))
        return 0
    for name in cpu:
        print(f"{name:15s} {cpu[name]:9.0f} images per CPU second {wall[name]:9.0f} per second")
    for name, value in found.items():
        print(f"{name:28s} {value:8.2f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
