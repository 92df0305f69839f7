"""`ddpm`: the command line over the jobs and the local stack. A module for each heading of `ddpm --help`."""

import os
from typing import Annotated

import typer

from ddpm_pipeline import __version__
from ddpm_pipeline.jobs.cli import cluster, datasets, keys, machine, models, nightly_runs, sampling
from ddpm_pipeline.jobs.runner import DONE, REFUSED, handle_errors, use_running_stack
from ddpm_pipeline.telemetry.logs import FORM_VARIABLE, JSON
from ddpm_pipeline.telemetry.terminal import echo

app = typer.Typer(
    name="ddpm",
    help="Train diffusion models on a Ray cluster, and fill buckets with verified samples.",
    epilog="First steps:  ddpm up  ·  ddpm pack digits  ·  ddpm train digits  ·  ddpm generate digits",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
for _part in (datasets, models, sampling, keys, nightly_runs, cluster, machine):
    app.add_typer(_part.app)


def _print_version(asked: bool) -> None:
    if asked:
        echo(f"{app.info.name} {__version__}")
        raise typer.Exit


@app.callback()
def options(
    log_json: Annotated[
        bool,
        typer.Option("--log-json", help=f"Log and report progress as JSON lines ({FORM_VARIABLE}={JSON})."),
    ] = False,
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_print_version),
    ] = False,
) -> None:
    """Options of every command; they precede its name."""
    if log_json:
        os.environ[FORM_VARIABLE] = JSON


def main() -> None:
    """The `ddpm` program."""
    if handle_errors(_with_stack) != DONE:
        raise SystemExit(REFUSED)
    # not app(): that puts an excepthook of Typer's in place of ours, which masks secrets
    typer.main.get_command(app)()


def _with_stack() -> int:
    use_running_stack()
    return DONE
