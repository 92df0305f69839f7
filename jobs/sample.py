"""A few images for a look, in this process, without a cluster."""

from jobs.progress import Progress
from jobs.shell import DONE
from pipeline.config.generate import SampleConfig
from pipeline.generate.sample import draw
from pipeline.terminal import echo


def run(config: SampleConfig, progress: Progress) -> int:
    """Draw, and say where the pictures are."""
    result = draw(config, progress)
    echo(f"drew     {len(result.images)} images, {result.images[0]} …")
    echo(f"grid     {result.grid}")
    return DONE
