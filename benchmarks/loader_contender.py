"""One contender of `benchmarks.loader` in a process of its own: reads an epoch for every line on its standard input.

`python -m benchmarks.loader_contender FOLDER NAME DECODER [S3 PREFIX]`. Every contender reads the same pictures,
calls the same decoder, and delivers batches of uint8 arrays.
"""

from __future__ import annotations

import io
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import peers

EDGE, BATCH = 32, 128
Decode = Callable[[bytes], np.ndarray]
Epoch = Callable[[], int]


def by_pillow(data: bytes) -> np.ndarray:
    """As most programs decode: Pillow's way from bytes to an array."""
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(data)))


def decoder(name: str) -> Decode:
    """The decoder all contenders of a group use."""
    if name == "pillow":
        return by_pillow
    from ddpm_pipeline.data.formats.images import decode_image

    return partial(decode_image, shape=(EDGE, EDGE, 3))


def picture_files(tars: Path) -> Iterator[bytes]:
    """The pictures of a folder of tars, as files."""
    from ddpm_pipeline.data.formats.shards import read_shard

    for tar in sorted(tars.glob("*.tar")):
        for _, parts in read_shard(tar):
            yield parts["png"]


def batches_of(pictures: Iterable[np.ndarray]) -> int:
    """Stack pictures into batches until they end; how many there were."""
    count, held = 0, list[np.ndarray]()
    for picture in pictures:
        held.append(picture)
        if len(held) == BATCH:
            count += len(np.stack(held))
            held.clear()
    return count


def bare(tars: Path, decode: Decode) -> Epoch:
    """The decoder alone, on bytes in memory; nothing is read, shuffled, checked or stacked."""
    files = list(picture_files(tars))
    return lambda: sum(1 for data in files if len(decode(data)) == EDGE)


def ours(uri: str, decode: Decode, cold: Path | None = None) -> Epoch:
    """The loader in its shuffled order, without holding decoded samples; `cold`: through an empty cache there."""
    import torch

    from ddpm_pipeline.config.data import DataConfig
    from ddpm_pipeline.data.index import load_index
    from ddpm_pipeline.data.reading import samples
    from ddpm_pipeline.data.reading.loader import Loader

    torch.set_num_threads(1)
    if decode is by_pillow:
        samples.decode_image = lambda data, _: by_pillow(data)
    index = load_index(uri)

    def epoch() -> int:
        cache = None if cold is None else tempfile.mkdtemp(dir=cold)
        loader = Loader(DataConfig(uri=uri, memory_bytes=0, cache_dir=cache), index, 0, BATCH)
        count = sum(len(batch.images) for batch in loader.batches(0, index.num_samples // BATCH))
        loader.close()
        return count

    return epoch


def webdataset(urls: list[str], decode: Decode) -> Epoch:
    """One shuffled epoch in batches."""
    import webdataset as wds

    def image(sample: dict[str, Any]) -> tuple[np.ndarray, int]:
        return decode(sample["png"]), int(sample["cls"])

    def epoch() -> int:
        found = wds.WebDataset(urls, shardshuffle=len(urls)).shuffle(1000).map(image).batched(BATCH)
        return sum(len(images) for images, _ in found)

    return epoch


def teach_webdataset_s3() -> None:
    """webdataset has no s3 scheme of its own."""
    import boto3
    from webdataset.gopen import gopen_schemes

    client = boto3.client("s3")

    def opened(url: str, *_: object, **__: object) -> Any:
        bucket, _, key = url.removeprefix("s3://").partition("/")
        return client.get_object(Bucket=bucket, Key=key)["Body"]

    gopen_schemes["s3"] = opened


def litdata(tars: Path, decode: Decode) -> Epoch:
    """The pictures in litdata's format, written once, and a shuffled epoch of them."""
    from litdata import StreamingDataset
    from litdata.streaming.writer import BinaryWriter

    folder = tars.parent / "litdata"
    if not folder.exists():
        folder.mkdir()
        writer = BinaryWriter(str(folder), chunk_bytes="32MB")
        for row, data in enumerate(picture_files(tars)):
            writer[row] = {"image": data, "label": row % 10}
        writer.done()
        writer.merge()
    return lambda: batches_of(
        decode(sample["image"]) for sample in StreamingDataset(str(folder), shuffle=True)
    )


def streaming(tars: Path, decode: Decode) -> Epoch:
    """The pictures in MosaicML's format, written once, and a shuffled epoch of them."""
    peers.stand_in()
    from streaming import MDSWriter, StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    clean_stale_shared_memory()
    folder = tars.parent / "mds"
    if not folder.exists():
        with MDSWriter(out=str(folder), columns={"image": "bytes", "label": "int"}) as writer:
            for row, data in enumerate(picture_files(tars)):
                writer.write({"image": data, "label": row % 10})
    dataset = StreamingDataset(local=str(folder), shuffle=True, batch_size=BATCH)
    return lambda: batches_of(decode(sample["image"]) for sample in dataset)


def contender(folder: Path, name: str, decode: Decode, s3: str) -> Epoch:
    """The epoch of that name. `packed` is the folder of the pictures as `ddpm pack` writes them."""
    kind, _, where = name.partition("_")
    tars = folder / ("packed" if where == "packed" else "tars")
    names = [tar.name for tar in sorted(tars.glob("*.tar"))]
    if kind == "bare":
        return bare(tars, decode)
    if kind == "ours":
        return ours(s3, decode, folder) if where == "s3" else ours(tars.as_uri(), decode)
    if kind == "webdataset":
        if where == "s3":
            teach_webdataset_s3()
        return webdataset([f"{s3 if where == 's3' else tars}/{name}" for name in names], decode)
    return {"litdata": litdata, "streaming": streaming}[kind](tars, decode)


def main() -> None:
    folder, name, decoding, s3 = sys.argv[1:5]
    epoch = contender(Path(folder), name, decoder(decoding), s3)
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
