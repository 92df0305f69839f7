"""Packing against the plain way: Pillow reads, scales and writes PNG, webdataset's TarWriter makes one tar of them.

    python -m benchmarks.pack              # --pictures N, --rounds N; --json, --out FILE

Both take the same pictures, crops of photographs, from a folder for each of ten classes, and take turns in one process;
`pack` has one thread. What it does beyond the plain way is in its time: it looks at every picture before it writes,
hashes, compares and syncs what it writes, and makes the index.

- small: PNG of 32x32, kept as they are;
- photographs: JPEG of 256x256, scaled to 64x64;
- large: PNG of 256x256, kept as they are.
"""

import argparse
import io
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images
from webdataset.writer import TarWriter

from benchmarks.common import add_output_options, machine, publish, ratio_of, take_turns
from ddpm_pipeline.config.data import PackConfig
from ddpm_pipeline.data.packing.pack_dataset import pack


class Kind(NamedTuple):
    """Pictures to pack."""

    edge: int
    """In pixels, of the files."""
    suffix: str
    image_size: int | None
    """What they are scaled to."""
    share: int
    """One in so many of `--pictures`: larger ones take longer."""


KINDS = {
    "small": Kind(32, "png", None, 1),
    "photographs": Kind(256, "jpg", 64, 4),
    "large": Kind(256, "png", None, 16),
}


def write_pictures(folder: Path, kind: Kind, count: int) -> None:
    """Crops of scikit-learn's two photographs, from places drawn."""
    photographs, draw = load_sample_images().images, np.random.default_rng(0)
    for number in range(count):
        whole = photographs[number % 2]
        top, left = (int(draw.integers(0, edge - kind.edge)) for edge in whole.shape[:2])
        place = folder / str(number % 10)
        place.mkdir(parents=True, exist_ok=True)
        crop = np.ascontiguousarray(whole[top : top + kind.edge, left : left + kind.edge])
        Image.fromarray(crop).save(place / f"{number:06d}.{kind.suffix}")


def plainly(folder: Path, tar: Path, image_size: int | None) -> None:
    """What a script of a dozen lines does."""
    with tar.open("wb") as out, TarWriter(out, encoder=False) as writer:
        for number, path in enumerate(sorted(folder.rglob("*.*"))):
            image = Image.open(io.BytesIO(path.read_bytes())).convert("RGB")
            if image_size is not None:
                image = image.resize((image_size, image_size), Image.Resampling.LANCZOS)
            file = io.BytesIO()
            image.save(file, "png")
            files = {"png": file.getvalue(), "cls": path.parent.name.encode()}
            writer.write({"__key__": f"{number:09d}", **files})


def packed(folder: Path, dest: Path, image_size: int | None) -> None:
    """The same by `pack`, into an empty place."""
    shutil.rmtree(dest, ignore_errors=True)
    pack(PackConfig(source=str(folder), dest=dest.as_uri(), image_size=image_size, num_threads=1))


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and publish."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pack", description=__doc__)
    parser.add_argument("--pictures", type=int, default=8_000, help="small ones; of larger ones fewer")
    parser.add_argument("--rounds", type=int, default=7)
    add_output_options(parser)
    told = parser.parse_args(argv)
    numbers: dict[str, object] = {}
    for name, kind in KINDS.items():
        with tempfile.TemporaryDirectory() as work:
            folder, count = Path(work) / "in", told.pictures // kind.share
            write_pictures(folder, kind, count)
            tar, dest = Path(work) / "plain.tar", Path(work) / "packed"
            contenders: dict[str, Callable[[], None]] = {
                "plain": partial(plainly, folder, tar, kind.image_size),
                "pack": partial(packed, folder, dest, kind.image_size),
            }
            taken = take_turns(contenders, told.rounds)
            for part in ("cpu", "wall"):
                ours, theirs = ([getattr(s, part) for s in taken[who]] for who in ("pack", "plain"))
                numbers[f"{name}_pack_over_plain_{part}"] = ratio_of(ours, theirs)
            best = min(seconds.cpu for seconds in taken["pack"])
            numbers[f"{name}_microseconds_a_picture"] = best / count * 1e6
            size = sum(path.stat().st_size for path in dest.glob("shards/*.tar"))
            numbers[f"{name}_bytes_over_plain"] = size / tar.stat().st_size
    publish({**numbers, **machine("numpy", "pillow", "webdataset")}, told)
    return 0


if __name__ == "__main__":
    sys.exit(main())
