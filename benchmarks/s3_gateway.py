"""An S3 server for a benchmark: the local stack's gateway, alone, on loopback, ended with the block."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Generator
from pathlib import Path

from ddpm_pipeline.infra.local import ports, processes, service
from ddpm_pipeline.infra.local.credentials import s3_keys
from ddpm_pipeline.infra.local.s3_gateway import PORTS, REGION, s3_service


@contextlib.contextmanager
def own_gateway(folder: Path) -> Generator[str]:
    """A prefix in a fresh bucket; the AWS variables point there. Raises UserError when it cannot be started."""
    (folder / "logs").mkdir(parents=True)
    keys = s3_keys(folder)
    gateway = s3_service(folder, ports.choose(PORTS), keys)
    variables = {
        "AWS_ENDPOINT_URL": gateway.url,
        "AWS_ACCESS_KEY_ID": keys.access_key,
        "AWS_SECRET_ACCESS_KEY": keys.secret_key,
        "AWS_DEFAULT_REGION": REGION,
    }
    record = service.start(gateway, os.environ)
    before = {name: os.environ.get(name) for name in variables}
    try:
        service.wait_until_ready(gateway, record.identity)
        os.environ.update(variables)
        yield "s3://ddpm/benchmark"
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)
        processes.end(record.identity)
