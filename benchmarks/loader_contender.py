"""One contender of `benchmarks.loader` in a process of its own: reads an epoch for every line on its standard input.

`python -m benchmarks.loader_contender FOLDER CASE NAME [S3 PREFIX]`. In one case (see `CASES`) every contender reads
the same pictures, calls the same decoder, and delivers batches of uint8 arrays.
"""

from __future__ import annotations

import io
import json
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks import loader_peers
from benchmarks.loader_peers import Epoch, Task


class Case(NamedTuple):
    """What is read, and by which decoder."""

    tars: str
    """Folder of the tars."""
    extension: str
    edge: int
    batch: int
    decoder: Callable[[bytes], np.ndarray] | None
    """None: this project's."""


def by_pillow(data: bytes, *_: object) -> np.ndarray:
    """As most programs decode: Pillow's way from bytes to an array."""
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(data)))


CASES = {
    "pillow": Case("png", "png", 32, 128, by_pillow),
    "own": Case("png", "png", 32, 128, None),
    "packed": Case("packed", "png", 32, 128, None),
    "jpeg": Case("jpeg", "jpg", 256, 32, by_pillow),
    "jpeg_own": Case("jpeg", "jpg", 256, 32, None),
}


def task_of(case: Case, folder: Path, s3: str | None) -> Task:
    """What to do in that case, from the tars in `folder`, or from the same ones below `s3`."""
    from ddpm_pipeline.data.formats.images import decode_image

    local = folder / case.tars
    root = f"{s3}/{case.tars}" if s3 else str(local)
    urls = [f"{root}/{tar.name}" for tar in sorted(local.glob("*.tar"))]
    decode = case.decoder or partial(decode_image, shape=(case.edge, case.edge, 3))
    return Task(urls, local, case.extension, case.edge, case.batch, decode)


def bare(task: Task) -> Epoch:
    """The decoder alone, on bytes in memory; nothing is read, shuffled, checked or stacked."""
    files = list(task.files())
    return lambda: sum(1 for data in files if len(task.decode(data)) == task.edge)


def ours(task: Task) -> Epoch:
    """The loader in its shuffled order, without holding decoded samples.

    From S3 it reads through an empty cache and mixes two shards at a time, more than webdataset's buffer holds: there
    are only eight, and a set of hundreds is not in one window either.
    """
    import torch

    from ddpm_pipeline.config.data import DataConfig
    from ddpm_pipeline.data.index import load_index
    from ddpm_pipeline.data.reading import samples
    from ddpm_pipeline.data.reading.loader import Loader

    torch.set_num_threads(1)
    if task.decode is by_pillow:
        samples.decode_image = by_pillow
    remote = task.urls[0].startswith("s3://")
    uri = task.urls[0].rpartition("/")[0] if remote else task.local.as_uri()
    index, config = load_index(uri), DataConfig(uri=uri, memory_bytes=0)

    def epoch() -> int:
        cache = {"cache_dir": tempfile.mkdtemp(dir=task.local.parent), "window_shards": 2} if remote else {}
        loader = Loader(config.model_copy(update=cache), index, 0, task.batch)
        count = sum(len(batch.images) for batch in loader.batches(0, index.num_samples // task.batch))
        loader.close()
        return count

    return epoch


EPOCHS: dict[str, Callable[[Task], Epoch]] = {
    "bare": bare,
    "ours": ours,
    "webdataset": loader_peers.webdataset,
    "litdata": loader_peers.litdata,
    "streaming": loader_peers.streaming,
    "spdl": loader_peers.spdl,
    "torchdata": loader_peers.torchdata,
}


def main() -> None:
    folder, case, name, *s3 = sys.argv[1:]
    epoch = EPOCHS[name](task_of(CASES[case], Path(folder), s3[0] if s3 else None))
    # Its own voice: what a library prints must not be taken for an answer.
    answers, sys.stdout = sys.stdout, sys.stderr
    print("ready", file=answers, flush=True)
    for _ in sys.stdin:
        began, began_wall = time.process_time(), time.perf_counter()
        count = epoch()
        found = {"count": count, "cpu": time.process_time() - began, "wall": time.perf_counter() - began_wall}
        print(json.dumps(found), file=answers, flush=True)


if __name__ == "__main__":
    main()
