"""Encodes sampled images to the members of a shard. Needs no torch: beside a GPU other processes do it."""

import json
from dataclasses import dataclass, replace
from typing import NamedTuple

from ddpm_pipeline.data.formats.image_stats import ImageStats, image_stats
from ddpm_pipeline.data.formats.images import ImageFormat, encode_image
from ddpm_pipeline.data.formats.npy import Pixels
from ddpm_pipeline.data.formats.provenance import synthetic_mark

Member = tuple[str, dict[str, bytes]]


@dataclass(frozen=True)
class SampledImages:
    """Images of consecutive samples, and what their members say of them."""

    first: int
    """Index of the first sample."""
    pixels: Pixels
    """uint8 (N, H, W, C)."""
    labels: list[int] | None
    """Class labels of the N samples; None without classes."""
    seed: int
    digest: str
    """Of the spec."""
    image_format: ImageFormat
    provenance: bool = False
    """Whether the images are marked as synthetic."""

    def parts(self, number: int) -> list["SampledImages"]:
        """The images in order, in at most `number` parts of about the same size."""
        size = -(-len(self.pixels) // number)
        return [self._part(begin, begin + size) for begin in range(0, len(self.pixels), size)]

    def _part(self, begin: int, end: int) -> "SampledImages":
        labels = None if self.labels is None else self.labels[begin:end]
        first, pixels = self.first + begin, self.pixels[begin:end]
        return replace(self, first=first, pixels=pixels, labels=labels)


class EncodedImages(NamedTuple):
    """Encoded images of a shard."""

    members: list[Member]
    stats: ImageStats


def encode(images: SampledImages) -> EncodedImages:
    """The members of the images, in order, and the images' statistics."""
    members: list[Member] = []
    for place, pixels in enumerate(images.pixels):
        index = images.first + place
        label = None if images.labels is None else images.labels[place]
        mark = synthetic_mark(images.digest, index) if images.provenance else None
        facts = {"index": index, "seed": images.seed, "class": label, "spec": images.digest}
        files = {
            images.image_format: encode_image(pixels, images.image_format, mark),
            "json": json.dumps(facts, separators=(",", ":")).encode(),
        }
        members.append((f"{index:012d}", files))
    return EncodedImages(members, image_stats(images.pixels))
