"""Memory of one reading process on a large data set, and the time of a cold seek in it.

`python -m benchmarks.loader_memory URI [CACHE]` is that process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil

from ddpm_pipeline.config.data import DataConfig
from ddpm_pipeline.data.formats.png import encode_png
from ddpm_pipeline.data.formats.shards import write_shard
from ddpm_pipeline.data.index import Index, assemble_index, load_index
from ddpm_pipeline.data.location import Location
from ddpm_pipeline.data.packing.scan_shard import index_shard
from ddpm_pipeline.data.reading.loader import Loader
from ddpm_pipeline.data.reading.order import GlobalOrder
from ddpm_pipeline.store import Store, open_store

NUM_SHARDS, EACH = 1000, 10_000
BATCH, NUM_WINDOWS = 128, 10


def measure(folder: Path, s3: str | None) -> dict[str, float]:
    """Of a process that reads from files, and, if there is an S3, of one that reads from there through a cache."""
    shard = write_shard((f"{row:08d}", {"png": encode_png(_dot(row))}) for row in range(EACH))
    files = open_store((folder / "large").as_uri())
    files.write("000.tar", shard)
    for number in range(1, NUM_SHARDS):
        os.link(folder / "large" / "000.tar", folder / "large" / f"{number:03d}.tar")
    found = _worker(_indexed(files))
    if s3 is not None:
        remote = open_store(f"{s3}/large")
        remote.write("000.tar", shard)
        _copies(f"{s3}/large")
        again = _worker(_indexed(remote), str(folder / "large-cache"))
        found |= {f"s3_{name}": value for name, value in again.items()}
    return found


def one_worker(uri: str, cache: str | None) -> dict[str, float]:
    """A cold seek to position 1e8, then batches at the beginning of ten windows of eight shards."""
    import torch

    torch.set_num_threads(1)
    index = load_index(uri)
    GlobalOrder(index.counts[:10], 1, 8).lookup(np.arange(4))  # imports are not what is measured
    began = time.perf_counter()
    GlobalOrder(index.counts, 0, 8).lookup(np.array([100_000_000]))
    seek_seconds = time.perf_counter() - began
    loader = Loader(DataConfig(uri=uri, memory_bytes=0, cache_dir=cache), index, 0, BATCH)
    for window in range(NUM_WINDOWS):
        step = window * 8 * EACH // BATCH
        for batch in loader.batches(step, step + 10):
            assert batch.images.any()
    loader.close()
    return {
        "cold_seek_ms": seek_seconds * 1e3,
        **_memory("process", psutil.Process()),
        **_of_loader_process(uri, cache, index),
    }


def _of_loader_process(uri: str, cache: str | None, index: Index) -> dict[str, float]:
    """A process as `num_workers` asks for, after a batch of each of ten windows."""
    config = DataConfig(uri=uri, memory_bytes=0, cache_dir=cache, num_workers=1)
    # A step that is a window long, of which this rank has one batch.
    running = Loader(config, index, 0, 8 * EACH, 0, 8 * EACH // BATCH).batches(0, 1000)
    for _ in range(NUM_WINDOWS):
        next(running)
    # The youngest: it was forked by a server, which was started by this process.
    young = max(psutil.Process().children(recursive=True), key=lambda child: child.create_time())
    return _memory("loader_process", young)


def _memory(name: str, process: psutil.Process) -> dict[str, float]:
    """Resident, and what no other process shares (the libraries of torch are shared by all on a machine)."""
    found = process.memory_full_info()
    return {f"{name}_rss_mb": found.rss / 1e6, f"{name}_own_mb": found.uss / 1e6}


def _indexed(store: Store) -> str:
    """All shards are the same tar: it is scanned once, and each has its own entry."""
    entry, table = index_shard(store, "000.tar")
    tags = {info.key: info.etag for info in store.list() if info.key.endswith(".tar")}
    entries = [entry.model_copy(update={"name": name, "etag": tags[name]}) for name in sorted(tags)]
    assemble_index(Location.of(store.uri), ((each, table) for each in entries))
    return store.uri


def _copies(uri: str) -> None:
    """The other shards, by the store itself: gateways note that they are the same bytes."""
    import boto3

    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    client, source = boto3.client("s3"), {"Bucket": bucket, "Key": f"{prefix}/000.tar"}
    for number in range(1, NUM_SHARDS):
        client.copy_object(Bucket=bucket, Key=f"{prefix}/{number:03d}.tar", CopySource=source)


def _worker(uri: str, *cache: str) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.loader_memory", uri, *cache]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def _dot(number: int) -> np.ndarray:
    pixels = np.zeros((8, 8, 1), np.uint8)
    pixels.reshape(-1)[number % 64] = 1 + number // 64
    return pixels


if __name__ == "__main__":
    print(json.dumps(one_worker(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else None)))
