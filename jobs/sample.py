"""A few images for a look, in this process, without a cluster."""

from jobs.runner import DONE
from pipeline.config.generation import SampleConfig
from pipeline.generate.preview import draw
from pipeline.progress import Progress
from pipeline.telemetry.terminal import echo


def run(config: SampleConfig, progress: Progress) -> int:
    """Draw, and say where the pictures are."""
    result = draw(config, progress)
    echo(f"drew     {len(result.images)} images, {result.images[0]} …")
    echo(f"grid     {result.grid}")
    return DONE
