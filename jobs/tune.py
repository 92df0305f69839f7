"""Search for a model's sampler: `ddpm tune-sampler digits model=digits@champion`."""

from functools import partial

from ddpm_pipeline.config.evaluation import TuneConfig
from ddpm_pipeline.jobs.ray_map import measuring_workers
from ddpm_pipeline.jobs.runner import DONE, JobArguments, preset_uses_gpus, run_job
from ddpm_pipeline.progress import Progress
from ddpm_pipeline.telemetry.terminal import echo


def run_call(call: JobArguments) -> int:
    """Run the job that a call describes."""

    def work(config: TuneConfig, progress: Progress) -> int:
        return run(config, progress, preset_uses_gpus(call))

    return run_job("tune", TuneConfig, work, call, unit="samplers")


def run(config: TuneConfig, progress: Progress, used_gpus: bool = False) -> int:
    """Try every candidate, print the table, store table, plot and preset."""
    from ddpm_pipeline.evaluate.sampler_search import preset, save_search, search_samplers, table

    evaluate = config.evaluate.model_copy(update={"num_workers": config.num_workers})
    workers = partial(measuring_workers, evaluate, "tune")
    search = search_samplers(config, progress, workers, used_gpus)
    echo(*table(search))
    folder = save_search(search, config.output)
    echo(f"stored   {folder}/samplers.json, samplers.png, preset.yaml")
    echo("next     ddpm generate … --config preset.yaml:", *preset(search.best).splitlines())
    return DONE
