"""The picture of an evaluation: samples beside the reference images nearest to them.

With few training images the question is whether a model has learned or memorized them; people answer it by looking.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from ddpm_pipeline.data.formats.contact_sheet import CELL_PIXELS, scaled
from ddpm_pipeline.data.formats.images import to_pillow
from ddpm_pipeline.data.formats.npy import Pixels
from ddpm_pipeline.evaluate.nearest_reference import NearestReference
from ddpm_pipeline.features.feature_set import FeatureSet

PER_BLOCK = 24
"""Pairs of each of the two blocks."""
_COLUMNS = 6
_GAP, _MARGIN, _LINE = 10, 12, 20
_RED = "#b00020"
_LEGEND = (
    "Left: sample. Right: its nearest reference image. Below: index of the sample, distance in levels.",
    "Red: a near copy, nearer than {limit:.1f}.",
)


@dataclass(frozen=True)
class Pair:
    """A sample and its nearest reference image."""

    index: int
    """Of the sample, in its generation."""
    distance: float
    sample: Pixels
    reference: Pixels
    is_near_copy: bool


def neighbour_rows(distances: npt.NDArray[np.float64]) -> tuple[list[int], list[int]]:
    """Rows of the samples that are shown, by ascending distance: the nearest, and some at equal steps through the rest,
    the last of which is the farthest.
    """
    order = np.argsort(distances, kind="stable")
    rest = order[PER_BLOCK:]
    places = np.linspace(0, len(rest) - 1, min(PER_BLOCK, len(rest))).round().astype(int)
    return order[:PER_BLOCK].tolist(), rest[places].tolist()


def draw_neighbours(
    samples: FeatureSet, reference: FeatureSet, nearest: NearestReference, channels: int, first_index: int
) -> Pixels:
    """The picture, uint8 (H, W, 3). The images are square and are shown as they are compared: with an edge of at most
    32 pixels, enlarged by a whole factor.

    `first_index` is the index of the first sample in its generation.
    """

    def pair(row: int) -> Pair:
        distance = float(nearest.distances[row])
        return Pair(
            first_index + row,
            distance,
            _pixels(samples.thumbnails[row], channels),
            _pixels(reference.thumbnails[nearest.rows[row]], channels),
            distance < nearest.limit,
        )

    closest, spread = neighbour_rows(nearest.distances)
    blocks = [("The samples nearest to a reference image, nearest first", [pair(row) for row in closest])]
    if spread:
        blocks.append(
            (
                "Of the other samples, some at equal steps from nearest to farthest",
                [pair(row) for row in spread],
            )
        )
    return _sheet(blocks, nearest.limit)


def _pixels(thumbnail: npt.NDArray[np.uint8], channels: int) -> Pixels:
    """A thumbnail (P,), stored as (channels, edge, edge), enlarged to (h, w, channels)."""
    edge = math.isqrt(len(thumbnail) // channels)
    return scaled(thumbnail.reshape(channels, edge, edge).transpose(1, 2, 0), CELL_PIXELS)


def _sheet(blocks: Sequence[tuple[str, Sequence[Pair]]], limit: float) -> Pixels:
    cell = blocks[0][1][0].sample.shape[0]
    pair_width, pair_height = 2 * cell + 2, cell + _LINE
    height = 2 * _MARGIN + len(_LEGEND) * _LINE
    for _, pairs in blocks:
        height += _MARGIN + _LINE + -(-len(pairs) // _COLUMNS) * (pair_height + _GAP)
    width = 2 * _MARGIN + _COLUMNS * (pair_width + _GAP) - _GAP
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(14)
    top = _MARGIN
    for line in _LEGEND:
        draw.text((_MARGIN, top), line.format(limit=limit), "black", font)
        top += _LINE
    for title, pairs in blocks:
        top += _MARGIN
        draw.text((_MARGIN, top), title, "black", font)
        top += _LINE
        for place, pair in enumerate(pairs):
            left = _MARGIN + place % _COLUMNS * (pair_width + _GAP)
            y = top + place // _COLUMNS * (pair_height + _GAP)
            sheet.paste(to_pillow(pair.sample), (left, y))
            sheet.paste(to_pillow(pair.reference), (left + cell + 2, y))
            color = _RED if pair.is_near_copy else "black"
            draw.text((left, y + cell + 2), f"{pair.index}: {pair.distance:.1f}", color, font)
        top += -(-len(pairs) // _COLUMNS) * (pair_height + _GAP)
    return np.asarray(sheet)
