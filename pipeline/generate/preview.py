"""Samples a few images into a local folder, in this process, without a cluster."""

from dataclasses import dataclass
from pathlib import Path

import torch

from pipeline.config.generation import SampleConfig, SpecSettings
from pipeline.data.formats.contact_sheet import image_grid, in_rows
from pipeline.data.formats.images import encode_image
from pipeline.data.formats.npy import Pixels
from pipeline.diffusion.samplers import SamplerStep
from pipeline.disk_errors import disk_errors_at
from pipeline.generate.class_labels import class_name, classes_of
from pipeline.generate.device_check import usable_kind
from pipeline.generate.engine import Engine, set_up_torch
from pipeline.generate.model_source import find_model
from pipeline.generate.spec import make_spec
from pipeline.nets.model_files import build_model
from pipeline.progress import Progress, no_progress


@dataclass(frozen=True)
class SampleResult:
    """Files written by `draw`."""

    images: tuple[Path, ...]
    """One PNG per sample, named by its index."""
    grid: Path
    """All samples in one image; with classes, one row per class."""


def draw(config: SampleConfig, progress: Progress = no_progress) -> SampleResult:
    """Sample and write images and grid.png. Progress counts network evaluations of batches."""
    model = find_model(config.model)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    batch_size = min(config.batch_size, config.count)
    chosen = config.model_dump(exclude={"output", "batch_size"})
    settings = SpecSettings.model_validate(
        chosen
        | {"batch_size": batch_size, "shard_size": config.count, "cpu_threads": torch.get_num_threads()}
    )
    spec = make_spec(
        settings,
        model.card,
        name=model.name,
        version=model.version,
        device=device,
        device_kind=usable_kind(torch.device(device)),
    )
    set_up_torch(spec)
    net = build_model(model.card, model.weights, device, where=config.model)
    engine = Engine(spec, net, model.card)
    images: list[Pixels] = []
    index = torch.arange(config.first_index, config.first_index + config.count)
    parts = index.split(batch_size)
    total = len(parts) * config.sampler.num_steps
    for number, part in enumerate(parts):

        def on_step(step: SamplerStep, before: int = number * config.sampler.num_steps) -> None:
            progress(before + step.k + 1, total)

        images.extend(engine.images(part, on_step))
    labels = classes_of(spec, index)
    names = model.card.class_names
    return _write(config, images, None if labels is None else labels.tolist(), names)


def _write(
    config: SampleConfig, images: list[Pixels], labels: list[int] | None, names: tuple[str, ...] | None
) -> SampleResult:
    folder = Path(config.output)
    paths: list[Path] = []
    with disk_errors_at(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for place, image in enumerate(images):
            path = folder / f"{config.first_index + place:012d}.png"
            path.write_bytes(encode_image(image, "png"))
            paths.append(path)
        sheet = folder / "grid.png"
        sheet.write_bytes(encode_image(_sheet(images, labels, names), "png"))
    return SampleResult(tuple(paths), sheet)


def _sheet(images: list[Pixels], labels: list[int] | None, names: tuple[str, ...] | None) -> Pixels:
    if labels is None:
        return image_grid(in_rows(images))
    present = sorted(set(labels))
    rows = [
        [image for image, its_label in zip(images, labels, strict=True) if its_label == label]
        for label in present
    ]
    return image_grid(rows, [class_name(label, names) for label in present])
