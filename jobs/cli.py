"""`ddpm`: the command line over the jobs and the local stack."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from infra.local.state import StoreKind
from jobs.shell import DONE, FAILED, LOCAL, Call, guarded, settings_of, use_running_stack
from pipeline.errors import UserError

app = typer.Typer(
    name="ddpm",
    help="Train diffusion models on a Ray cluster, and fill buckets with verified samples.",
    epilog="First steps:  ddpm up  ·  ddpm pack digits  ·  ddpm train digits  ·  ddpm generate digits",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
submit_app = typer.Typer(help="Run a job on the cluster that RAY_JOB_ADDRESS names.", no_args_is_help=True)
app.add_typer(submit_app, name="submit")

Words = Annotated[
    list[str] | None,
    typer.Argument(metavar="[PRESET] [KEY=VALUE]...", help="A preset, then settings that differ from it."),
]
Config = Annotated[list[Path] | None, typer.Option("--config", "-c", help="YAML file; may be repeated.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the resolved settings and stop.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print as JSON.")]
Detach = Annotated[bool, typer.Option("--detach", "-d", help="Do not wait for the job.")]
Store = Annotated[StoreKind | None, typer.Option(help="Object store of the stack; default: as before, first s3.")]


@app.command(epilog="Example:  ddpm pack digits   ·   ddpm pack source=photos.zip dest=s3://b/photos image_size=64")
def pack(words: Words = None, config: Config = None, dry_run: DryRun = False, json: AsJson = False) -> None:
    """Pack images (a folder, a zip, or the built-in digits) into shards."""
    from jobs.pack import run_call

    _end(lambda: run_call(Call.of(words or [], config or [], dry_run, json)))


@app.command(epilog="Example:  ddpm train digits steps=500 workers.num_workers=1")
def train(
    words: Words = None,
    config: Config = None,
    dry_run: DryRun = False,
    json: AsJson = False,
    local: Annotated[bool, typer.Option("--local", help="In this process, without Ray.")] = False,
) -> None:
    """Train a model on the Ray cluster and register it. Goes on where it was interrupted."""
    from jobs.train import run_call

    _end(lambda: run_call(Call.of(words or [], config or [], dry_run, json), alone=local))


@app.command(epilog="Example:  ddpm generate digits model=digits/3 count=5000 output=s3://ddpm/samples/five-thousand")
def generate(words: Words = None, config: Config = None, dry_run: DryRun = False, json: AsJson = False) -> None:
    """Fill an output prefix with samples of a registered model. Redoes only what is missing."""
    from jobs.generate import run_call

    _end(lambda: run_call(Call.of(words or [], config or [], dry_run, json)))


@submit_app.command("train", epilog="Example:  ddpm submit train digits")
def submit_train(
    words: Words = None, config: Config = None, dry_run: DryRun = False, detach: Detach = False
) -> None:
    """Submit a training and follow it; Ctrl-C detaches."""
    from pipeline.config.train import TrainConfig

    _submit("train", TrainConfig, Call.of(words or [], config or [], dry_run), detach)


@submit_app.command("generate", epilog="Example:  ddpm submit generate digits count=10000")
def submit_generate(
    words: Words = None, config: Config = None, dry_run: DryRun = False, detach: Detach = False
) -> None:
    """Submit a generation and follow it; Ctrl-C detaches."""
    from pipeline.config.generate import GenerateConfig

    _submit("generate", GenerateConfig, Call.of(words or [], config or [], dry_run), detach)
