"""A driver whose cluster dies and is replaced by a new one at the same address."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ddpm_pipeline.infra.local import LocalStack, environment
from ddpm_pipeline.infra.local.processes import kill
from ddpm_pipeline.infra.local.stack_state import read_state
from ddpm_pipeline.jobs.ray_session import CLUSTER_REPLACED
from tests.driving import ROOT, ended_after

pytestmark = [pytest.mark.stack, pytest.mark.long, pytest.mark.timeout(400)]

DRIVER = """
import sys, time
from ddpm_pipeline.jobs.ray_session import ray_cluster
from ddpm_pipeline.jobs.runner import handle_errors

def work():
    with ray_cluster():
        print("joined", flush=True)
        time.sleep(300)
    return 0

sys.exit(handle_errors(work))
"""


@pytest.fixture
def cluster(stack: LocalStack, tmp_path: Path, bare_environ: dict[str, str]) -> Iterator[LocalStack]:
    """A Ray cluster beside the session's S3 and MLflow, to be lost."""
    outside = {name: value for name, value in os.environ.items() if name.startswith(("AWS_", "MLFLOW_"))}
    local = LocalStack(tmp_path / "cluster", "s3", 1, environ=bare_environ | outside)
    with ended_after(local):
        local.up()
        yield local


def test_a_cluster_that_is_replaced_is_told_in_one_line(
    cluster: LocalStack, bare_environ: dict[str, str]
) -> None:
    settings = bare_environ | dict(environment(cluster.root))
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER],
        cwd=ROOT,
        env=settings,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        assert driver.stdout is not None
        said = b""
        while b"joined" not in said:
            line = driver.stdout.readline()
            assert line, said
            said += line
        state = read_state(cluster.root)
        assert state is not None
        kill(state.services["ray"].identity)
        cluster.up()
        told = driver.communicate(timeout=200)[0].decode()
    finally:
        if driver.poll() is None:
            driver.send_signal(signal.SIGKILL)
    assert driver.returncode == 1, told
    assert f"failed: {CLUSTER_REPLACED}" in told.splitlines()
    assert "StackTrace" not in told
