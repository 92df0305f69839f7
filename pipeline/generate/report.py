"""The report: one self-contained HTML page on a generation.

Only its section `measured` holds times, as only `times` does in the manifest: equal specs give equal bytes elsewhere.
"""

from collections.abc import Iterator, Sequence

import torch

from ddpm_pipeline.data.formats.contact_sheet import image_grid, in_rows
from ddpm_pipeline.data.formats.images import decode_image, encode_image
from ddpm_pipeline.data.formats.npy import Pixels
from ddpm_pipeline.data.formats.shards import read_shard
from ddpm_pipeline.generate.class_labels import classes_of
from ddpm_pipeline.generate.class_names import class_name
from ddpm_pipeline.generate.generation_cost import Cost
from ddpm_pipeline.generate.manifest import Manifest
from ddpm_pipeline.generate.plan import Shard, locate
from ddpm_pipeline.generate.spec import Spec, pretty
from ddpm_pipeline.generate.stored_generation import Generation
from ddpm_pipeline.html_page import render_page

COLUMNS = 12
_MAX_ROWS = 24
_MAX_SHARDS = 4
_LOOK_AHEAD = 100_000


Images = dict[int | None, list[Pixels]]
"""Images uint8 (H, W, C) by class label; all of them under None without classes."""


def shown_samples(spec: Spec) -> dict[int | None, list[int]]:
    """Indexes of the first samples of each class, classes ascending; of all samples under None without classes.

    A function of the spec alone. Considers only the first few shards.
    """
    reach = min(spec.count, _LOOK_AHEAD, _MAX_SHARDS * spec.shard_size)
    index = torch.arange(spec.first_index, spec.first_index + reach)
    labels = classes_of(spec, index)
    if labels is None:
        return {None: index[: COLUMNS * COLUMNS // 2].tolist()}
    shown = sorted(set(labels.tolist()))[:_MAX_ROWS]
    return {label: index[labels == label][:COLUMNS].tolist() for label in shown}


def load_images(generation: Generation) -> Images:
    """The images of the shown samples, read from the stored shards."""
    shown = shown_samples(generation.spec)
    images = dict(_read_images(generation, sorted(index for part in shown.values() for index in part)))
    return {label: [images[index] for index in part] for label, part in shown.items()}


def grid_rows(images: Images) -> Sequence[Sequence[Pixels]]:
    """The rows of a grid: one per class, or rows of fixed length without classes."""
    return in_rows(images[None], COLUMNS) if None in images else list(images.values())


def row_labels(images: Images, names: tuple[str, ...] | None) -> list[str] | None:
    """The rows' class names, or None without classes."""
    if None in images:
        return None
    return [class_name(label, names) for label in images if label is not None]


def _read_images(generation: Generation, indexes: list[int]) -> Iterator[tuple[int, Pixels]]:
    spec = generation.spec
    keys_of_shard: dict[Shard, set[str]] = {}
    for index in indexes:
        keys_of_shard.setdefault(locate(spec, index)[0], set()).add(f"{index:012d}")
    for unit, keys in keys_of_shard.items():
        data = generation.store.read(unit.key)
        for key, files in read_shard(data, label=f"{generation.uri}/{unit.key}"):
            if key in keys:
                yield int(key), decode_image(files[spec.image_format], spec.image_shape)


def render_report(manifest: Manifest, cost: Cost, sheet: bytes, images: Images) -> bytes:
    """The page as bytes. `sheet` is the contact sheet's PNG."""
    spec, class_names = manifest.spec, manifest.class_names
    mark = spec.mark()
    version = "" if spec.model.version is None else f" version {spec.model.version}"
    return render_page(
        "report.html",
        # completeness.py reads the count from this title.
        title=f"{spec.count:,} samples of {spec.model.name}{version}",
        facts=_facts(manifest),
        measured=cost.measured(),
        sheet=sheet,
        classes=[
            (class_name(label, class_names), count)
            for label, count in (manifest.statistics.classes or {}).items()
        ],
        class_grids=[
            (class_name(label, class_names), encode_image(image_grid([row]), "png", mark))
            for label, row in images.items()
            if label is not None and row
        ],
        spec=pretty(spec.model_dump(mode="json")).decode(),
    )


def _facts(manifest: Manifest) -> dict[str, str]:
    spec, statistics = manifest.spec, manifest.statistics
    evaluations = manifest.evaluations_per_image
    return {
        "spec digest": spec.digest,
        "weights": f"{spec.model.weights}, sha256 {spec.model.sha256}",
        "indexes": f"{spec.first_index} to {spec.first_index + spec.count - 1}",
        "images": f"{spec.channels} x {spec.size} x {spec.size}, {spec.image_format}",
        "sampler": f"{spec.sampler.kind}, {spec.sampler.num_steps} steps",
        **({} if evaluations is None else {"network evaluations per image": f"{evaluations:,}"}),
        "channel means (0..255)": ", ".join(f"{value:.2f}" for value in statistics.channel_mean),
        "channel deviations": ", ".join(f"{value:.2f}" for value in statistics.channel_std),
        "constant images": str(statistics.constant),
        "saturated images": str(statistics.saturated),
    }
