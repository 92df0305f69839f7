"""Makes a gallery: reads the generation, compares, writes sheets and pages, and the first page last.

Where the first page exists, all that it leads to exists. Sheets are named by their content, so a gallery that is made
again, after an interruption or of a generation that has grown, writes only the sheets that are new.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from ddpm_pipeline.config.base import Settings
from ddpm_pipeline.config.bounds import Sha256
from ddpm_pipeline.config.evaluation import EvaluateConfig
from ddpm_pipeline.config.json_document import parse_document
from ddpm_pipeline.data.formats.contact_sheet import MAX_CELL_PIXELS
from ddpm_pipeline.data.index import Index, load_index
from ddpm_pipeline.errors import UserError
from ddpm_pipeline.generate.class_names import class_name
from ddpm_pipeline.generate.completeness import check_complete
from ddpm_pipeline.generate.gallery.beside import Beside, open_beside, read_beside
from ddpm_pipeline.generate.gallery.cells import Cells, read_cells, source_shards
from ddpm_pipeline.generate.gallery.pages import (
    INDEX_KEY,
    PER_PAGE,
    About,
    Group,
    Neighbour,
    PageSheets,
    Rows,
    Tile,
    about_generation,
    groups_of,
    make_tile,
    render_gallery_page,
)
from ddpm_pipeline.generate.gallery.sheets import COLUMNS, Sheet, make_sheet
from ddpm_pipeline.generate.prefix_spec import open_generation
from ddpm_pipeline.generate.spec import Spec, pretty
from ddpm_pipeline.generate.stored_generation import Generation
from ddpm_pipeline.parallel import thread_map
from ddpm_pipeline.progress import Progress, no_progress
from ddpm_pipeline.store import FileStore, ObjectMissing, Store, open_store

if TYPE_CHECKING:
    from ddpm_pipeline.features.training_neighbours import TrainingNeighbours

GALLERY_KEY = "gallery.json"
MAX_IMAGES = 50_000
"""Images of a gallery unless more are asked for: the first ones by index."""
_WRITERS = 4
_OURS = re.compile(r"sheets/[0-9a-f]{24}\.webp|(all|class-\d+|closest|differing)-\d{4,}\.html")


class GalleryDocument(Settings):
    """Content of `gallery.json`: whose gallery lies there. Written before everything else."""

    format: Literal[1] = 1
    """Version of the layout of a gallery."""
    spec_digest: Sha256
    """Digest of the generation's spec."""


@dataclass(frozen=True)
class Gallery:
    """A gallery that was made."""

    uri: str
    num_images: int
    num_pages: int
    sheets_written: int
    sheets_kept: int
    """Sheets that were there already."""
    state: str
    """Of the generation."""


def make_gallery(
    prefix: str,
    out: str,
    *,
    beside: str | None = None,
    data: str | None = None,
    model: str | None = None,
    limit: int = MAX_IMAGES,
    progress: Progress = no_progress,
) -> Gallery:
    """A gallery of the first `limit` images of the generation at `prefix`, finished or in progress, at `out`.

    `beside` is a generation from the same noise; `data` is what the model was trained on, in which the nearest image to
    each sample is looked for; `model` names the network of a generation whose model came from a folder. Progress counts
    images, or pages while they are written. UserError, before anything is written, for what does not fit together.
    """
    generation = open_generation(prefix)
    other = None if beside is None else open_beside(generation.spec, prefix, beside)
    reference = None if data is None else _Reference.open(generation.spec, data, model)
    store = _open_out(generation, other, out)
    proof = check_complete(generation)
    shards = source_shards(generation, limit)
    images_done = sum(generation.shard(number).count for number in generation.listing().done())
    _claim(store, generation.spec)
    names = proof.manifest.class_names if proof.manifest is not None else None
    names = reference.class_names if names is None and reference is not None else names
    with tempfile.TemporaryDirectory(prefix="ddpm-gallery-") as scratch:
        cells = read_cells(generation, shards, Path(scratch), progress, with_small=reference is not None)
        about = about_generation(
            cells, generation.uri, images_done, model, proof.complete, None if other is None else other.spec
        )
        content = GalleryContent(
            cells,
            names,
            None if other is None else read_beside(other, cells, Path(scratch), progress),
            None if reference is None else reference.neighbours(cells, progress),
        )
        if reference is not None:
            about = replace(about, near_copy=reference.near_copy)
        writer = _Writer(store, about, content)
        writer.write(progress)
    return Gallery(
        store.uri,
        len(cells.indexes),
        writer.num_pages,
        writer.sheets_written,
        writer.sheets_kept,
        about.state,
    )


@dataclass(frozen=True)
class _Reference:
    """What a model was trained on."""

    index: Index
    class_names: tuple[str, ...] | None
    config: EvaluateConfig

    @classmethod
    def open(cls, spec: Spec, data: str, model: str | None) -> _Reference:
        from ddpm_pipeline.features.training_neighbours import require_training_data  # imports torch
        from ddpm_pipeline.generate.model_source import find_model_of

        card = find_model_of(spec, model).card
        index = load_index(data)
        require_training_data(index, card, spec.model.reference or model or spec.model.name)
        return cls(index, card.class_names, EvaluateConfig(reference=data))

    @property
    def near_copy(self) -> str:
        share = f"{100 * (1 - self.config.copy_quantile):.4g}%"
        return f"A near copy: nearer than {share} of the real images are to their nearest real neighbor."

    def neighbours(self, cells: Cells, progress: Progress) -> TrainingNeighbours:
        from ddpm_pipeline.features.training_neighbours import training_neighbours

        assert cells.small is not None
        return training_neighbours(
            cells.small,
            self.index,
            shown_edge=MAX_CELL_PIXELS,
            copy_quantile=self.config.copy_quantile,
            max_images=self.config.max_images,
            progress=progress,
        )


@dataclass(frozen=True)
class GalleryContent:
    """All images of a gallery, with what is shown beside them."""

    cells: Cells
    class_names: tuple[str, ...] | None
    beside: Beside | None
    neighbours: TrainingNeighbours | None

    def groups(self) -> list[Group]:
        """All images, those that stand out, and those of each class."""
        groups = groups_of(self.cells, self.class_names)
        found: list[Group] = []
        if self.neighbours is not None:
            order = np.argsort(self.neighbours.distances[:, 0], kind="stable")
            note = "The images that are nearest to a training image, nearest first."
            found.append(Group("closest", "nearest to training images", order[:PER_PAGE], note))
        if self.beside is not None:
            made = np.flatnonzero(self.beside.is_made)
            order = made[np.argsort(-self.beside.differences[made], kind="stable")]
            note = "The pairs that differ most, by the mean difference of their values."
            found.append(Group("differing", "most different", order[:PER_PAGE], note))
        return [groups[0], *(group for group in found if len(group.rows)), *groups[1:]]

    def tile(self, row: int, place: int) -> Tile:
        """The image of a row, at a place of its page."""
        difference = None
        if self.beside is not None:
            made = bool(self.beside.is_made[row])
            difference = f"{self.beside.differences[row]:.2f} levels on average" if made else ""
        return make_tile(
            self.cells,
            row,
            place,
            self.class_names,
            difference,
            list(self._neighbours(row)),
            self.neighbours is not None and bool(self.neighbours.distances[row, 0] < self.neighbours.limit),
        )

    def sheets(self, rows: Rows) -> PageSheets:
        """The sheets of the images of these rows."""
        lossless = self.cells.is_native
        return PageSheets(
            make_sheet(self.cells.pixels[rows], lossless),
            None if self.beside is None else make_sheet(self.beside.pixels[rows], lossless),
            None if self.neighbours is None else self._near_sheet(self.neighbours, rows, lossless),
        )

    def _near_sheet(self, near: TrainingNeighbours, rows: Rows, lossless: bool) -> Sheet:
        """One block of rows for the nearest images, one below it for the second nearest, and so on."""
        block = -(-len(rows) // COLUMNS) * COLUMNS
        num = near.rows.shape[1]
        grid = np.zeros((num, block, *self.cells.pixels.shape[1:]), np.uint8)
        for place, row in enumerate(rows):
            for rank in range(num):
                grid[rank, place] = near.images[int(near.rows[row, rank])].pixels
        return make_sheet(grid.reshape(num * block, *grid.shape[2:]), lossless)

    def _neighbours(self, row: int) -> Iterator[Neighbour]:
        if self.neighbours is None:
            return
        for number, distance in zip(
            self.neighbours.rows[row].tolist(), self.neighbours.distances[row].tolist(), strict=True
        ):
            image = self.neighbours.images[number]
            label = "" if image.label is None else f"class {class_name(image.label, self.class_names)}"
            yield Neighbour(_one_line(image.name), _one_line(label), f"{distance:.1f}")


class _Writer:
    """Writes the pages of a gallery and their sheets."""

    def __init__(self, store: Store, about: About, content: GalleryContent) -> None:
        self._store, self._about, self._content = store, about, content
        self._groups = content.groups()
        self._written = {INDEX_KEY, GALLERY_KEY}
        self.num_pages = sum(group.num_pages for group in self._groups)
        self._sheets: dict[str, bool] = {}

    @property
    def sheets_written(self) -> int:
        """Sheets that this writer stored."""
        return sum(self._sheets.values())

    @property
    def sheets_kept(self) -> int:
        """Sheets that were stored already."""
        return len(self._sheets) - self.sheets_written

    def write(self, progress: Progress) -> None:
        """All pages, the first one last; then deletes those of an earlier, smaller gallery."""
        pages = [(group, number) for group in self._groups for number in range(1, group.num_pages + 1)]
        first = b""
        for done, (key, page) in enumerate(thread_map(_WRITERS)(self._page, pages), 1):
            if key == INDEX_KEY:
                first = page
            else:
                self._store.write(key, page)
                self._written.add(key)
            progress(done, len(pages), "writing pages")
        self._store.write(INDEX_KEY, first)
        for info in list(self._store.list()):
            if _OURS.fullmatch(info.key) and info.key not in self._written | self._sheets.keys():
                self._store.delete(info.key)

    def _page(self, page: tuple[Group, int]) -> tuple[str, bytes]:
        """The key and the HTML of a page, whose sheets are stored first."""
        group, number = page
        rows = group.page_rows(number)
        sheets = self._content.sheets(rows)
        for sheet in (sheets.images, sheets.beside, sheets.near):
            if sheet is not None:
                self._store_sheet(sheet)
        tiles = [self._content.tile(row, place) for place, row in enumerate(rows.tolist())]
        html = render_gallery_page(
            self._about, self._groups, group, number, tiles, sheets, self._content.cells
        )
        return group.page_key(number), html

    def _store_sheet(self, sheet: Sheet) -> None:
        if sheet.key in self._sheets:
            return
        is_new = self._store.stat(sheet.key) is None
        if is_new:
            self._store.write(sheet.key, sheet.encode())
        self._sheets[sheet.key] = is_new


def _open_out(generation: Generation, other: Generation | None, out: str) -> Store:
    """The store of a gallery. UserError where it would lie among the objects of a generation."""
    store = open_store(out)
    for one in (generation, other):
        if one is not None and f"{store.uri}/".startswith(f"{one.uri}/"):
            raise UserError(f"--out {out}: lies inside the generation {one.uri}; choose a folder beside it")
    if isinstance(store, FileStore):
        store.create_container()
    store.require_container()
    return store


def _claim(store: Store, spec: Spec) -> None:
    """Make the place that of this generation's gallery. UserError if it holds anything else."""
    try:
        data = store.read(GALLERY_KEY)
    except ObjectMissing:
        other = next((info.key for info in store.list()), None)
        if other is not None:
            raise UserError(f"{store.uri}: already holds {other}; choose an empty folder by --out") from None
        document = GalleryDocument(spec_digest=spec.digest)
        store.write(GALLERY_KEY, pretty(document.model_dump(mode="json")))
        return
    found = parse_document(GalleryDocument, data, f"{store.uri}/{GALLERY_KEY}", "that of a gallery")
    if found.spec_digest != spec.digest:
        raise UserError(
            f"{store.uri}: holds the gallery of another generation; choose another folder by --out"
        )


def _one_line(text: str) -> str:
    return " ".join(text.split())
