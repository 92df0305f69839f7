"""Guards: reasons to stop a generation before worthless images fill the bucket."""

from pipeline.config.generation import GuardConfig
from pipeline.config.model_card import TrainingData
from pipeline.data.formats.image_stats import ImageStats


class GuardTripped(Exception):  # noqa: N818 - it is no fault of the program
    """The images are worthless; making more of them is no use. The message says in what way."""


def check_guards(tally: ImageStats, guards: GuardConfig, reference: TrainingData | None) -> str | None:
    """What is wrong with images of this tally, in one line, or None.

    `reference` holds the training data's statistics; None where they are no measure (classes chosen by hand).
    """
    if not guards.enabled or tally.images < guards.min_images:
        return None
    for name, count, limit in (
        ("constant", tally.constant, guards.max_constant_fraction),
        ("saturated", tally.saturated, guards.max_saturated_fraction),
    ):
        if count > limit * tally.images:
            return (
                f"{count} of {tally.images} images are {name}, more than guards.max_{name}_fraction={limit:g}"
            )
    if reference is None or reference.channel_mean is None or reference.channel_std is None:
        return None
    statistics = zip(tally.mean, reference.channel_mean, reference.channel_std, strict=True)
    for channel, (mean, expected, spread) in enumerate(statistics):
        if abs(mean - expected) > guards.max_mean_drift * max(spread, 1.0):
            return (
                f"channel {channel} has mean {mean:.1f} over {tally.images} images where the training data has "
                f"{expected:.1f} ± {spread:.1f}: a drift beyond guards.max_mean_drift={guards.max_mean_drift:g}"
            )
    return None
