"""How fast samples reach the trainer: `python -m benchmarks.loader [--json]`.

The same pictures (crops of scikit-learn's two photographs, halved, written as PNG by Pillow) for everyone, and the same
decoder, once Pillow's (`pillow`) and once this project's (`own`). Each contender has a process of its own and reads one
epoch in each round, one after the other, in an order that turns; ratios are taken within a round, medians over rounds:
- bare: the decoder alone, on bytes in memory;
- ours: Loader over plain tars in its shuffled order, without holding decoded samples;
- webdataset on the same tars; litdata and streaming (MosaicML's), each on its own format, from warm local files;
- ours_s3, webdataset_s3: the same tars from S3, ours through an empty cache;
- bare_packed, ours_packed: the pictures as `ddpm pack` writes them, this project's decoder.
All deliver batches of uint8. Rates are images per second of CPU time, which neighbours on the machine disturb least,
and of wall time. Further: memory of a process that reads 10 million samples in 1,000 shards, from files and from S3
through a cache, and the time of a cold seek there.

S3 is the gateway of the local stack (the `stack` extra), started here on loopback, or with --s3 a prefix in the store
that the AWS variables name. The peers come into an environment of their own (see benchmarks/peers.py), made in a
temporary folder, or once for all in --peers.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks import loader_memory, peers
from benchmarks.common import Ratio, add_output_options, machine, publish, ratio_of
from benchmarks.loader_contender import EDGE
from benchmarks.s3_gateway import own_gateway
from ddpm_pipeline.data.formats.png import encode_png
from ddpm_pipeline.data.formats.shards import write_shard
from ddpm_pipeline.data.packing.build_index import build_index
from ddpm_pipeline.errors import UserError
from ddpm_pipeline.store import open_store

REPOSITORY = Path(__file__).resolve().parents[1]
NUM_SHARDS = 8
DECODERS = ("pillow", "own")
PEERS = ("litdata", "streaming")
COMPARED = (
    ("ours", "bare"), ("ours", "webdataset"), ("ours", "litdata"), ("ours", "streaming"),
    ("ours_s3", "webdataset_s3"), ("ours_packed", "bare_packed"),
)  # fmt: skip
Round = dict[str, dict[str, float]]
"""Of each contender: images a second of CPU time (`cpu`) and of wall time (`wall`)."""


class Contender:
    """A process that reads an epoch whenever it is asked to."""

    def __init__(self, python: str, folder: Path, name: str, decoder: str, s3: str) -> None:
        command = [python, "-m", "benchmarks.loader_contender", str(folder), name, decoder, s3]
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
        self._log = (folder / f"{name}.{decoder}.log").open("w+b")
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=environment,
        )
        self.name = f"{name}.{decoder}"
        self._answer()

    def epoch(self) -> dict[str, float]:
        """Images a second of CPU and of wall time."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        found = json.loads(self._answer())
        return {clock: found["count"] / found[clock] for clock in ("cpu", "wall")}

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()
        self._log.close()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._log.seek(0)
            raise RuntimeError(f"{self.name} ended: {self._log.read()[-800:].decode(errors='replace')}")
        return line


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


def write_tars(uri: str, files: list[bytes]) -> None:
    """Plain tars of these pictures, indexed."""
    store, each = open_store(uri), len(files) // NUM_SHARDS
    for number in range(NUM_SHARDS):
        rows = range(number * each, (number + 1) * each)
        samples = ((f"{row:08d}", {"png": files[row], "cls": b"%d" % (row % 10)}) for row in rows)
        store.write(f"{number:05d}.tar", write_shard(samples))
    build_index(uri)


@contextlib.contextmanager
def contenders(folder: Path, s3: str | None, peers_python: str | None) -> Generator[list[Contender]]:
    """All of them, ready, and ended afterwards."""
    # Those that are compared stand close together: the pace of a shared machine changes within a round.
    local = ("webdataset", "bare", "ours", *(PEERS if peers_python else ()))
    names = [(name, decoder) for decoder in DECODERS for name in local]
    names += [("bare_packed", "own"), ("ours_packed", "own")]
    names += [(f"{name}_s3", decoder) for decoder in DECODERS for name in ("ours", "webdataset") if s3]
    started: list[Contender] = []
    try:
        for name, decoder in names:
            python = peers_python if peers_python and name in PEERS else sys.executable
            started.append(Contender(python, folder, name, decoder, s3 or "-"))
        yield started
    finally:
        for one in started:
            one.close()


def measure(crowd: list[Contender], num_rounds: int) -> list[Round]:
    """Rates in each round. One more round goes first, which warms imports and the page cache."""
    found: list[Round] = []
    for number in range(num_rounds + 1):
        turn = number % len(crowd)
        rates = {one.name: one.epoch() for one in crowd[turn:] + crowd[:turn]}
        found.append(rates)
        print(f"round {number} of {num_rounds}", file=sys.stderr, flush=True)
    return found[1:]


def ratios(rounds: list[Round]) -> dict[str, Ratio]:
    """The named comparisons, paired round by round."""
    found: dict[str, Ratio] = {}
    for decoder in DECODERS:
        for one, other in COMPARED:
            a, b = f"{one}.{decoder}", f"{other}.{decoder}"
            if a not in rounds[0] or b not in rounds[0]:
                continue
            for clock in ("cpu", "wall"):
                rates = [[each[name][clock] for each in rounds] for name in (a, b)]
                found[f"{one}_over_{other}_{decoder}_{clock}"] = ratio_of(*rates)
    return found


def medians(rounds: list[Round]) -> dict[str, float]:
    """Images a second of each contender."""
    return {
        f"{name.replace('.', '_')}_images_per_{clock}_second": statistics.median(
            each[name][clock] for each in rounds
        )
        for name in rounds[0]
        for clock in ("cpu", "wall")
    }


def environment_of_peers(folder: Path) -> str | None:
    """Their Python; None, which is said, when they cannot be installed."""
    try:
        return str(peers.make_environment(folder))
    except subprocess.CalledProcessError as error:
        print(f"litdata and streaming are left out: {error}", file=sys.stderr)
        return None


@contextlib.contextmanager
def s3_of(given: str | None, folder: Path) -> Generator[str | None]:
    """A prefix in S3; None, which is said, when there is no gateway to start."""
    if given is not None:
        yield given
        return
    with contextlib.ExitStack() as stack:
        try:
            found = stack.enter_context(own_gateway(folder))
        except UserError as error:
            print(f"S3 is left out: {error}", file=sys.stderr)
            found = None
        yield found


def run(folder: Path, told: argparse.Namespace) -> dict[str, object]:
    """Everything, in a folder for what it takes."""
    pixels = list(pictures(told.samples))
    files, packed = [png(each) for each in pixels], [encode_png(each) for each in pixels]
    write_tars((folder / "tars").as_uri(), files)
    write_tars((folder / "packed").as_uri(), packed)
    # A folder of its own: other benchmarks may keep their peers in the same place.
    peers_python = environment_of_peers((told.peers or folder / "peers") / "loader")
    with s3_of(told.s3, folder / "gateway") as s3:
        if s3 is not None:
            write_tars(f"{s3}/tars", files)
        with contenders(folder, s3 and f"{s3}/tars", peers_python) as crowd:
            rounds = measure(crowd, told.rounds)
        memory = {} if told.rates_only else loader_memory.measure(folder, s3)
    return {**ratios(rounds), **memory, **medians(rounds)}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_output_options(parser)
    parser.add_argument("--s3", help="a prefix to write the tars to and read them from")
    parser.add_argument("--peers", type=Path, help="folder of the peers' environment, made if need be")
    parser.add_argument("--samples", type=int, default=12_000)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--rates-only", action="store_true", help="leave out memory and the cold seek")
    told = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ddpm-bench-") as folder:
        numbers = run(Path(folder), told)
    publish({**numbers, **machine("numpy", "pillow", "webdataset")}, told)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
