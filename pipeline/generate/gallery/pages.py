"""The pages of a gallery: which images each shows, and its HTML."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ddpm_pipeline.data.formats.contact_sheet import CELL_PIXELS, MAX_CELL_PIXELS
from ddpm_pipeline.generate.class_names import class_name
from ddpm_pipeline.generate.gallery.cells import NO_LABEL, Cells
from ddpm_pipeline.generate.gallery.sheets import COLUMNS, SCALED_QUALITY, Sheet
from ddpm_pipeline.generate.redraw import common_words, network_call, own_words
from ddpm_pipeline.generate.spec import Spec
from ddpm_pipeline.html_page import render_page

PER_PAGE = 256
INDEX_KEY = "index.html"
_MAX_NAV = 40
"""With more classes than this, only the first page lists them."""
Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Group:
    """Images that are paged together: all, those of one class, or those that stand out."""

    key: str
    title: str
    rows: Rows
    """(n,): rows of the cells, in the order shown."""
    note: str = ""

    @property
    def num_pages(self) -> int:
        """Number of its pages."""
        return max(1, math.ceil(len(self.rows) / PER_PAGE))

    def page_key(self, number: int) -> str:
        """Key of page `number`, from 1. The first page of all images is the gallery's index."""
        return INDEX_KEY if (self.key, number) == ("all", 1) else f"{self.key}-{number:04d}.html"

    def page_rows(self, number: int) -> Rows:
        """The rows shown on page `number`."""
        return self.rows[(number - 1) * PER_PAGE : number * PER_PAGE]


@dataclass(frozen=True)
class Neighbour:
    """A training image beside a sample."""

    name: str
    class_name: str
    distance: str


@dataclass(frozen=True)
class Tile:
    """One image of a page."""

    index: int
    column: int
    row: int
    class_name: str | None
    call: str
    """Indexes that went through the network together."""
    command: str
    """The part of its command that is its own."""
    difference: str | None = None
    """From the image beside it; empty where that is not made yet; None without `--beside`."""
    neighbours: tuple[Neighbour, ...] = ()
    is_near_copy: bool = False


@dataclass(frozen=True)
class PageSheets:
    """The sheets of a page."""

    images: Sheet
    beside: Sheet | None = None
    near: Sheet | None = None
    """The training images nearest to each image, in rows of their own below each other."""


@dataclass(frozen=True)
class About:
    """What all pages of a gallery say."""

    title: str
    state: str
    complete: bool
    facts: dict[str, str]
    """Shown on the first page."""
    name: str
    """Of the generation, where another is beside it."""
    beside: str | None = None
    command: str = ""
    """The part of the command that all images share."""
    software: str = ""
    """With which the command gives the same bytes."""
    near_copy: str = ""
    """What an image marked as a near copy is."""


def describe(spec: Spec) -> str:
    """A generation in a few words."""
    version = "" if spec.model.version is None else f"/{spec.model.version}"
    sampler = spec.sampler
    guidance = "" if sampler.guidance_scale == 1.0 else f", guidance {sampler.guidance_scale:g}"
    return f"{spec.model.name}{version}, {sampler.kind}, {sampler.num_steps:,} steps{guidance}"


def about_generation(
    cells: Cells, source: str, images_done: int, model: str | None, complete: bool, beside: Spec | None
) -> About:
    """What the pages say of a generation of which `images_done` images are stored."""
    spec, shown = cells.spec, len(cells.indexes)
    version = "" if spec.model.version is None else f" version {spec.model.version}"
    software = sorted({shard.record.times.software for shard in cells.shards})
    state = "complete" if complete else f"in progress: {images_done:,} of {spec.count:,} images"
    size = f"{spec.channels} x {spec.size} x {spec.size}, {spec.image_format}"
    if not cells.is_native:
        size += f"; shown scaled down to {MAX_CELL_PIXELS} pixels, as WebP of quality {SCALED_QUALITY}"
    facts = {
        "generation": source,
        "spec digest": spec.digest,
        "state": state,
        "shown": f"{shown:,} images" + ("" if shown >= images_done else f", the first of {images_done:,}"),
        "weights": f"{spec.model.weights}, sha256 {spec.model.sha256}",
        "sampler": describe(spec).partition(", ")[2],
        "seed": str(spec.seed),
        "indexes": f"{spec.first_index} to {spec.first_index + spec.count - 1}",
        "images": size,
        "made with": "; ".join(software),
    }
    return About(
        title=f"{spec.count:,} samples of {spec.model.name}{version}",
        state=state,
        complete=complete,
        facts=facts,
        name=describe(spec),
        beside=None if beside is None else describe(beside),
        command=common_words(spec, model),
        software="; ".join(software),
    )


def groups_of(cells: Cells, names: tuple[str, ...] | None) -> list[Group]:
    """All images, and those of each class."""
    groups = [Group("all", "all", np.arange(len(cells.indexes)))]
    for label in np.unique(cells.labels).tolist():
        if label != NO_LABEL:
            rows = np.flatnonzero(cells.labels == label)
            groups.append(Group(f"class-{label}", class_name(label, names), rows))
    return groups


def runs(indexes: npt.NDArray[np.int64]) -> str:
    """Ascending indexes as runs, `0-374 500-999`."""
    ends = np.flatnonzero(np.diff(indexes) != 1)
    firsts = indexes[np.concatenate([[0], ends + 1])].tolist()
    lasts = indexes[np.concatenate([ends, [len(indexes) - 1]])].tolist()
    return " ".join(f"{first}-{last}" for first, last in zip(firsts, lasts, strict=True))


def make_tile(
    cells: Cells,
    row: int,
    place: int,
    names: tuple[str, ...] | None,
    difference: str | None,
    neighbours: Sequence[Neighbour],
    is_near_copy: bool,
) -> Tile:
    """The image of a row, at a place of its page."""
    spec, index, label = cells.spec, int(cells.indexes[row]), int(cells.labels[row])
    micro_batch = int(cells.micro_batches[row])
    call = network_call(spec, index, micro_batch)
    return Tile(
        index=index,
        column=place % COLUMNS,
        row=place // COLUMNS,
        class_name=None if label == NO_LABEL else class_name(label, names),
        call=f"{call.first} to {call.first + call.size - 1}",
        command=own_words(spec, index, micro_batch),
        difference=difference,
        neighbours=tuple(neighbours),
        is_near_copy=is_near_copy,
    )


def render_gallery_page(
    about: About,
    groups: Sequence[Group],
    group: Group,
    number: int,
    tiles: Sequence[Tile],
    sheets: PageSheets,
    cells: Cells,
) -> bytes:
    """Page `number` of a group."""
    edge = cells.pixels.shape[1]
    listed = groups if number == 1 and group.key == "all" else _near_navigation(groups, group)
    return render_page(
        "gallery.html",
        title=about.title,
        about=about,
        groups=listed,
        shortened=len(listed) < len(groups),
        group=group,
        number=number,
        is_first=group.page_key(number) == INDEX_KEY,
        tiles=tiles,
        sheets=sheets,
        columns=COLUMNS,
        edge=edge,
        factor=max(1, CELL_PIXELS // edge),
        pixelated=edge <= CELL_PIXELS,
        per_page=PER_PAGE,
        runs=runs(cells.indexes),
        seed=cells.spec.seed,
        pages=list(_page_links(group, number)),
    )


def _near_navigation(groups: Sequence[Group], group: Group) -> Sequence[Group]:
    """The groups that every page links to: all, or of very many only those that are no class, and the page's own."""
    if len(groups) <= _MAX_NAV:
        return groups
    return [one for one in groups if not one.key.startswith("class-") or one is group]


def _page_links(group: Group, number: int) -> Iterator[tuple[str, str]]:
    """(text, key) of the pages to link to: the first and the last, and those around the current one; "" for a gap."""
    near = {1, group.num_pages, *range(number - 2, number + 3)}
    last = 0
    for page in sorted(page for page in near if 1 <= page <= group.num_pages):
        if page > last + 1:
            yield "…", ""
        yield str(page), group.page_key(page)
        last = page
