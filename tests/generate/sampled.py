"""Images as an engine hands them to the encoders; imports nothing that computes."""

import numpy as np

from ddpm_pipeline.generate.encoding import SampledImages


def images(number: int, image_format: str = "png", labels: bool = True) -> SampledImages:
    pixels = np.random.default_rng(0).integers(0, 256, (number, 8, 8, 3), dtype=np.uint8)
    return SampledImages(40, pixels, list(range(number)) if labels else None, 7, "d" * 64, image_format)  # type: ignore[arg-type]
