"""From the settings of a distillation to the training of the student. Checks teacher and pairs before work starts."""

from ddpm_pipeline.config.data import DataConfig
from ddpm_pipeline.config.distill_job import DistillConfig
from ddpm_pipeline.config.training import TrainConfig
from ddpm_pipeline.distill.pairs import open_pairs
from ddpm_pipeline.errors import UserError
from ddpm_pipeline.generate.model_source import ResolvedModel, find_model
from ddpm_pipeline.progress import Progress


def plan_distillation(config: DistillConfig, progress: Progress) -> TrainConfig:
    """The training of the student; its teacher is pinned to a version. `progress` counts verified shards of pairs.

    Raises UserError for a teacher or pairs that cannot be used.
    """
    teacher = find_teacher(config)
    pinned = config.teacher if teacher.version is None else f"{teacher.name}/{teacher.version}"
    config = config.model_copy(update={"teacher": pinned})
    if config.pairs is None:
        assert config.data is not None  # the settings have one of the two
        return config.training(teacher.card, config.data, None)
    data, pairs = open_pairs(config, teacher, progress)
    return config.training(teacher.card, data, pairs)


def training_to_estimate(config: DistillConfig) -> TrainConfig:
    """The same for a dry run, without looking at pairs. UserError for a teacher that cannot be used."""
    return config.training(find_teacher(config).card, config.data or DataConfig(uri=str(config.pairs)), None)


def find_teacher(config: DistillConfig) -> ResolvedModel:
    """The model that `teacher` names. UserError if it cannot teach."""
    teacher = find_model(config.teacher)
    if teacher.card.distillation is not None:
        raise UserError(
            f"distill.teacher: {config.teacher} is itself distilled, from {teacher.card.distillation.teacher}; "
            "name that one"
        )
    if config.sampler.guidance_scale != 1 and teacher.card.net.null_label is None:
        raise UserError(
            f"distill.sampler.guidance_scale: {config.teacher} was trained without net.null_class; use 1.0"
        )
    return teacher
