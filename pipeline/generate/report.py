"""The report: one self-contained HTML page on a generation. It holds no times: same work, same bytes."""

from collections.abc import Iterator

import torch

from pipeline.data.formats.contact_sheet import image_grid
from pipeline.data.formats.images import decode_image, encode_image
from pipeline.data.formats.npy import Pixels
from pipeline.data.formats.shards import read_shard
from pipeline.generate.class_labels import class_name, classes_of
from pipeline.generate.manifest import Statistics
from pipeline.generate.plan import Shard, locate
from pipeline.generate.spec import Spec, pretty
from pipeline.html_page import render_page
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


def row_labels(gallery: dict[int | None, list[Pixels]], names: tuple[str, ...] | None) -> list[str] | None:
    """The rows' names, long ones cut, or None without classes."""
    if None in gallery:
        return None
    told = [class_name(label, names) for label in gallery if label is not None]
    return [name if len(name) <= _LONGEST_LABEL else f"{name[: _LONGEST_LABEL - 1]}…" for name in told]


def _images(store: Store, spec: Spec, indexes: list[int]) -> Iterator[tuple[int, Pixels]]:
    wanted: dict[Shard, set[str]] = {}
    for index in indexes:
        wanted.setdefault(locate(spec, index)[0], set()).add(f"{index:012d}")
    for unit, keys in wanted.items():
        for key, files in read_shard(store.read(unit.key), label=f"{store.uri}/{unit.key}"):
            if key in keys:
                yield int(key), decode_image(files[spec.image_format], (spec.size, spec.size, spec.channels))


def render_report(
    spec: Spec,
    statistics: Statistics,
    class_names: tuple[str, ...] | None,
    sheet: bytes,
    gallery: dict[int | None, list[Pixels]],
) -> bytes:
    """The page as bytes. `sheet` is the contact sheet's PNG."""
    version = "" if spec.model.version is None else f" version {spec.model.version}"
    return render_page(
        "report.html",
        # completeness.py reads the count from this title.
        title=f"{spec.count:,} samples of {spec.model.name}{version}",
        facts=_facts(spec, statistics),
        sheet=sheet,
        classes=[
            (class_name(label, class_names), count) for label, count in (statistics.classes or {}).items()
        ],
        class_grids=[
            (class_name(label, class_names), encode_image(image_grid([images]), "png"))
            for label, images in gallery.items()
            if label is not None and images
        ],
        spec=pretty(spec.model_dump(mode="json")).decode(),
    )


def _facts(spec: Spec, statistics: Statistics) -> dict[str, str]:
    return {
        "spec digest": spec.digest,
        "weights": f"{spec.model.weights}, sha256 {spec.model.sha256}",
        "indexes": f"{spec.first_index} to {spec.first_index + spec.count - 1}",
        "images": f"{spec.channels} x {spec.size} x {spec.size}, {spec.image_format}",
        "sampler": f"{spec.sampler.kind}, {spec.sampler.num_steps} steps",
        "channel means (0..255)": ", ".join(f"{value:.2f}" for value in statistics.channel_mean),
        "channel deviations": ", ".join(f"{value:.2f}" for value in statistics.channel_std),
        "constant images": str(statistics.constant),
        "saturated images": str(statistics.saturated),
    }
