"""`ddpm`: the command line over the jobs and the local stack. A module for each heading of `ddpm --help`."""

import typer

from jobs.cli import cluster, data, machine, models, nights, samples
from jobs.shell import DONE, REFUSED, guarded, use_running_stack

app = typer.Typer(
    name="ddpm",
    help="Train diffusion models on a Ray cluster, and fill buckets with verified samples.",
    epilog="First steps:  ddpm up  ·  ddpm pack digits  ·  ddpm train digits  ·  ddpm generate digits",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
for _part in (data, models, samples, nights, cluster, machine):
    app.add_typer(_part.app)


def main() -> None:
    """The `ddpm` program."""
    if guarded(_with_stack) != DONE:
        raise SystemExit(REFUSED)
    app()


def _with_stack() -> int:
    use_running_stack()
    return DONE
