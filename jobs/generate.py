"""The generation job: fill an output prefix with samples of a registered model, exactly once.

    ddpm generate digits count=10000

Started again with the same settings, it generates only what is missing.
"""

from __future__ import annotations

import threading
from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ddpm_pipeline.config.generation import GenerateConfig, SampleConfig
from ddpm_pipeline.jobs.ray_session import on_stop_signal, ray_cluster
from ddpm_pipeline.jobs.runner import DONE, FAILED, STOPPED
from ddpm_pipeline.progress import Progress
from ddpm_pipeline.telemetry.terminal import echo, echo_json

if TYPE_CHECKING:
    from ddpm_pipeline.generate.dry_run import GenerationEstimate
    from ddpm_pipeline.generate.generation_job import GenerationResult

_EXIT_CODES: dict[str, int] = {
    "complete": DONE,
    "already complete": DONE,
    "superseded": DONE,
    "drained": STOPPED,
}


def run(config: GenerateConfig, progress: Progress, as_json: bool = False) -> int:
    """Generate and print how it ended."""
    result = generate(config, progress)
    if as_json:
        echo_json(as_document(result))
        return _EXIT_CODES.get(result.status, FAILED)
    echo(*summary(result))
    for key, error in list(result.failed.items())[:20]:
        echo(f"failed   {key}: {error}", error=True)
    return _EXIT_CODES.get(result.status, FAILED)


def estimate(config: GenerateConfig) -> GenerationEstimate:
    """What a generation will cost, for `--dry-run`."""
    from ddpm_pipeline.generate.dry_run import estimate as estimate_generation

    return estimate_generation(config)


def sample(config: SampleConfig, progress: Progress) -> int:
    """Draw a few images in this process, without a cluster, and print where they are."""
    from ddpm_pipeline.generate.preview import draw

    result = draw(config, progress)
    echo(f"drew     {len(result.images)} images, {result.images[0]} …")
    echo(f"grid     {result.grid}")
    return DONE


def generate(config: GenerateConfig, progress: Progress) -> GenerationResult:
    """Generate on the cluster that RAY_ADDRESS names; SIGTERM or Ctrl-C drains."""
    from ddpm_pipeline.generate.driver import (
        generate as run_generation,  # imports Ray; see ddpm_pipeline.jobs.ray_session
    )

    stop = threading.Event()

    @contextmanager
    def cluster() -> Generator[None]:
        # Installed after Ray's own handler, which would end the process at once.
        with ray_cluster(), on_stop_signal(stop.set, "finishing or giving up the shards in progress"):
            yield

    return run_generation(config, progress, stop=stop, cluster=cluster)


def as_document(result: GenerationResult) -> dict[str, object]:
    """How a generation ended, for `--json`."""
    measured = {name: getattr(result, name) for name in ("efficiency", "cost")}
    figures = {name: found and found.metrics() for name, found in measured.items()}
    return {**vars(result), "images_per_second": result.images_per_second, **figures}


def summary(result: GenerationResult) -> list[str]:
    """How a generation ended, one fact per line."""
    what = f"{result.count:,} images in {result.num_shards:,} shards"
    if result.status == "superseded":
        what = str(result.reason)
    lines = [f"{result.status}: {what} at {result.output}"]
    lines += [f"shared   with {job}" for job in result.concurrent_jobs]
    if result.reason and result.status != "superseded":
        lines.append(f"reason   {result.reason}")
    if result.shards_made:
        lines.append(
            f"made     {result.images_made:,} images in {result.shards_made:,} shards now, "
            f"{result.images_per_second:,.1f} images/s"
        )
    if result.concurrent_jobs or result.shards_made_twice:
        lines.append(f"twice    {result.shards_made_twice:,} shards, which another job finished first")
    if result.efficiency is not None:
        lines.append(f"gpu      {result.efficiency}")
    if result.signature is not None:
        lines.append(f"signed   {result.signature}")
    if result.cost is not None:
        lines.append(f"cost     {result.cost.text()}")
    if result.status in ("drained", "failed"):
        lines.append("next     the same command continues; finished shards are kept")
    if result.run_url:
        lines.append(f"run      {result.run_url}")
    if result.status in ("complete", "already complete"):
        lines.append(f"next     ddpm verify {result.output} --regenerate 16")
    return lines
