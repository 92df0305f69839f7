"""The feature network of a data set: `ddpm features train digits`."""

from ddpm_pipeline.config.evaluation import FeaturesConfig, PromoteConfig
from ddpm_pipeline.jobs.ray_map import measuring_workers
from ddpm_pipeline.jobs.runner import DONE, JobArguments, preset_uses_gpus, run_job
from ddpm_pipeline.progress import Progress
from ddpm_pipeline.telemetry.terminal import echo


def run_call(call: JobArguments) -> int:
    """Run the job that a call describes."""
    return run_job("features", FeaturesConfig, run, call, unit="steps")


def run(config: FeaturesConfig, progress: Progress) -> int:
    """Train the classifier, or keep the one that exists."""
    import torch

    from ddpm_pipeline.features.train_classifier import train_features

    torch.set_num_threads(config.cpu_threads)
    folder, card, new = train_features(config, progress)
    echo(
        f"{'trained' if new else 'already trained'}: classifier of {card.num_classes} classes, "
        f"{card.held_out_accuracy:.2%} of {card.num_held_out} held-out images correct"
    )
    echo(f"network  {folder}/classifier.json  sha256 {card.sha256}")
    echo("next     ddpm evaluate PRESET, ddpm promote PRESET")
    return DONE


def trust_call(call: JobArguments) -> int:
    """Trust the feature network and the reference of a preset's gate as they are now."""

    def work(config: PromoteConfig, progress: Progress) -> int:
        return run_trust(config, preset_uses_gpus(call))

    return run_job("promote", PromoteConfig, work, call, unit="images")


def run_trust(config: PromoteConfig, used_gpus: bool = False) -> int:
    """Record the digests and print what changed."""
    from ddpm_pipeline.features.trust import trust_current

    evaluate = config.gate.evaluate
    with measuring_workers(evaluate, "promote.gate.evaluate", used_gpus) as workers:
        recorded = trust_current(config.model, evaluate, workers)
    for found in recorded:
        change = "as before" if found.previous == found.digest else f"before {found.previous or 'nothing'}"
        echo(f"trusted  the {found.what} of {config.model}: {found.uri}: {found.digest}, {change}")
    return DONE
