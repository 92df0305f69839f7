"""Commands about data sets."""

from pathlib import Path
from typing import Annotated

import typer

from ddpm_pipeline.jobs.cli.options import (
    DATA,
    AsJson,
    Config,
    DryRun,
    Words,
    end,
    end_job,
    examples,
    read_local_path,
)

app = typer.Typer()
LabelField = Annotated[str | None, typer.Option(help="Field of a sample's json that holds its class.")]


@app.command(
    rich_help_panel=DATA,
    epilog=examples(
        "ddpm pack digits",
        "ddpm pack cifar10 dest=data/cifar10",
        "ddpm pack source=photos.zip dest=s3://ddpm/data/photos image_size=64",
        "ddpm pack source=https://example.org/photos.tar.gz dest=s3://ddpm/data/photos image_size=64",
    ),
)
def pack(
    words: Words = None,
    config: Config = None,
    dry_run: DryRun = False,
    json: AsJson = False,
    list_: Annotated[
        bool, typer.Option("--list", help="Print the well-known data sets that are fetched by name.")
    ] = False,
) -> None:
    """Pack images (folders, archives, parquet, arrays; on disk, in S3, on the web) into shards."""
    from ddpm_pipeline.jobs.pack import list_datasets, run_call

    if list_:
        end(list_datasets)
    end_job(run_call, words, config, dry_run, json)


@app.command(
    rich_help_panel=DATA,
    epilog=examples(
        "ddpm index s3://bucket/set",
        "ddpm index 's3://bucket/set/train-{000..099}.tar' --pixels",
        "ddpm index /mnt/read-only/set --dest indexes/set",
    ),
)
def index(
    uri: Annotated[str, typer.Argument(help="Prefix or brace pattern of .tar or .tar.gz shards.")],
    label_field: LabelField = None,
    pixels: Annotated[
        bool, typer.Option("--pixels", help="Decode every image, for channel statistics.")
    ] = False,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Also read shards whose size and tag are unchanged.")
    ] = False,
    image: Annotated[
        str | None,
        typer.Option("--image", help="Extension of the image to use, if samples have several."),
    ] = None,
    skip_unreadable: Annotated[
        bool, typer.Option("--skip-unreadable", help="Skip images that cannot be read, and name them.")
    ] = False,
    dest: Annotated[
        str | None,
        typer.Option(
            "--dest", help="Where the index goes. Default: beside the shards, which need write access."
        ),
    ] = None,
) -> None:
    """Make the index of existing WebDataset tars."""
    from ddpm_pipeline.jobs.dataset import index as run

    end(lambda: run(uri, label_field, pixels, fresh, image, skip_unreadable, dest))


@app.command(
    rich_help_panel=DATA,
    epilog=examples(
        "ddpm inspect s3://ddpm/data/digits --sheet digits.png", "ddpm inspect look/000000000000.png"
    ),
)
def inspect(
    uri: Annotated[str, typer.Argument(help="Prefix or brace pattern of shards; or a .png or .webp file.")],
    sheet: Annotated[
        Path, typer.Option(help="File for a contact sheet.", metavar="FILE", parser=read_local_path)
    ] = Path("inspection.png"),
    label_field: LabelField = None,
    json: AsJson = False,
) -> None:
    """Print what a data set contains and what is damaged in it; of an image, whether it says that a model made it."""
    from ddpm_pipeline.jobs.dataset import inspect_dataset
    from ddpm_pipeline.jobs.image_origin import inspect_image, is_image

    end(lambda: inspect_image(uri, json) if is_image(uri) else inspect_dataset(uri, sheet, label_field, json))
