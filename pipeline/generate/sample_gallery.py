"""A few stored samples, by class: what contact sheets and reports are made of."""

from collections.abc import Iterator

import torch

from pipeline.data.formats.pixels import Pixels, decode
from pipeline.data.formats.shards import read_shard
from pipeline.generate.plan import Shard, classes_of, locate
from pipeline.generate.spec import Spec
from pipeline.store import Store

COLUMNS = 12
_MAX_ROWS = 24
_LONGEST_LABEL = 40
_MAX_SHARDS = 4
_LOOK_AHEAD = 100_000


def chosen(spec: Spec) -> dict[int | None, list[int]]:
    """Indexes of the first samples of each class, classes ascending; of all samples under None without classes.

    A function of the spec alone. Samples further than a few shards in are not looked for.
    """
    reach = min(spec.count, _LOOK_AHEAD, _MAX_SHARDS * spec.shard_size)
    index = torch.arange(spec.first_index, spec.first_index + reach)
    labels = classes_of(spec, index)
    if labels is None:
        return {None: index[: COLUMNS * COLUMNS // 2].tolist()}
    wanted = sorted(set(labels.tolist()))[:_MAX_ROWS]
    return {label: index[labels == label][:COLUMNS].tolist() for label in wanted}


def load_images(store: Store, spec: Spec) -> dict[int | None, list[Pixels]]:
    """The chosen samples' images uint8 (H, W, C), read back from the stored shards."""
    picked = chosen(spec)
    images = dict(_images(store, spec, sorted(i for part in picked.values() for i in part)))
    return {label: [images[index] for index in part] for label, part in picked.items()}


def grid_rows(gallery: dict[int | None, list[Pixels]]) -> list[list[Pixels]]:
    """A gallery as rows of a grid: one a class, or of a fixed length without classes."""
    if None in gallery:
        images = gallery[None]
        return [images[start : start + COLUMNS] for start in range(0, len(images), COLUMNS)]
    return list(gallery.values())


def labels_of(gallery: dict[int | None, list[Pixels]], names: tuple[str, ...] | None) -> list[str] | None:
    """The rows' names, long ones cut, or None without classes."""
    if None in gallery:
        return None
    told = [class_name(label, names) for label in gallery if label is not None]
    return [name if len(name) <= _LONGEST_LABEL else f"{name[: _LONGEST_LABEL - 1]}…" for name in told]


def class_name(label: int, names: tuple[str, ...] | None) -> str:
    """A label as people call it."""
    return names[label] if names is not None and label < len(names) else str(label)


def _images(store: Store, spec: Spec, indexes: list[int]) -> Iterator[tuple[int, Pixels]]:
    wanted: dict[Shard, set[str]] = {}
    for index in indexes:
        wanted.setdefault(locate(spec, index)[0], set()).add(f"{index:012d}")
    for unit, keys in wanted.items():
        for key, files in read_shard(store.read(unit.key), label=f"{store.uri}/{unit.key}"):
            if key in keys:
                yield int(key), decode(files[spec.image_format], spec.image_format, spec.channels)
