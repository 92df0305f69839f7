"""The images of a complete generation, in the order of their indexes."""

import hashlib
from collections.abc import Iterator

from ddpm_pipeline.data.formats.images import decode_image
from ddpm_pipeline.data.formats.npy import Pixels
from ddpm_pipeline.errors import DamageError
from ddpm_pipeline.generate.completeness import require_complete
from ddpm_pipeline.generate.manifest import read_entries
from ddpm_pipeline.generate.prefix_spec import open_generation
from ddpm_pipeline.generate.spec import Spec
from ddpm_pipeline.generate.stored_images import stored_images
from ddpm_pipeline.store import ObjectMissing


class GeneratedImages:
    """Iterates over the images at a prefix, a shard in memory at a time, each checked against the manifest."""

    def __init__(self, prefix: str) -> None:
        """UserError where the prefix holds no generation, or one that is not complete."""
        self.generation = open_generation(prefix)
        self.manifest = require_complete(self.generation)

    @property
    def spec(self) -> Spec:
        """Everything that determines the images."""
        return self.generation.spec

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Names of the classes by label; None without classes or with unnamed ones."""
        return self.manifest.class_names

    def __len__(self) -> int:
        return self.manifest.count

    def __iter__(self) -> Iterator[tuple[Pixels, int | None, int]]:
        """(image, label, index) by index: the image is uint8 (height, width, channels), the label None without classes.

        DamageError for a shard that is not the manifest's.
        """
        store, spec = self.generation.store, self.spec
        for unit, entry in zip(self.generation.shards(), read_entries(store), strict=True):
            try:
                data = store.read(unit.key)
            except ObjectMissing:
                raise DamageError(f"{store.uri}/{unit.key}: is missing") from None
            if hashlib.sha256(data).hexdigest() != entry.sha256:
                raise DamageError(f"{store.uri}/{unit.key}: has not the sha256 of the manifest")
            for stored in stored_images(data, spec, unit):
                yield decode_image(stored.data, spec.image_shape), stored.label, stored.index
