"""Data set jobs: indexing existing tars, and inspecting data sets."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from ddpm_pipeline.data.index import Index
from ddpm_pipeline.data.packing.build_index import plan_index
from ddpm_pipeline.data.packing.inspect_dataset import inspect
from ddpm_pipeline.errors import UserError
from ddpm_pipeline.jobs.progress_bar import progress_of
from ddpm_pipeline.jobs.ray_map import ray_map_for
from ddpm_pipeline.jobs.runner import DONE, FAILED
from ddpm_pipeline.telemetry.terminal import echo, echo_json

_SHOWN = 20
ENOUGH_SHARDS = 16
"""From this number of shards to read on, connecting to a cluster is worth the seconds it takes."""


def index(
    uri: str,
    label_field: str | None,
    pixels: bool,
    fresh: bool = False,
    image: str | None = None,
    skip_unreadable: bool = False,
    dest: str | None = None,
) -> int:
    """Index the tars at a prefix or pattern, in one pass over each tar that the existing index does not cover.

    The index is written to `dest`, if given.
    `fresh` reads all of them. Runs on the cluster that RAY_ADDRESS names, if it is set and there are enough shards.
    """
    with progress_of("index", "shards") as progress:
        found = plan_index(
            uri,
            label_field=label_field,
            pixels=pixels,
            reuse=not fresh,
            image=image,
            skip_unreadable=skip_unreadable,
            dest=dest,
        )
        with ray_map_for(
            len(found.to_scan), ENOUGH_SHARDS, local_paths=not found.location.root.startswith("s3:")
        ) as spread:
            made = found.build(spread, progress)
    echo(f"indexed: {made.num_samples:,} samples in {len(made.shards):,} shards, digest {made.digest[:12]}")
    if found.reused:
        echo(f"known    {len(found.reused):,} shards, unchanged by size and tag; {len(found.to_scan):,} read")
    echo(f"classes  {_classes(made)}")
    for line in (*found.notes, *_left_out(made)):
        echo(line)
    if made.shards_uri is not None:
        echo(f"index    {made.uri}, of the shards at {made.shards_uri}")
    echo(f"next     ddpm train data.uri={made.uri} …   or   ddpm inspect {made.uri}")
    return DONE


def _classes(made: Index) -> str:
    if not made.labelled:
        return "none: no sample has a label"
    return f"{made.num_classes:,}, " + (", ".join((made.class_names or ())[:_SHOWN]) or "without names")


def _left_out(made: Index) -> Iterator[str]:
    """Lines on what is in the tars but not in the index."""
    ignored = sum(shard.ignored_members for shard in made.shards)
    if ignored:
        yield f"ignored  {ignored:,} files and samples without an image"
    skipped = sum(shard.num_skipped for shard in made.shards)
    if skipped:
        yield f"skipped  {skipped:,} samples whose image cannot be read:"
        named = [name for shard in made.shards for name in shard.skipped]
        yield from (f"         {name}" for name in named[:_SHOWN])


def inspect_dataset(uri: str, sheet: Path, label_field: str | None, as_json: bool) -> int:
    """Read a whole data set and report its contents; exit code 1 for damage.

    UserError, before anything is read, when the contact sheet cannot be written to `sheet`.
    """
    if not sheet.parent.is_dir():
        raise UserError(f"--sheet {sheet}: folder {sheet.parent} does not exist; create it, or name another")
    if sheet.suffix.lower() not in Image.registered_extensions():
        raise UserError(f"--sheet {sheet}: {sheet.suffix or 'no suffix'} is no kind of image; end it in .png")
    with progress_of("inspect", "shards") as progress:
        found = inspect(uri, label_field=label_field, progress=progress)
    Image.fromarray(found.contact_sheet).save(sheet)
    if as_json:
        facts = dataclasses.asdict(dataclasses.replace(found, contact_sheet=found.contact_sheet[:0]))
        del facts["contact_sheet"]
        echo_json(facts)
        return FAILED if found.damage else DONE
    echo(f"samples  {found.num_samples:,} in {found.num_shards:,} shards, {found.size_bytes:,} bytes")
    echo(f"index    {found.index_digest or 'none'}")
    echo(f"shapes   {_counts(found.shapes)}")
    echo(f"classes  {_counts(found.classes) if found.classes else 'none'}")
    if found.channel_mean and found.channel_std:
        echo(f"mean     {_rounded(found.channel_mean)}   std {_rounded(found.channel_std)}   (0..255)")
    for line in found.damage[:_SHOWN]:
        echo(f"damaged  {line}")
    if len(found.damage) > _SHOWN:
        echo(f"         … {len(found.damage) - _SHOWN:,} more")
    echo(f"image  {sheet}")
    return FAILED if found.damage else DONE


def _counts(counts: dict[str, int]) -> str:
    shown = [f"{name}: {count:,}" for name, count in list(counts.items())[:_SHOWN]]
    return ", ".join(shown) + (" …" if len(counts) > _SHOWN else "")


def _rounded(values: list[float]) -> str:
    return ", ".join(f"{value:.1f}" for value in values)
