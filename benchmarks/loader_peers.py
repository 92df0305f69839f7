"""An epoch by other loaders, for `benchmarks.loader_contender`: the same pictures, decoder and size of batches.

Each is put together as its own documentation advises for tars, or reads its own format. Where there is a choice, it is
the one that was fastest here.
"""

from __future__ import annotations

import functools
import itertools
import random
import tarfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast
from urllib.parse import urlsplit

import numpy as np

from benchmarks import peers

Item = TypeVar("Item")
Epoch = Callable[[], int]
Sample = tuple[bytes, int]
"""A picture's file, and its class."""
SHUFFLE_BUFFER = 1000


@dataclass(frozen=True)
class Task:
    """What every contender does: read tars of pictures, decode them, deliver batches."""

    urls: list[str]
    """Of the tars: local paths, or s3://."""
    local: Path
    """Folder of the same tars on this machine."""
    extension: str
    """Of the pictures in the tars; their classes are in `.cls`."""
    edge: int
    batch: int
    decode: Callable[[bytes], np.ndarray]
    """A picture's file to uint8 (edge, edge, 3)."""

    def files(self) -> Iterator[bytes]:
        """The pictures as files, in stored order."""
        from ddpm_pipeline.data.formats.shards import read_shard

        for tar in sorted(self.local.glob("*.tar")):
            for _, parts in read_shard(tar):
                yield parts[self.extension]

    def decoded(self, samples: list[Sample]) -> tuple[np.ndarray, list[int]]:
        """A batch: uint8 (n, edge, edge, 3), and its classes."""
        return np.stack([self.decode(picture) for picture, _ in samples]), [label for _, label in samples]


def webdataset(task: Task) -> Epoch:
    """Shards in a shuffled order, samples through its buffer that shuffles them."""
    import webdataset as wds
    from webdataset.gopen import gopen_schemes

    def gopen(url: str, *_: object, **__: object) -> BinaryIO:
        return opened(url)

    gopen_schemes["s3"] = gopen  # it has none of its own

    def image(sample: dict[str, Any]) -> tuple[np.ndarray, int]:
        return task.decode(sample[task.extension]), int(sample["cls"])

    def epoch() -> int:
        found = wds.WebDataset(task.urls, shardshuffle=len(task.urls)).shuffle(SHUFFLE_BUFFER)
        return sum(len(images) for images, _ in found.map(image).batched(task.batch))

    return epoch


def litdata(task: Task) -> Epoch:
    """Its own format, written once beside the tars, and a shuffled epoch of it."""
    from litdata import StreamingDataset
    from litdata.streaming.writer import BinaryWriter

    folder = task.local.with_name(f"{task.local.name}-litdata")
    if not folder.exists():
        folder.mkdir()
        writer = BinaryWriter(str(folder), chunk_bytes="32MB")
        for row, data in enumerate(task.files()):
            writer[row] = {"image": data, "label": row % 10}
        writer.done()
        writer.merge()
    return lambda: _in_batches(task, StreamingDataset(str(folder), shuffle=True))


def streaming(task: Task) -> Epoch:
    """MosaicML's own format, written once beside the tars, and a shuffled epoch of it."""
    peers.stand_in()
    from streaming import MDSWriter, StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    clean_stale_shared_memory()
    folder = task.local.with_name(f"{task.local.name}-mds")
    if not folder.exists():
        with MDSWriter(out=str(folder), columns={"image": "bytes", "label": "int"}) as writer:
            for row, data in enumerate(task.files()):
                writer.write({"image": data, "label": row % 10})
    dataset = StreamingDataset(local=str(folder), shuffle=True, batch_size=task.batch)
    return lambda: _in_batches(task, dataset)


def spdl(task: Task) -> Epoch:
    """Its own tar reader in the thread of its source, and a thread that decodes. Only shards are shuffled.

    The source yields whole batches: each sample that passes through its queues alone costs more than its decoding.
    """
    from spdl.io import iter_tarfile
    from spdl.pipeline import PipelineBuilder

    def samples() -> Iterator[Sample]:
        for url in random.sample(task.urls, len(task.urls)):
            with opened(url) as file:
                yield from _paired(iter_tarfile(file.read()))

    def epoch() -> int:
        source = _grouped(samples(), task.batch)
        builder = PipelineBuilder[Any, Any]().add_source(source).pipe(task.decoded).add_sink()
        pipeline = builder.build(num_threads=1)
        with pipeline.auto_stop():
            return sum(len(images) for images, _ in pipeline)

    return epoch


def torchdata(task: Task) -> Epoch:
    """Its nodes over Python's tar reader; whole batches are decoded. Only shards are shuffled."""
    from torchdata.nodes import Batcher, IterableWrapper, Loader, Mapper

    def samples() -> Iterator[Sample]:
        for url in random.sample(task.urls, len(task.urls)):
            with opened(url) as file, tarfile.open(fileobj=file, mode="r|") as tar:
                yield from _paired(
                    (member.name, cast(BinaryIO, tar.extractfile(member)).read()) for member in tar
                )

    def epoch() -> int:
        batches = Batcher(IterableWrapper(samples()), task.batch, drop_last=False)
        return sum(len(images) for images, _ in Loader(Mapper(batches, task.decoded)))

    return epoch


def _in_batches(task: Task, samples: Iterable[Any]) -> int:
    """Decode samples and stack them into batches; how many there were."""
    pictures = (task.decode(sample["image"]) for sample in samples)
    return sum(len(np.stack(held)) for held in _grouped(pictures, task.batch))


def _grouped(items: Iterable[Item], count: int) -> Iterator[list[Item]]:
    rest = iter(items)
    while group := list(itertools.islice(rest, count)):
        yield group


def _paired(files: Iterable[tuple[str, bytes | memoryview]]) -> Iterator[Sample]:
    """A tar's files, a picture and a class in turn, as samples."""
    for (_, picture), (_, label) in zip(*[iter(files)] * 2, strict=True):
        yield bytes(picture), int(bytes(label))


def opened(url: str) -> BinaryIO:
    """A stream of a local file or of an object in S3."""
    where = urlsplit(url)
    if where.scheme != "s3":
        return open(url, "rb")
    return _s3().get_object(Bucket=where.netloc, Key=where.path[1:])["Body"]


@functools.cache
def _s3() -> Any:
    import boto3

    return boto3.client("s3")
