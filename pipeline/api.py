"""The library: what the commands do, for programs in Python.

    from ddpm_pipeline import api as ddpm
    trained = ddpm.train("digits", steps=500)

Each job takes its settings as an object of `ddpm_pipeline.config`, as the name of a preset or as the path of a settings
file, and single settings as keywords, which win: `optimizer={"lr": 1e-4}`, or `**{"optimizer.lr": 1e-4}`. It runs where
the command would: on the cluster that RAY_ADDRESS names, against the stack of the working directory or the services
that the environment names. It prints nothing; errors are exceptions. `progress` is called with (done, total, note).

torch, Ray and MLflow are imported by the first call that needs them.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ddpm_pipeline import __version__
from ddpm_pipeline.config.data import PackConfig
from ddpm_pipeline.config.diffusion import SamplerConfig
from ddpm_pipeline.config.distill_job import DistillConfig
from ddpm_pipeline.config.evaluation import EvaluateConfig, PromoteConfig
from ddpm_pipeline.config.generation import GenerateConfig
from ddpm_pipeline.config.training import TrainConfig
from ddpm_pipeline.errors import DamageError, DiskFull, JobError, OneLineError, Outage, UserError
from ddpm_pipeline.jobs.runner import JobArguments, given_settings, preset_uses_gpus, use_running_stack
from ddpm_pipeline.progress import Progress, no_progress
from ddpm_pipeline.telemetry.terminal import quiet

if TYPE_CHECKING:
    from ddpm_pipeline.data.packing.pack_dataset import PackReport
    from ddpm_pipeline.evaluate.document import Evaluation
    from ddpm_pipeline.evaluate.gate import Decision
    from ddpm_pipeline.generate.generated_images import GeneratedImages
    from ddpm_pipeline.generate.generation_job import GenerationResult
    from ddpm_pipeline.generate.loaded_model import LoadedModel
    from ddpm_pipeline.generate.verification import VerifyReport
    from ddpm_pipeline.train.training_driver import TrainingResult

__all__ = [
    "DamageError",
    "DiskFull",
    "DistillConfig",
    "EvaluateConfig",
    "GenerateConfig",
    "JobError",
    "OneLineError",
    "Outage",
    "PackConfig",
    "Progress",
    "PromoteConfig",
    "SamplerConfig",
    "TrainConfig",
    "UserError",
    "__version__",
    "distill",
    "evaluate",
    "generate",
    "load_model",
    "open_generation",
    "pack",
    "promote",
    "train",
    "verify",
]


def pack(
    settings: PackConfig | str | Path | None = None, /, *, progress: Progress = no_progress, **values: Any
) -> PackReport:
    """Pack images into shards and their index, unless it is done already. A well-known data set's name is a preset.

    `progress` counts images.
    """
    use_running_stack()
    from ddpm_pipeline.jobs.pack import dataset_settings, pack_on_cluster

    if isinstance(settings, str) and (suited := dataset_settings(settings)) is not None:
        settings, values = None, {**suited, **values}
    with quiet():
        return pack_on_cluster(given_settings(PackConfig, "pack", settings, values), progress)


def train(
    settings: TrainConfig | str | Path | None = None,
    /,
    *,
    local: bool = False,
    progress: Progress = no_progress,
    **values: Any,
) -> TrainingResult:
    """Train a model and register it; the same call resumes. `local` trains in this process, without Ray.

    `progress` counts steps. Ctrl-C saves a checkpoint, and the result's status is "stopped".
    """
    use_running_stack()
    from ddpm_pipeline.jobs.train import train as run

    with quiet():
        return run(given_settings(TrainConfig, "train", settings, values), progress, local)


def distill(
    settings: DistillConfig | str | Path | None = None,
    /,
    *,
    local: bool = False,
    progress: Progress = no_progress,
    **values: Any,
) -> TrainingResult:
    """Train a model of one to four steps to follow a trained one, and register it; the same call resumes.

    `progress` counts steps.
    """
    use_running_stack()
    from ddpm_pipeline.jobs.distill import plan
    from ddpm_pipeline.jobs.train import train as run

    with quiet():
        training = plan(given_settings(DistillConfig, "distill", settings, values), no_progress)
        return run(training, progress, local)


def generate(
    settings: GenerateConfig | str | Path | None = None,
    /,
    *,
    progress: Progress = no_progress,
    **values: Any,
) -> GenerationResult:
    """Fill an output prefix with samples of a model; makes only what is missing. `progress` counts images.

    JobError where shards failed; after Ctrl-C the result's status is "drained".
    """
    use_running_stack()
    from ddpm_pipeline.jobs.generate import generate as run

    with quiet():
        result = run(given_settings(GenerateConfig, "generate", settings, values), progress)
    if result.status == "failed":
        first = next((f"{key}: {error}" for key, error in result.failed.items()), "no shard was made")
        raise JobError(f"{result.output}: {result.reason or first}; the same call makes what is missing")
    return result


def verify(
    prefix: str,
    *,
    regenerate: int = 0,
    model: str | None = None,
    key: str | None = None,
    signed_for: str | None = None,
    num_workers: int = 0,
    progress: Progress = no_progress,
) -> VerifyReport:
    """Recount, rehash and decode every object of a generation; the report's `ok` is the verdict.

    `regenerate` samples that many images again and compares bytes; `model` is the folder of an unregistered network;
    `key`, `signed_for` and `num_workers` are those of `ddpm verify`. `progress` counts shards, then images that are
    sampled again.
    """
    use_running_stack()
    from ddpm_pipeline.jobs.verify import examine, regenerate_where_possible

    with quiet():
        report = examine(prefix, progress, key, signed_for, num_workers)
        if regenerate:
            regenerate_where_possible(report, regenerate, model, progress)
    return report


def evaluate(
    settings: EvaluateConfig | str | Path | None = None,
    /,
    *,
    prefix: str | None = None,
    progress: Progress = no_progress,
    **values: Any,
) -> Evaluation:
    """Measure a complete generation against its reference data; stores the result beside the prefix, and in MLflow.

    Without `prefix` it is the one that the preset generates into. `progress` counts images.
    """
    use_running_stack()
    from ddpm_pipeline.jobs.evaluate import log_evaluation, measure, output_of

    with quiet():
        config = given_settings(EvaluateConfig, "evaluate", settings, values)
        output = prefix or output_of(_call(settings))
        evaluation = measure(config, output, progress)
        log_evaluation(config, evaluation)
    return evaluation


def promote(
    settings: PromoteConfig | str | Path | None = None,
    /,
    *,
    progress: Progress = no_progress,
    **values: Any,
) -> Decision | None:
    """Compare the challenger with the champion under equal conditions and promote it if it is better.

    None where they are the same version. `progress` counts models.
    """
    use_running_stack()
    from ddpm_pipeline.jobs.promote import decide

    with quiet():
        config = given_settings(PromoteConfig, "promote", settings, values)
        return decide(config, progress, preset_uses_gpus(_call(settings)))


def load_model(model: str | Path, device: Literal["cpu", "cuda"] | None = None) -> LoadedModel:
    """The model `name@alias`, `name/version` or in a folder, to sample in this process.

    `device` None takes a GPU where there is one.
    """
    use_running_stack()
    from ddpm_pipeline.generate.loaded_model import load_model as run

    return run(str(model), device)


def open_generation(prefix: str) -> GeneratedImages:
    """The images of a complete generation: iterating gives (image, label, index), `len` their number."""
    use_running_stack()
    from ddpm_pipeline.generate.generated_images import GeneratedImages

    return GeneratedImages(prefix)


def _call(settings: object) -> JobArguments:
    """The preset or file of a call."""
    if isinstance(settings, str):
        return JobArguments(preset=settings)
    return JobArguments(files=(settings,)) if isinstance(settings, Path) else JobArguments()
