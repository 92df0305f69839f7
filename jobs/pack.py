"""The packing job: images to shards and their index."""

from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial

from ddpm_pipeline.config.data import PackConfig
from ddpm_pipeline.data.packing.known_datasets import KNOWN_DATASETS
from ddpm_pipeline.data.packing.open_source import require_source
from ddpm_pipeline.data.packing.pack_dataset import (
    OpenProgress,
    PackReport,
    held_out_uri,
    local_parallel_map,
    pack,
)
from ddpm_pipeline.data.packing.pack_state import read_destination
from ddpm_pipeline.jobs.progress_bar import progress_of
from ddpm_pipeline.jobs.ray_map import ray_map_for
from ddpm_pipeline.jobs.runner import DONE, INTERRUPTED, JobArguments, presets, run_job
from ddpm_pipeline.parallel import ParallelMap
from ddpm_pipeline.progress import Progress
from ddpm_pipeline.telemetry.terminal import echo, echo_json

ENOUGH_IMAGES = 5_000
"""From this number on, connecting to a cluster is worth the seconds it takes."""


def run_call(call: JobArguments) -> int:
    """Run the job a call describes, whose preset may be the name of a well-known data set.

    Interrupted, it prints how to resume.
    """
    call = with_dataset(call)
    run = partial(pack_images, as_json=call.as_json)
    try:
        return run_job("pack", PackConfig, run, call, unit="images", estimate=estimate_pack)
    except KeyboardInterrupt:
        echo("stopped: finished shards are kept; run the same command to resume", error=True)
        return INTERRUPTED


def with_dataset(call: JobArguments) -> JobArguments:
    """The call with a data set's name as its source; without --config files, also with the settings that suit it."""
    suited = dataset_settings(call.preset)
    if suited is None:
        return call
    if call.files:
        suited = {"source": suited["source"]}
    words = tuple(f"{key}={value}" for key, value in suited.items())
    return replace(call, preset=None, overrides=(*words, *call.overrides))


def dataset_settings(name: str | None) -> dict[str, object] | None:
    """The settings that suit a well-known data set; None for any other name, and for that of a preset."""
    if name is None or name in presets() or name not in KNOWN_DATASETS:
        return None
    return {"source": name, "dest": f"{{root}}/data/{name}", **KNOWN_DATASETS[name].settings}


def list_datasets() -> int:
    """Print the data sets that are packed by their names."""
    for name, dataset in KNOWN_DATASETS.items():
        echo(f"{name:14} {dataset.title}: {dataset.summary}")
        echo(f"{'':14} license: {dataset.license}", f"{'':14} {dataset.citation}; {dataset.page}")
    echo("next     ddpm pack NAME   (or a preset that names it)")
    return DONE


def pack_images(config: PackConfig, progress: Progress, as_json: bool = False) -> int:
    """Pack, unless it is done already, and print what there is."""
    report = pack_on_cluster(config, progress, partial(progress_of, "fetch", "bytes"))
    if as_json:
        echo_json({"dest": config.dest, **asdict(report)})
        return DONE
    _print_report(report, config.dest)
    if report.held_out is not None:
        _print_report(report.held_out, held_out_uri(config.dest))
    echo(f"next     ddpm train data.uri={config.dest} …   (or a preset that names it)")
    return DONE


def pack_on_cluster(
    config: PackConfig, progress: Progress, fetch_progress: OpenProgress = nullcontext
) -> PackReport:
    """Pack, unless it is done already: on the cluster that RAY_ADDRESS names, or here for few images.

    Raises UserError before anything is written.
    """
    return pack(config, progress, _spread, fetch_progress)


@dataclass(frozen=True)
class Places:
    """State of source and destination, as a dry run prints it."""

    source: str
    dest: str

    def lines(self) -> list[str]:
        return [f"source   {self.source}", f"dest     {self.dest}"]


def estimate_pack(config: PackConfig) -> Places:
    """Check that source and destination can be used. Raises UserError when they cannot."""
    found = require_source(config)
    plan = read_destination(config)
    return Places(
        found, "is empty" if plan is None else "holds a pack of these settings, started or finished"
    )


@contextmanager
def _spread(config: PackConfig, num_images: int) -> Generator[ParallelMap]:
    """A cluster for many images, threads of this process for few."""
    with ray_map_for(num_images, ENOUGH_IMAGES, local_paths=True) as cluster:
        if cluster is not None:
            yield cluster
            return
        with local_parallel_map(config, num_images) as threads:
            yield threads


def _print_report(report: PackReport, dest: str) -> None:
    done = "already packed" if report.already_complete else "packed"
    echo(f"{done}: {report.num_samples} images in {report.num_shards} shards at {dest}")
    for note in report.notes:
        echo(f"note     {note}")
    if report.left_out:
        kinds = ", ".join(f"{kind} {count}" for kind, count in list(report.left_out.items())[:20])
        echo(f"skipped {report.other_files} files that are not images: {kinds}")
    for kind, names in (
        ("unreadable or small, skipped", report.unreadable),
        ("duplicate", report.duplicates),
    ):
        if names:
            echo(f"{len(names)} {kind}: see {dest}/pack-report.json")
