"""How fast samples reach the trainer: `python -m benchmarks.loader [--json]`.

Five cases (`CASES` in loader_contender.py), in each of which all contenders read the same pictures with the same
decoder. The pictures are crops of scikit-learn's two photographs.
- pillow, own: 32x32, halved, written as PNG by Pillow; decoded by Pillow, and by this project;
- packed: the same as `ddpm pack` writes them, decoded by this project;
- jpeg, jpeg_own: 256x256, JPEG by Pillow; decoded by Pillow, and by this project.

Each contender has a process of its own and reads one epoch in each round, one after the other, in an order that turns;
ratios are taken within a round, medians over rounds. A process can be fast or slow from its start to its end, so all
are started more than once:
- bare: the decoder alone, on bytes in memory;
- ours: Loader over plain tars in its shuffled order, without holding decoded samples;
- webdataset, spdl and torchdata on the same tars; litdata and streaming (MosaicML's), each on its own format; from
  warm local files;
- with _s3 at the end: the same tars from S3, ours through an empty cache; with _s3_20ms: through a slow network, whose
  answers come so much later, and which carries 64 MB/s (slow_network.py); there the others decode by Pillow, as their
  users do, and ours by this project.
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
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from benchmarks import loader_memory, peers
from benchmarks.common import Ratio, add_output_options, machine, publish, ratio_of
from benchmarks.loader_contender import CASES
from benchmarks.s3_gateway import own_gateway
from benchmarks.slow_network import slow_network
from ddpm_pipeline.data.formats.png import encode_png
from ddpm_pipeline.data.formats.shards import write_shard
from ddpm_pipeline.data.packing.build_index import build_index
from ddpm_pipeline.errors import UserError
from ddpm_pipeline.store import open_store

REPOSITORY = Path(__file__).resolve().parents[1]
NUM_SHARDS = 8
PEERS = ("litdata", "streaming", "spdl", "torchdata")
"""Those that have an environment of their own."""
JPEG_QUALITY = 90
OWN = {"pillow": "own", "jpeg": "jpeg_own"}
"""The same files, decoded by Pillow and by this project."""
LATENCIES_MS = (0, 20, 100)
Round = dict[str, dict[str, float]]
"""Of each contender: images a second of CPU time (`cpu`) and of wall time (`wall`)."""


class Place(NamedTuple):
    """Where tars are read from."""

    suffix: str
    """Of the names of contenders that read there."""
    s3: str | None = None
    """A prefix in S3; None: local files."""
    endpoint: str | None = None
    """Where S3 is, if not where the AWS variables say."""


class Contender:
    """A process that reads an epoch whenever it is asked to."""

    def __init__(self, python: str, folder: Path, case: str, name: str, place: Place) -> None:
        self.name = f"{name}{place.suffix}.{case}"
        command = [python, "-m", "benchmarks.loader_contender", str(folder), case, name]
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
        if place.s3:
            command.append(place.s3)
        if place.endpoint:
            environment["AWS_ENDPOINT_URL"] = place.endpoint
        self._log = (folder / f"{self.name}.log").open("w+b")
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=environment,
        )
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


def pictures(count: int, edge: int, scale: int) -> Iterator[np.ndarray]:
    """Crops of real photographs, made `scale` times smaller with anti-aliasing, uint8 (edge, edge, 3)."""
    from sklearn.datasets import load_sample_images

    photos, source = load_sample_images().images, np.random.default_rng(0)
    for _ in range(count):
        photo = photos[source.integers(len(photos))]
        top, left = (int(source.integers(size - scale * edge)) for size in photo.shape[:2])
        crop = photo[top : top + scale * edge, left : left + scale * edge]
        resized = Image.fromarray(crop).resize((edge, edge), Image.Resampling.LANCZOS)
        yield np.asarray(resized)


def by_pillow(pixels: np.ndarray, image_format: str, **options: int) -> bytes:
    """A file as most tools write it."""
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, image_format, **options)
    return out.getvalue()


def write_tars(uri: str, extension: str, files: list[bytes]) -> None:
    """Plain tars of these pictures, indexed."""
    store, each = open_store(uri), len(files) // NUM_SHARDS
    for number in range(NUM_SHARDS):
        rows = range(number * each, (number + 1) * each)
        samples = ((f"{row:08d}", {extension: files[row], "cls": b"%d" % (row % 10)}) for row in rows)
        store.write(f"{number:05d}.tar", write_shard(samples))
    build_index(uri)


def line_up(with_peers: bool, remote: Sequence[Place]) -> Iterator[tuple[str, str, Place]]:
    """Case, name and place of every contender.

    Those that are compared stand close together: the pace of a shared machine changes within a round.
    """
    for case in CASES:
        others = ("webdataset", *(PEERS if with_peers else ())) if case != "packed" else ()
        for name in ("ours", "bare", *others):
            yield case, name, Place("")
    remote_peers = ("webdataset", *(("spdl",) if with_peers else ()))
    for case, place in itertools.product(OWN, remote):
        if place.endpoint:  # a slow network: only as users have them
            yield OWN[case], "ours", place
            yield from ((case, name, place) for name in remote_peers)
        else:
            yield from ((each, name, place) for each in (case, OWN[case]) for name in ("ours", *remote_peers))


@contextlib.contextmanager
def contenders(folder: Path, remote: Sequence[Place], peers_python: str | None) -> Generator[list[Contender]]:
    """All of them, ready, and ended afterwards."""
    started: list[Contender] = []
    try:
        for case, name, place in line_up(peers_python is not None, remote):
            python = peers_python if peers_python and name in PEERS else sys.executable
            started.append(Contender(python, folder, case, name, place))
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
    """Ours over each other contender of the same case and place, paired round by round; and as users run them: ours
    with this project's decoder over the others with Pillow's."""
    found: dict[str, Ratio] = {}
    for theirs in rounds[0]:
        (other, _, place), case = theirs.partition(".")[0].partition("_"), theirs.partition(".")[2]
        ours = f"ours_{place}" if place else "ours"
        if other == "ours":
            continue
        compared = {f"{ours}_over_{theirs.replace('.', '_')}": f"{ours}.{case}"}
        if case in OWN and other != "bare":
            compared[f"{ours}_{OWN[case]}_over_{theirs.replace('.', '_')}"] = f"{ours}.{OWN[case]}"
        for (name, own), clock in itertools.product(compared.items(), ("cpu", "wall")):
            if own not in rounds[0]:
                continue
            rates = [[each[side][clock] for each in rounds] for side in (own, theirs)]
            found[f"{name}_{clock}"] = ratio_of(*rates)
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
        print(f"{', '.join(PEERS)} are left out: {error}", file=sys.stderr)
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


def write_pictures(roots: Sequence[str], told: argparse.Namespace) -> None:
    """The tars of all cases, below each root."""
    small = list(pictures(told.samples, CASES["own"].edge, 2))
    large = pictures(told.photographs, CASES["jpeg"].edge, 1)
    files = {
        "own": [by_pillow(each, "PNG") for each in small],
        "packed": [encode_png(each) for each in small],
        "jpeg": [by_pillow(each, "JPEG", quality=JPEG_QUALITY) for each in large],
    }
    for root, (case, written) in itertools.product(roots, files.items()):
        write_tars(f"{root}/{CASES[case].tars}", CASES[case].extension, written)


def run(folder: Path, told: argparse.Namespace) -> dict[str, object]:
    """Everything, in a folder for what it takes."""
    # A folder of its own: other benchmarks may keep their peers in the same place.
    peers_python = environment_of_peers((told.peers or folder / "peers") / "loader")
    with contextlib.ExitStack() as stack:
        s3 = stack.enter_context(s3_of(told.s3, folder / "gateway"))
        write_pictures([folder.as_uri(), *([s3] if s3 else [])], told)
        remote = [Place("_s3", s3)] if s3 else []
        endpoint = os.environ.get("AWS_ENDPOINT_URL")
        if s3 and endpoint and not told.s3:
            for latency in LATENCIES_MS:
                slow = stack.enter_context(slow_network(endpoint, latency))
                remote.append(Place(f"_s3_{latency}ms", s3, slow))
        rounds: list[Round] = []
        for _ in range(told.starts):
            with contenders(folder, remote, peers_python) as crowd:
                rounds += measure(crowd, told.rounds)
        memory = {} if told.rates_only else loader_memory.measure(folder, s3)
    return {**ratios(rounds), **memory, **medians(rounds)}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_output_options(parser)
    parser.add_argument("--s3", help="a prefix to write the tars to and read them from")
    parser.add_argument("--peers", type=Path, help="folder of the peers' environment, made if need be")
    parser.add_argument("--samples", type=int, default=6000, help="pictures of 32x32")
    parser.add_argument("--photographs", type=int, default=1024, help="pictures of 256x256")
    parser.add_argument("--starts", type=int, default=2, help="how often all processes are started anew")
    parser.add_argument("--rounds", type=int, default=4, help="after each start")
    parser.add_argument("--rates-only", action="store_true", help="leave out memory and the cold seek")
    told = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ddpm-bench-") as folder:
        numbers = run(Path(folder), told)
    publish({**numbers, **machine("numpy", "pillow", "webdataset")}, told)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
