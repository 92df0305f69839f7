"""Search for a model's sampler: `ddpm tune-sampler digits model=digits@champion`."""

from functools import partial

from jobs.ray_map import ray_workers
from jobs.runner import DONE, JobArguments, run_job
from pipeline.config.evaluation import TuneConfig
from pipeline.progress import Progress
from pipeline.telemetry.terminal import echo


def run_call(call: JobArguments) -> int:
    """Run the job that a call describes."""
    return run_job("tune", TuneConfig, run, call, unit="samplers")


def run(config: TuneConfig, progress: Progress) -> int:
    """Try every candidate, print the table, store table, plot and preset."""
    from pipeline.evaluate.sampler_search import preset, save_search, search_samplers, table

    search = search_samplers(config, progress, partial(ray_workers, config.num_workers, "tune"))
    echo(*table(search))
    folder = save_search(search, config.output)
    echo(f"stored   {folder}/samplers.json, samplers.png, preset.yaml")
    echo("next     ddpm generate … --config preset.yaml:", *preset(search.best).splitlines())
    return DONE
