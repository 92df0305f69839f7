"""Samples a few images into a local folder, in this process, without a cluster."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from ddpm_pipeline.config.generation import SampleConfig, SpecSettings
from ddpm_pipeline.data.formats.contact_sheet import image_grid, in_rows, labelled_rows
from ddpm_pipeline.data.formats.images import encode_image
from ddpm_pipeline.data.formats.npy import Pixels
from ddpm_pipeline.data.formats.provenance import synthetic_mark
from ddpm_pipeline.diffusion.sampler_protocol import SamplerStep
from ddpm_pipeline.disk_errors import disk_errors_at
from ddpm_pipeline.generate.class_labels import classes_of, index_tensor
from ddpm_pipeline.generate.class_names import class_name
from ddpm_pipeline.generate.device_check import usable_kind
from ddpm_pipeline.generate.engine import Engine, set_up_torch
from ddpm_pipeline.generate.model_source import ResolvedModel, find_model
from ddpm_pipeline.generate.spec import Spec, make_spec
from ddpm_pipeline.nets.model_files import build_model
from ddpm_pipeline.progress import Progress, no_progress

_MIN_COLUMNS = 12


@dataclass(frozen=True)
class SampleResult:
    """Files written by `draw`."""

    images: tuple[Path, ...]
    """One file per image, named by its index."""
    grid: Path
    """These images in one; with classes, each class begins a row."""


def draw(config: SampleConfig, progress: Progress = no_progress) -> SampleResult:
    """Sample and write images and grid.png. Progress counts network evaluations of batches."""
    model = find_model(config.model)
    spec = _spec_of(config, model)
    set_up_torch(spec)
    net = build_model(model.card, model.weights, spec.device, where=config.model)
    engine = Engine(spec, net, model.card)
    parts = index_tensor(range(config.first_index, config.first_index + config.count)).split(spec.batch_size)
    wanted = None if config.only is None else set(config.only)
    total = len(parts) * config.sampler.num_steps
    images: dict[int, Pixels] = {}
    for number, part in enumerate(parts):

        def on_step(step: SamplerStep, before: int = number * config.sampler.num_steps) -> None:
            progress(before + step.k + 1, total)

        for index, image in zip(part.tolist(), engine.images(part, on_step), strict=True):
            if wanted is None or index in wanted:
                images[index] = image
    return _write(config, spec, images, _sheet(spec, images, model.card.class_names))


def _spec_of(config: SampleConfig, model: ResolvedModel) -> Spec:
    """The spec of a generation that makes the same images."""
    device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    chosen = config.model_dump(exclude={"output", "only", "device", "spec_digest"}) | {
        "batch_size": min(config.batch_size, config.count),
        "shard_size": config.count,
        "cpu_threads": config.cpu_threads or torch.get_num_threads(),
    }
    return make_spec(
        SpecSettings.model_validate(chosen),
        model.card,
        name=model.name,
        version=model.version,
        device=device,
        device_kind=usable_kind(torch.device(device)),
    )


def _write(config: SampleConfig, spec: Spec, images: dict[int, Pixels], sheet: Pixels) -> SampleResult:
    folder = Path(config.output)
    digest = config.spec_digest or spec.digest

    def mark(index: int | None = None) -> bytes | None:
        return synthetic_mark(digest, index) if config.provenance else None

    paths: list[Path] = []
    with disk_errors_at(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for index, image in images.items():
            path = folder / f"{index:012d}.{config.image_format}"
            path.write_bytes(encode_image(image, config.image_format, mark(index)))
            paths.append(path)
        grid = folder / "grid.png"
        grid.write_bytes(encode_image(sheet, "png", mark()))
    return SampleResult(tuple(paths), grid)


def _sheet(spec: Spec, images: dict[int, Pixels], names: tuple[str, ...] | None) -> Pixels:
    """The grid of images by index: with classes, each begins a row and goes on in further ones."""
    labels = classes_of(spec, torch.tensor(list(images)))
    if labels is None:
        return image_grid(in_rows(list(images.values())))
    of_label: dict[int, list[Pixels]] = {label: [] for label in sorted(set(labels.tolist()))}
    for label, image in zip(labels.tolist(), images.values(), strict=True):
        of_label[label].append(image)
    named = [(class_name(label, names), part) for label, part in of_label.items()]
    return image_grid(*labelled_rows(named, max(_MIN_COLUMNS, math.isqrt(len(images)))))
