"""Draw the images of docs/gallery.md: samples of a model with classes, such as that of the preset emoji-32, and of its
few-step student.

    python -m docs.emoji [MODEL] [STUDENT] [FOLDER]

Samples are those of `ddpm generate emoji-32`: the first ones by index or, of the reverse process, three of them. Each
picture is reduced to 256 colors, so that it loads fast."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from PIL import Image

from ddpm_pipeline.api import load_model
from ddpm_pipeline.config.diffusion import SamplerConfig
from ddpm_pipeline.data.formats.contact_sheet import image_grid, labelled_rows
from ddpm_pipeline.diffusion import NoiseSchedule, SamplerStep, sample, to_uint8
from ddpm_pipeline.errors import UserError
from ddpm_pipeline.generate.class_names import class_name
from ddpm_pipeline.generate.loaded_model import LoadedModel
from ddpm_pipeline.jobs.progress_bar import progress_of
from ddpm_pipeline.telemetry.terminal import echo

IMAGES = Path(__file__).parent / "images" / "emoji"
COLUMNS = 12
Pixels = NDArray[np.uint8]

_SAMPLER = SamplerConfig(kind="dpm++2m", num_steps=20, guidance_scale=1.5)
_GUIDANCE = (1.0, 1.5, 3.0)
_STEPS = (5, 10, 20, 50)
_STUDENTS = {
    "4 evaluations": SamplerConfig(kind="consistency", num_steps=4),
    "2 evaluations": SamplerConfig(kind="consistency", num_steps=2, timesteps=(999, 300)),
    "1 evaluation": SamplerConfig(kind="consistency", num_steps=1),
}
_REVERSE_SAMPLES = (2, 5, 6)
_REVERSE_COLUMNS = 9


def emoji_figures(
    model: LoadedModel,
    student: LoadedModel,
    out_dir: Path,
    progress: Callable[[int, int], None] | None = None,
) -> list[Path]:
    """Draw all pictures into `out_dir` (made if need be) and return their paths.

    UserError for a model that guidance does not work with, and for a student that is none.
    """
    if student.card.distillation is None:
        raise UserError(f"{student.reference}: was not distilled; name a model that ddpm distill made")
    if model.card.net.num_classes is None or not model.card.net.null_class:
        raise UserError(f"{model.reference}: guidance needs a model with classes and net.null_class")
    # As a generation has it: sums, and with them the last bits, depend on the number.
    torch.set_num_threads(1)
    out_dir.mkdir(parents=True, exist_ok=True)
    drawings: dict[str, Callable[[LoadedModel], Pixels]] = {
        "classes": draw_classes,
        "guidance": draw_guidance,
        "steps": draw_steps,
        "few-steps": partial(draw_few_steps, student=student),
        "reverse": draw_reverse,
    }
    paths: list[Path] = []
    for name, draw in drawings.items():
        path = out_dir / f"{name}.png"
        Image.fromarray(draw(model)).quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
        paths.append(path)
        if progress is not None:
            progress(len(paths), len(drawings))
    return paths


def draw_classes(model: LoadedModel) -> Pixels:
    """The first twelve samples of each class, a class a row."""
    num_classes = model.card.net.num_classes or 1
    images = _samples(model, _SAMPLER, COLUMNS * num_classes)
    named = {class_name(c, model.class_names): images[c::num_classes] for c in range(num_classes)}
    return _rows(named)


def draw_guidance(model: LoadedModel) -> Pixels:
    """The first twelve samples at each guidance scale."""
    scales = {f"guidance {w:g}": _SAMPLER.model_copy(update={"guidance_scale": w}) for w in _GUIDANCE}
    return _rows({name: _samples(model, sampler, COLUMNS) for name, sampler in scales.items()})


def draw_steps(model: LoadedModel) -> Pixels:
    """The first twelve samples at each number of steps."""
    counts = {f"{n} steps": _SAMPLER.model_copy(update={"num_steps": n}) for n in _STEPS}
    return _rows({name: _samples(model, sampler, COLUMNS) for name, sampler in counts.items()})


def draw_few_steps(model: LoadedModel, student: LoadedModel) -> Pixels:
    """The first twelve samples by the model, and by its student with each number of evaluations."""
    by_student = {name: _samples(student, sampler, COLUMNS) for name, sampler in _STUDENTS.items()}
    evaluations = _SAMPLER.num_steps * 2  # with and without the class
    return _rows({f"teacher, {evaluations}": _samples(model, _SAMPLER, COLUMNS)} | by_student)


def draw_reverse(model: LoadedModel) -> Pixels:
    """The reverse process of three samples: x_t above, the image that the network sees in it below."""
    index = torch.tensor(_REVERSE_SAMPLES)
    labels = index % (model.card.net.num_classes or 1)
    seen: list[SamplerStep] = []
    size, channels = model.card.image.size, model.card.image.channels
    image = sample(
        model.net,
        NoiseSchedule.from_config(model.card.schedule),
        _SAMPLER,
        index,
        (channels, size, size),
        seed=0,
        class_labels=labels,
        objective=model.card.objective,
        on_step=seen.append,
    )
    states = [*[step.x for step in seen], image]
    guesses = [*[step.x0 for step in seen], image]
    chosen = np.linspace(0, len(states) - 1, _REVERSE_COLUMNS).round().astype(int).tolist()
    rows: list[list[Pixels]] = []
    for row in range(len(index)):
        rows += [
            [to_uint8(part[k][row]).permute(1, 2, 0).numpy() for k in chosen] for part in (states, guesses)
        ]
    return image_grid(rows, ["x_t", "x_0 seen in it"] * len(index))


def _samples(model: LoadedModel, sampler: SamplerConfig, count: int) -> Pixels:
    """The first samples of seed 0, uint8 (count, H, W, C)."""
    return model.sample(count, sampler=sampler, batch_size=min(count, 36))


def _rows(named: Mapping[str, Pixels]) -> Pixels:
    return image_grid(*labelled_rows([(name, list(images)) for name, images in named.items()], COLUMNS))


def main(
    model: Annotated[
        str, typer.Argument(help="`name@alias`, `name/version` or a folder.")
    ] = "emoji-32@champion",
    student: Annotated[
        str, typer.Argument(help="Its student, named like the model.")
    ] = "emoji-fast@champion",
    folder: Annotated[Path, typer.Argument(help="Folder to write to.")] = IMAGES,
) -> None:
    """Draw every image."""
    with progress_of("figures", "images") as progress:
        paths = emoji_figures(load_model(model), load_model(student), folder, progress)
    for path in paths:
        echo(f"drew     {path}")


if __name__ == "__main__":
    typer.run(main)
