"""A generation of a million shards, as far as its lists go:
`python -m benchmarks.listings [--shards N] [--folder FOLDER] [--out FILE]`.

A server of its own process on loopback answers S3's ListObjectsV2 and GetObject for a prefix that holds N shards with
their done-records, but for a few that are missing; the pages are full ones of 1,000 keys, with all that S3 says of an
object. With --folder, the prefix is a folder that is made in FOLDER and removed at the end, of two empty files for each
shard. Each task runs in a fresh process:

- resume: what a job does before it hands out work: look at the prefix, list the records, tell what is missing
- status: `ddpm status`
- verify: the lists of `ddpm verify`: records, objects, and strangers anywhere at the prefix
- manifest: write the manifest of N shards to a local folder, read its head, read every entry back

Told of each: seconds of the wall clock and of the processor, and the most memory the process ever held, less what it
held before it began. The server's own time is part of the wall clock, and so is a cold disk's.
"""

import argparse
import multiprocessing
import os
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import filterfalse
from multiprocessing.connection import Connection
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from benchmarks.common import add_output_options, machine, publish
from ddpm_pipeline.config.diffusion import SamplerConfig
from ddpm_pipeline.data.formats.image_stats import ImageStats
from ddpm_pipeline.generate.done_records import DoneRecord, RecordAggregate, Times
from ddpm_pipeline.generate.generation_status import generation_status
from ddpm_pipeline.generate.layout import SPEC_KEY
from ddpm_pipeline.generate.manifest import (
    make_entries,
    make_manifest,
    read_entries,
    read_manifest,
    write_manifest,
)
from ddpm_pipeline.generate.plan import num_shards, shard
from ddpm_pipeline.generate.prefix_spec import check_prefix
from ddpm_pipeline.generate.spec import ModelIdentity, Spec, pretty
from ddpm_pipeline.generate.stored_generation import Generation
from ddpm_pipeline.generate.verification import VerifyReport, check_listing
from ddpm_pipeline.store import open_store

Facts = dict[str, float]
BUCKET_URI = "s3://bucket/vast"
SHARD_SIZE = 1000
GAP, FIRST_GAP = 100_000, 7  # every so many shards one is missing
PAGE = 1000
RECORD_GAP = 1000
"""So many shards lie between those whose records are written in full, where a folder is measured."""
_ENTRY = (
    "<Contents><Key>{key}</Key><LastModified>2026-03-01T02:00:00.000Z</LastModified>"
    "<ETag>&quot;9b2cf535f27731c974343645a3985328&quot;</ETag><Size>{size}</Size>"
    "<StorageClass>STANDARD</StorageClass></Contents>"
)


def vast_spec(shards: int) -> Spec:
    """The spec of a generation of so many shards."""
    return Spec(
        model=ModelIdentity(name="vast", version=1, sha256="0" * 64, weights="ema", process="0" * 64),
        channels=3,
        size=32,
        sampler=SamplerConfig(),
        classes=None,
        seed=0,
        first_index=0,
        count=shards * SHARD_SIZE,
        image_format="png",
        shard_size=SHARD_SIZE,
        batch_size=100,
        dtype="float32",
        device="cpu",
        cpu_threads=1,
        compile=False,
    )


def vast_record(spec: Spec, number: int) -> DoneRecord:
    """The done-record of a shard."""
    unit = shard(spec, number)
    pixels = unit.count * spec.size**2
    return DoneRecord(
        spec_digest=spec.digest,
        key=unit.key,
        first_index=unit.first,
        count=unit.count,
        bytes=3_000_000 + number,
        sha256=f"{number:064x}",
        tally=ImageStats(images=unit.count, values=pixels, sums=(pixels,) * 3, squares=(2 * pixels,) * 3),
        classes=None,
        times=Times(
            finished_at=1.8e9 + number,
            seconds=60.0,
            upload_seconds=1.0,
            attempt=1,
            worker="host:1",
            micro_batch=100,
            software="none",
        ),
    )


def is_missing(number: int) -> bool:
    """Whether the simulated prefix lacks a shard."""
    return number % GAP == FIRST_GAP


class Handler(BaseHTTPRequestHandler):
    """S3 as far as listing and reading go."""

    protocol_version = "HTTP/1.1"
    shards: int
    spec: Spec

    def do_GET(self) -> None:
        """A page of keys, or an object."""
        parts = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        key = parts.path.removeprefix("/bucket").lstrip("/")
        if "list-type" in query:
            return self._answer(200, self._page(query))
        if key == f"vast/{SPEC_KEY}":
            return self._answer(206, pretty(self.spec.model_dump(mode="json")))
        if key.startswith("vast/done/"):
            record = vast_record(self.spec, int(key[len("vast/done/") :].removesuffix(".json")))
            return self._answer(206, record.model_dump_json().encode())
        return self._answer(404, b"<Error><Code>NoSuchKey</Code></Error>")

    def _page(self, query: dict[str, str]) -> bytes:
        prefix = query.get("prefix", "")
        after = query.get("continuation-token") or query.get("start-after", "")
        limit = int(query.get("max-keys", PAGE))
        found: list[str] = []
        last = ""
        for key, size in keys(self.shards, prefix, after):
            if len(found) == limit:
                token = (
                    f"<IsTruncated>true</IsTruncated><NextContinuationToken>{last}</NextContinuationToken>"
                )
                break
            found.append(_ENTRY.format(key=key, size=size))
            last = key
        else:
            token = "<IsTruncated>false</IsTruncated>"
        return f"<ListBucketResult>{token}{''.join(found)}</ListBucketResult>".encode()

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("ETag", '"tag"')
        self.send_header("Content-Length", str(len(body)))
        if status == 206:
            self.send_header("Content-Range", f"bytes 0-{len(body) - 1}/{len(body)}")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


def keys(shards: int, prefix: str, after: str) -> Iterator[tuple[str, int]]:
    """Keys with sizes, in order, that begin with `prefix` and sort after `after`."""
    for folder, suffix, size in (("vast/done/", ".json", 900), ("vast/shards/", ".tar", 3_000_000)):
        if folder == "vast/shards/" and f"vast/{SPEC_KEY}".startswith(prefix) and after < f"vast/{SPEC_KEY}":
            spec_key: list[tuple[str, int]] = [(f"vast/{SPEC_KEY}", 900)]
        else:
            spec_key = []
        if not (folder.startswith(prefix) or prefix.startswith(folder)) or after > f"{folder}~":
            yield from spec_key
            continue
        first = int(after[len(folder) :].split(".")[0]) + 1 if after.startswith(folder) else 0
        for number in range(first, shards):
            key = f"{folder}{number:06d}{suffix}"
            if not is_missing(number) and key.startswith(prefix) and key > after:
                yield key, size + (number if folder == "vast/shards/" else 0)
        yield from spec_key


@contextmanager
def serving(shards: int) -> Iterator[str]:
    """The server's address, while it runs."""
    ours, theirs = multiprocessing.Pipe()
    server = multiprocessing.get_context("spawn").Process(target=_serve, args=(shards, theirs), daemon=True)
    server.start()
    try:
        yield ours.recv()
    finally:
        server.terminate()
        server.join()


def make_server(shards: int) -> ThreadingHTTPServer:
    """The server, not serving yet."""
    handler = type("Vast", (Handler,), {"shards": shards, "spec": vast_spec(shards)})
    return ThreadingHTTPServer(("127.0.0.1", 0), handler)


def _serve(shards: int, ready: Connection) -> None:
    server = make_server(shards)
    ready.send(f"http://127.0.0.1:{server.server_address[1]}")
    server.serve_forever()


def fill(root: Path, shards: int) -> str:
    """The same prefix in a folder; its URI."""
    spec = vast_spec(shards)
    for folder in ("done", "shards"):
        (root / folder).mkdir(parents=True)
    (root / SPEC_KEY).write_bytes(pretty(spec.model_dump(mode="json")))
    for number in filterfalse(is_missing, range(shards)):
        # Empty files: names are what lists are made of, and few records are read.
        for name in (f"done/{number:06d}.json", f"shards/{number:06d}.tar"):
            os.close(os.open(f"{root}/{name}", os.O_CREAT | os.O_WRONLY))
        if number % RECORD_GAP == 0:
            (root / shard(spec, number).done_key).write_text(vast_record(spec, number).model_dump_json())
    return root.as_uri()


def resume(spec: Spec, uri: str) -> None:
    """What a job does before it hands out work."""
    store = open_store(uri)
    store.require_container()
    generation = Generation(store, spec)
    assert check_prefix(generation) == generation
    assert generation.listing(objects=False).missing() == [
        n for n in range(num_shards(spec)) if is_missing(n)
    ]


def status(spec: Spec, uri: str) -> None:
    """`ddpm status`."""
    found = generation_status(uri)
    assert found.shards_done == sum(not is_missing(n) for n in range(num_shards(spec)))


def verify(spec: Spec, uri: str) -> None:
    """The lists of `ddpm verify`."""
    generation = Generation(open_store(uri), spec)
    report = VerifyReport(uri, spec)
    found = generation.listing()
    check_listing(generation, found, report)
    assert report.num_problems == 0, report.problems
    assert len(found.missing()) == sum(is_missing(n) for n in range(num_shards(spec)))


def manifest(spec: Spec, _: str) -> None:
    """Write a manifest, read its head, read all of it. In a scratch folder, whichever store is measured."""
    aggregate = RecordAggregate()
    record = vast_record(spec, 0)
    for number in range(num_shards(spec)):
        aggregate.add(number, record.model_copy(update={"sha256": f"{number:064x}"}))
    with tempfile.TemporaryDirectory(prefix="ddpm-listings-") as folder:
        store = open_store(folder)
        write_manifest(store, make_manifest(spec, aggregate, None), make_entries(spec, aggregate))
        head = read_manifest(store)
        assert head is not None
        assert head.num_shards == sum(1 for _ in read_entries(store)) == num_shards(spec)


TASKS: dict[str, Callable[[Spec, str], None]] = {
    "resume": resume,
    "status": status,
    "verify": verify,
    "manifest": manifest,
}


def measure(shards: int, folder: Path | None = None) -> dict[str, Facts]:
    """Every task's facts, of a bucket, or of a folder that is made in `folder`."""
    if folder is None:
        with serving(shards) as address:
            return {name: _alone(name, shards, BUCKET_URI, address) for name in TASKS}
    with tempfile.TemporaryDirectory(prefix="ddpm-listings-", dir=folder) as scratch:
        uri = fill(Path(scratch), shards)
        return {name: _alone(name, shards, uri, "http://127.0.0.1:9") for name in TASKS}


def _alone(name: str, shards: int, uri: str, address: str) -> Facts:
    ours, theirs = multiprocessing.Pipe()
    arguments = (name, shards, uri, address, theirs)
    child = multiprocessing.get_context("spawn").Process(target=_run, args=arguments)
    child.start()
    theirs.close()
    try:
        return ours.recv()
    except EOFError:
        raise RuntimeError(f"{name}: ended without a result; see above") from None
    finally:
        child.join()


def _run(name: str, shards: int, uri: str, address: str, result: Connection) -> None:
    os.environ |= {
        "AWS_ENDPOINT_URL": address,
        "AWS_ACCESS_KEY_ID": "none",
        "AWS_SECRET_ACCESS_KEY": "none",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    spec = vast_spec(shards)
    before, wall, processor = _peak_mib(), time.monotonic(), time.process_time()
    TASKS[name](spec, uri)
    facts = {
        "wall_seconds": round(time.monotonic() - wall, 2),
        "processor_seconds": round(time.process_time() - processor, 2),
        "more_mib": round(_peak_mib() - before, 1),
        "peak_mib": round(_peak_mib(), 1),
    }
    result.send(facts)


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Run everything and publish the numbers."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.listings", description=__doc__)
    parser.add_argument("--shards", type=int, default=1_000_000)
    parser.add_argument(
        "--folder", type=Path, help="Measure file:// in a folder made there, instead of s3://."
    )
    add_output_options(parser)
    told = parser.parse_args()
    numbers: dict[str, object] = {"shards": told.shards, **machine("boto3")}
    for task, facts in measure(told.shards, told.folder).items():
        numbers |= {f"{task}_{name}": value for name, value in facts.items()}
    publish(numbers, told)


if __name__ == "__main__":
    main()
