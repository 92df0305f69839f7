"""The tutorial is carried out as it is written, with canary secrets about; then the traces it left are looked at.

The canaries: the stack's own S3 key, Ray token and MLflow password, which every process here works with, and values
under names that say they are secret. None may be found in what any test of this session has left behind,
wherever that is.
"""

import io
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import chdir, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import pytest

from ddpm_pipeline.infra.local import LocalStack
from ddpm_pipeline.infra.local.ray import temp_dir
from ddpm_pipeline.infra.local.service import get
from ddpm_pipeline.infra.local.stack_state import read_state
from ddpm_pipeline.jobs.ray_session import ray_cluster
from ddpm_pipeline.jobs.runner import use_running_stack
from ddpm_pipeline.telemetry.prometheus import METRICS
from ddpm_pipeline.tracking.spool import SPOOL_VARIABLE
from ddpm_pipeline.train import dry_run
from tests.commands import ddpm
from tests.docs.lines import REPOSITORY, Shown, shown
from tests.traces import left_behind, own_secrets, secrets_in

pytestmark = [pytest.mark.stack, pytest.mark.long, pytest.mark.timeout(600)]
CANARIES = {
    "MLFLOW_TRACKING_USERNAME": "canary-user",
    "MLFLOW_TRACKING_PASSWORD": "canary-4f1d7c-password",
    "HF_TOKEN": "canary-9b2e6a-token",
    "PIPELINE_API_KEY": "canary-77aa01-key",
}
MUST_BE_METERED = {
    "train": {"ddpm_images_per_second", "ddpm_step", "ddpm_step_seconds", "ddpm_data_wait_share"},
    "generate": {"ddpm_images_per_second", "ddpm_images_done", "ddpm_shards_done"},
}


@dataclass
class Told:
    """What carrying out the tutorial brought to light."""

    outputs: dict[str, str] = field(default_factory=dict[str, str])
    """What each command printed, by its words."""
    folder: Path = Path()
    """Where the commands were typed."""
    spool: Path = Path()
    metered: set[tuple[str, str]] = field(default_factory=set[tuple[str, str]])
    """(work, metric) of ours that the head's Prometheus port served meanwhile, by the names of `METRICS`."""


@pytest.fixture(scope="session")
def told(stack: LocalStack, tmp_path_factory: pytest.TempPathFactory) -> Told:
    """The tutorial's commands, one after the other, each of which must succeed."""
    folder, spool = tmp_path_factory.mktemp("tutorial"), tmp_path_factory.mktemp("spool")
    (folder / ".local").symlink_to(stack.root)
    told = Told(folder=folder, spool=spool)
    over = threading.Event()
    scraper = threading.Thread(target=scrape, args=(stack, told.metered, over))
    scraper.start()
    try:
        with mock.patch.dict(os.environ, {**CANARIES, SPOOL_VARIABLE: str(spool)}), chdir(folder):
            carry_out_all(told)
    finally:
        over.set()
        scraper.join()
    return told


def carry_out_all(told: Told) -> None:
    """In this process, with one connection to Ray; one command runs as the program, and logs as JSON."""
    with ray_cluster(), mock.patch.object(dry_run, "BUDGET_SECONDS", 1.0):
        for command in shown(REPOSITORY / "docs" / "tutorial.md", "ddpm"):
            if command.words[0] in ("down", "clean"):
                continue
            as_program = "count=150" in command.words
            run = run_program if as_program else run_here
            code, output = run(command)
            assert code == 0, f"{command}\n{output}"
            told.outputs[" ".join(command.words)] = output


def run_here(command: Shown) -> tuple[int, str]:
    """Exit code and both outputs of a command in this process."""
    with io.TextIOWrapper(io.BytesIO(), encoding="utf-8") as output:
        with redirect_stdout(output), redirect_stderr(output):
            use_running_stack()
            code = ddpm(*command.words)
        output.seek(0)
        return code, output.read()


def run_program(command: Shown) -> tuple[int, str]:
    """Exit code and both outputs of `ddpm`, as installed, with logs as JSON."""
    result = subprocess.run(
        [Path(sys.executable).with_name("ddpm"), *command.words],
        env={**os.environ, "DDPM_LOG": "json", "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    return result.returncode, result.stdout + result.stderr


def test_the_tutorial_does_what_it_says(told: Told) -> None:
    outputs = list(told.outputs.values())
    assert len(outputs) >= 10
    said = "\n".join(outputs)
    for promise in ("ray runs at", "tutorial@champion", "complete: 100 images", "complete: 150 images"):
        assert promise in said, said
    assert "tutorial" in told.outputs["train digits name=tutorial steps=300 --dry-run"]
    assert (told.folder / "digits.png").exists()
    assert (told.folder / "look" / "grid.png").exists()
    next_steps = {words: re.findall(r"^next +(.+)$", output, re.M) for words, output in told.outputs.items()}
    assert len([words for words, steps in next_steps.items() if steps]) >= 3, next_steps


def test_a_repeated_training_says_that_nothing_is_left(told: Told) -> None:
    assert "already trained" in told.outputs["train digits name=tutorial steps=300"]


def scrape(stack: LocalStack, seen: set[tuple[str, str]], over: threading.Event) -> None:
    """Ask as Prometheus would, every two seconds until `over`, and once more some seconds after."""
    state = read_state(stack.root)
    assert state is not None
    url = f"http://127.0.0.1:{state.ports['ray-metrics']}/metrics"
    last = False
    while not last:
        last = over.wait(2)
        if last:
            time.sleep(5)
        text = (get(url) or b"").decode()
        found = re.findall(r'^ray_(ddpm_\w+)\{.*work="(\w+)"', text, re.M)
        seen |= {(work, name.removesuffix("_total")) for name, work in found}


def test_the_heads_prometheus_port_serves_the_pipelines_own_metrics(told: Told) -> None:
    wanted = {(work, name) for work, names in MUST_BE_METERED.items() for name in names}
    assert {name for _, name in wanted} <= set(METRICS)
    assert wanted - told.metered == set()


def json_lines(text: str) -> Iterator[dict[str, object]]:
    for line in text.splitlines():
        if line.startswith("{"):
            yield json.loads(line)


def test_logs_as_json_say_which_run_and_shard_in_driver_and_workers(told: Told, stack: LocalStack) -> None:
    (output,) = [text for words, text in told.outputs.items() if "count=150" in words]
    assert any(line.get("what") == "generate" and line.get("done") == 150 for line in json_lines(output))
    logs = (temp_dir(stack.root) / "session_latest" / "logs").glob("worker-*.err")
    lines = [line for file in logs for line in json_lines(file.read_text(errors="replace"))]
    shards = [line for line in lines if str(line.get("run", "")).startswith("tutorial-") and "shard" in line]
    assert {line["shard"] for line in shards} >= {4, 5}
    assert all(line["level"] == "info" and str(line["time"]).endswith("Z") for line in shards)


@pytest.mark.last
def test_no_secret_is_in_any_log_run_record_or_object(told: Told, stack: LocalStack) -> None:
    secrets = {**CANARIES, **own_secrets(stack)}
    del secrets["MLFLOW_TRACKING_USERNAME"]  # a name, not a secret
    places = [stack.root, temp_dir(stack.root), told.folder, told.spool]
    files = [file for place in places for file in left_behind(place, stack.root / "secrets")]
    looked_at = {file.suffix for file in files}
    assert {".log", ".err", ".db"} <= looked_at  # servers', workers', MLflow's runs
    found = [f"{name} in {file}" for file in files for name in secrets_in(file, secrets)]
    found += [
        f"{name} printed by {words}"
        for words, text in told.outputs.items()
        for name in secrets
        if secrets[name] in text
    ]
    assert found == []


def test_the_search_for_secrets_would_find_one(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a.log").write_bytes(b"\0" * 5000 + b"key canary-77aa01-key\n")
    (file,) = left_behind(tmp_path, tmp_path / "secrets")
    assert secrets_in(file, CANARIES) == ["PIPELINE_API_KEY"]
