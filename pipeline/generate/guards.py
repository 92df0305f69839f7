"""Guards: stop a generation whose images are worthless before they fill the bucket."""

from ddpm_pipeline.config.generation import GuardConfig
from ddpm_pipeline.config.model_card import TrainingData
from ddpm_pipeline.data.formats.image_stats import ImageStats


class GuardTripped(Exception):  # noqa: N818 - not an error of the program
    """The images are worthless, so the job stops. The message names the defect."""


def check_guards(stats: ImageStats, guards: GuardConfig, reference: TrainingData | None) -> str | None:
    """What is wrong with images of these statistics, in one line, or None.

    `reference` holds the training data's statistics; None where they do not apply (classes chosen by the user).
    """
    if not guards.enabled or stats.images < guards.min_images:
        return None
    for name, count, limit in (
        ("constant", stats.constant, guards.max_constant_fraction),
        ("saturated", stats.saturated, guards.max_saturated_fraction),
    ):
        if count > limit * stats.images:
            return (
                f"{count} of {stats.images} images are {name}, more than guards.max_{name}_fraction={limit:g}"
            )
    if reference is None or reference.channel_mean is None or reference.channel_std is None:
        return None
    statistics = zip(stats.mean, reference.channel_mean, reference.channel_std, strict=True)
    for channel, (mean, expected, spread) in enumerate(statistics):
        if abs(mean - expected) > guards.max_mean_drift * max(spread, 1.0):
            return (
                f"channel {channel} has mean {mean:.1f} over {stats.images} images where the training data has "
                f"{expected:.1f} ± {spread:.1f}: a drift beyond guards.max_mean_drift={guards.max_mean_drift:g}"
            )
    return None
