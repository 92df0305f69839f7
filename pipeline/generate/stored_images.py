"""The images of a stored shard, each compared with the plan."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ddpm_pipeline.data.formats.shards import read_shard
from ddpm_pipeline.errors import DamageError
from ddpm_pipeline.generate.plan import Shard
from ddpm_pipeline.generate.spec import Spec


@dataclass(frozen=True, slots=True)
class StoredImage:
    """An image as it lies in a shard."""

    index: int
    data: bytes
    """Its encoded pixels."""
    json: bytes
    """Its record."""

    @property
    def label(self) -> int | None:
        """The class in its record; None without classes. DamageError if that cannot be read."""
        try:
            label = json.loads(self.json)["class"]
        except (ValueError, KeyError, TypeError, RecursionError):
            label = -1
        if label is not None and (not isinstance(label, int) or label < 0):
            raise DamageError(f"sample {self.index:012d}: its json names no class")
        return label


def stored_images(source: bytes | Path, spec: Spec, unit: Shard) -> Iterator[StoredImage]:
    """The images of a shard in order. DamageError unless they are exactly those of the plan."""
    place = 0
    for place, (key, files) in enumerate(read_shard(source, label=unit.key), 1):
        index = unit.first + place - 1
        if place > unit.count or key != f"{index:012d}" or spec.image_format not in files:
            raise DamageError(f"{unit.key}: its sample {place} is {key!r}, not image {index}")
        yield StoredImage(index, files[spec.image_format], files.get("json", b""))
    if place != unit.count:
        raise DamageError(f"{unit.key}: holds {place} samples of {unit.count}")
