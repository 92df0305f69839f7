"""What a generation asks of its store, counted on small ones and projected: `python -m benchmarks.scale [--out FILE]`.

Two generations of tiny images, of --shards, are made, finished and verified against a real S3 server
of this process (moto). Each request is counted as S3 prices it. What the larger one needed more, for each shard more,
is the slope; a million shards are --projected times the slope.

- make: a worker writes a shard and its done-record
- finish: the driver lists records and objects once nothing is missing, and writes the manifest
- verify: `ddpm verify`, which reads everything

Lists are of 1,000 keys, so few shards need no more of them than fewer do: `benchmarks.listings` has what comes of them.

Prices are those of S3 Standard in us-east-1, as published in 2026: dollars for 1,000 requests.
"""

import logging
import os
import tempfile
from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import boto3
from botocore.httpsession import URLLib3Session
from moto.server import ThreadedMotoServer

from benchmarks.common import add_output_options, machine, plain_parser, publish
from benchmarks.generate import open_writer
from ddpm_pipeline.config.diffusion import ObjectiveConfig, SamplerConfig, ScheduleConfig
from ddpm_pipeline.config.generation import GenerateConfig, GuardConfig
from ddpm_pipeline.config.model_card import ImageShape, ModelCard
from ddpm_pipeline.config.net import UNetConfig
from ddpm_pipeline.generate.done_records import RecordAggregate
from ddpm_pipeline.generate.finalize import ModelFacts, publish_manifest
from ddpm_pipeline.generate.verification import verify
from ddpm_pipeline.nets.build import seeded_init
from ddpm_pipeline.nets.model_files import save_model

BUCKET = "scale"
IMAGES_PER_SHARD = 2
DOLLARS = {"PUT": 0.005, "LIST": 0.005, "GET": 0.0004, "HEAD": 0.0004, "DELETE": 0.0}
"""For 1,000 requests."""
PHASES = ("make", "finish", "verify")


class RequestCounter:
    """Counts the requests of this process to S3, by phase and kind."""

    def __init__(self) -> None:
        self.counts: dict[str, Counter[str]] = {}
        self._phase: Counter[str] = Counter()

    @contextmanager
    def phase(self, name: str) -> Generator[None]:
        """What is counted until the end belongs to this phase."""
        self._phase = self.counts[name] = Counter()
        yield

    @contextmanager
    def counting(self) -> Generator[None]:
        """Count while the context lasts."""
        send = URLLib3Session.send

        def counted(session: URLLib3Session, request: Any) -> Any:
            self._phase["LIST" if "list-type=2" in request.url else request.method] += 1
            return send(session, request)

        with mock.patch.object(URLLib3Session, "send", counted):
            yield


def main() -> None:
    """Count, project and publish."""
    parser = plain_parser("scale", __doc__)
    parser.add_argument("--shards", nargs=2, type=int, default=(100, 200), metavar=("FEW", "MORE"))
    parser.add_argument("--projected", type=int, default=1_000_000)
    add_output_options(parser)
    told = parser.parse_args()
    few, more = told.shards
    with tempfile.TemporaryDirectory(prefix="ddpm-scale-") as folder, s3_server():
        model = tiny_model(Path(folder))
        counts = [requests_of(model, number) for number in (few, more)]
    found: dict[str, object] = {
        "shards": [few, more],
        "projected": told.projected,
        **machine("boto3", "moto"),
    }
    for phase in PHASES:
        slopes = {kind: (counts[1][phase][kind] - counts[0][phase][kind]) / (more - few) for kind in DOLLARS}
        for kind, slope in slopes.items():
            if slope:
                found[f"{phase}_{kind.lower()}_per_shard"] = slope
        dollars = sum(slope * DOLLARS[kind] / 1000 for kind, slope in slopes.items())
        found[f"{phase}_dollars_projected"] = dollars * told.projected
    publish(found, told)


def requests_of(model: Path, num_shards: int) -> dict[str, Counter[str]]:
    """Requests by phase and kind, of a generation of so many shards."""
    config = settings(model, f"s3://{BUCKET}/{num_shards}", num_shards)
    writer, records = open_writer(config), RecordAggregate()
    generation, counter = writer.generation, RequestCounter()
    with counter.counting():
        with counter.phase("make"):
            for unit in generation.shards():
                written = writer.write(unit)
                records.add(unit.number, written.record)
        with counter.phase("finish"):
            assert not generation.listing().missing()
            publish_manifest(generation, records, ModelFacts(None))
        with counter.phase("verify"):
            assert verify(config.output).shards_checked == num_shards
    return counter.counts


def settings(model: Path, output: str, num_shards: int) -> GenerateConfig:
    """Of a generation of tiny images."""
    return GenerateConfig(
        model=str(model),
        output=output,
        count=num_shards * IMAGES_PER_SHARD,
        shard_size=IMAGES_PER_SHARD,
        batch_size=IMAGES_PER_SHARD,
        sampler=SamplerConfig(kind="ddim", num_steps=1),
        guards=GuardConfig(enabled=False),
        track=None,
    )


def tiny_model(folder: Path) -> Path:
    """A network of one step, in a model folder."""
    net = UNetConfig(
        image_size=4,
        base_channels=8,
        multipliers=(1,),
        num_res_blocks=1,
        attention_resolutions=(),
        mid_attention=False,
        norm_groups=4,
    )
    card = ModelCard(
        net=net,
        schedule=ScheduleConfig(num_steps=2),
        objective=ObjectiveConfig(),
        image=ImageShape(channels=3, size=4),
    )
    save_model(folder / "model", seeded_init(net, 0).state_dict(), card)
    return folder / "model"


@contextmanager
def s3_server() -> Generator[None]:
    """An S3 in memory with a bucket; the environment points at it."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # it prints each request
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    variables = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "none",
        "AWS_SECRET_ACCESS_KEY": "none",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    try:
        with mock.patch.dict(os.environ, variables):
            boto3.client("s3").create_bucket(Bucket=BUCKET)  # pyright: ignore[reportUnknownMemberType]
            yield
    finally:
        server.stop()


if __name__ == "__main__":
    main()
