"""A second generation beside the first, image by image: both began with the same noise."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ddpm_pipeline.errors import UserError
from ddpm_pipeline.generate.gallery.cells import Cells, read_cells, source_shards
from ddpm_pipeline.generate.prefix_spec import open_generation
from ddpm_pipeline.generate.spec import Spec
from ddpm_pipeline.generate.stored_generation import Generation
from ddpm_pipeline.progress import Progress


@dataclass(frozen=True)
class Beside:
    """The images of the second generation, in the rows of the first's."""

    pixels: npt.NDArray[np.uint8]
    """(N, h, w, C); black where there is none."""
    is_made: npt.NDArray[np.bool_]
    """(N,): whether the image is stored already."""
    differences: npt.NDArray[np.float64]
    """(N,): mean absolute difference of the shown values, in levels."""


def open_beside(spec: Spec, prefix: str, beside: str) -> Generation:
    """The generation at `beside`. UserError unless it has the seed, indexes, classes and image shape of `spec`."""
    generation = open_generation(beside)
    other = generation.spec
    facts = {
        "seeds": (spec.seed, other.seed),
        "indexes": (_indexes(spec), _indexes(other)),
        "classes": (_classes(spec), _classes(other)),
        "shapes": (_shape(spec), _shape(other)),
    }
    for name, (mine, theirs) in facts.items():
        if mine != theirs:
            raise UserError(
                f"--beside {beside}: its {name} are not those of {prefix} ({theirs}, not {mine}), so it is not from "
                "the same noise; generate it with the same settings"
            )
    return generation


def read_beside(generation: Generation, cells: Cells, scratch: Path, progress: Progress) -> Beside:
    """The images of `generation` that `cells` shows, as far as they are stored. UserError where none is."""
    folder = scratch / "beside"
    folder.mkdir()
    reach = int(cells.indexes[-1]) + 1 - generation.spec.first_index
    found = read_cells(generation, source_shards(generation, reach), folder, progress)
    _, rows, other_rows = np.intersect1d(
        cells.indexes, found.indexes, assume_unique=True, return_indices=True
    )
    pixels = np.lib.format.open_memmap(folder / "aligned.npy", "w+", dtype=np.uint8, shape=cells.pixels.shape)
    is_made = np.zeros(len(cells.indexes), np.bool_)
    differences = np.zeros(len(cells.indexes))
    is_made[rows] = True
    for row, other_row in zip(rows.tolist(), other_rows.tolist(), strict=True):
        pixels[row] = found.pixels[other_row]
        differences[row] = np.abs(cells.pixels[row].astype(np.int16) - pixels[row]).mean()
    return Beside(pixels, is_made, differences)


def _indexes(spec: Spec) -> str:
    return f"{spec.first_index} to {spec.first_index + spec.count - 1}"


def _classes(spec: Spec) -> str:
    if spec.classes is None:
        return "none"
    labels = ", ".join(map(str, spec.classes.labels[:10])) + (", …" if len(spec.classes.labels) > 10 else "")
    return labels if spec.classes.weights is None else f"{labels} with weights {spec.classes.weights[:10]}"


def _shape(spec: Spec) -> str:
    return f"{spec.channels}x{spec.size}x{spec.size}"
