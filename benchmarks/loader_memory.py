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

from pipeline.config.data import DataConfig
from pipeline.data import Loader, assemble_index, index_shard, load_index, write_shard
from pipeline.data.location import Location
from pipeline.data.order import GlobalOrder
from pipeline.data.png import encode_png
from pipeline.store import Store, open_store

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
        for number in range(NUM_SHARDS):
            remote.write(f"{number:03d}.tar", shard)
        again = _worker(_indexed(remote), str(folder / "large-cache"))
        found |= {f"s3_{name}": value for name, value in again.items()}
    return found


def one_worker(uri: str, cache: str | None) -> dict[str, float]:
    """A cold seek to position 1e8, then batches at the beginning of ten windows of eight shards."""
    import psutil
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
    memory = psutil.Process().memory_full_info()
    return {
        "cold_seek_ms": seek_seconds * 1e3,
        "memory_rss_mb": memory.rss / 1e6,
        "memory_own_mb": memory.uss / 1e6,
    }


def _indexed(store: Store) -> str:
    """All shards are the same tar: it is scanned once, and each has its own entry."""
    entry, table = index_shard(store, "000.tar")
    tags = {info.key: info.etag for info in store.list() if info.key.endswith(".tar")}
    entries = [entry.model_copy(update={"name": name, "etag": tags[name]}) for name in sorted(tags)]
    assemble_index(Location.of(store.uri), ((each, table) for each in entries))
    return store.uri


def _worker(uri: str, *cache: str) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.loader_memory", uri, *cache]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def _dot(number: int) -> np.ndarray:
    pixels = np.zeros((8, 8, 1), np.uint8)
    pixels.reshape(-1)[number % 64] = 1 + number // 64
    return pixels


if __name__ == "__main__":
    print(json.dumps(one_worker(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else None)))
