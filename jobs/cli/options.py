"""What commands share: options, examples, exit."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.markup import escape

from ddpm_pipeline.config.bounds import local_path
from ddpm_pipeline.config.load import setting_names
from ddpm_pipeline.errors import UserError
from ddpm_pipeline.infra.local.stack_state import StoreKind
from ddpm_pipeline.jobs.runner import SECTIONS, JobArguments, handle_errors, presets

DATA, MODELS, SAMPLES, NIGHTS, CLUSTER, MACHINE = (
    "Data",
    "Models",
    "Samples",
    "Nights",
    "On a cluster",
    "This machine",
)
"""Headings of `ddpm --help`."""

SECTION_OF_COMMAND = {
    "tune-sampler": "tune",
    "schedule": "nightly",
}  # the others are called like their section


def complete_words(context: typer.Context, incomplete: str) -> list[str]:
    """For the shell: presets, and `name=` of every setting of the command's job."""
    name = context.info_name or ""
    parent = context.parent.info_name if context.parent else None
    section = "features" if parent == "features" else SECTION_OF_COMMAND.get(name, name)
    words = [*presets(), *(f"{setting}=" for setting in setting_names(SECTIONS[section]))]
    return [word for word in words if word.startswith(incomplete)]


Words = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="PRESET|KEY=VALUE",
        help="A preset, then settings that differ from it.",
        autocompletion=complete_words,
        show_default=False,
    ),
]
Config = Annotated[list[Path] | None, typer.Option("--config", "-c", help="YAML file; may be repeated.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the resolved settings and stop.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print as JSON.")]
Detach = Annotated[bool, typer.Option("--detach", "-d", help="Do not wait for the job.")]
First = Annotated[str | None, typer.Option("--from", help="First night, YYYY-MM-DD.")]
Last = Annotated[str | None, typer.Option("--to", help="Last night, YYYY-MM-DD.")]
Prefix = Annotated[str | None, typer.Option(help="Generation; without it, the preset's.")]
Against = Annotated[
    str | None, typer.Option(help="Another generation, evaluated under equal conditions, to show beside it.")
]
Store = Annotated[
    StoreKind | None, typer.Option(help="Object store of the stack; default: as before, initially s3.")
]


def examples(*lines: str) -> str:
    """A command's epilog: complete lines to copy, with markup escaped."""
    return "\n\n".join(["Examples:", *(escape(f"  {line}") for line in lines)])


def end(work: Callable[[], int]) -> NoReturn:
    """Run a command's work and exit with its code; a user's mistake becomes one line."""
    raise typer.Exit(handle_errors(work))


def read_local_path(text: str | Path) -> Path:
    """A path on this machine. The address of a bucket ends the command, with one line."""
    try:
        return Path(local_path(str(text)))
    except ValueError as error:
        mistake = UserError(str(error))

    def refuse() -> int:
        raise mistake

    end(refuse)


NewFolder = Annotated[
    Path,
    typer.Argument(help="Folder to write; new or empty.", metavar="FOLDER", parser=read_local_path),
]


def end_job(
    run_call: Callable[[JobArguments], int],
    words: Sequence[str] | None,
    config: Sequence[Path] | None,
    dry_run: bool = False,
    json: bool = False,
) -> NoReturn:
    """Sort the words into arguments, run the job, and exit with its code."""
    end(lambda: run_call(JobArguments.of(words or [], config or [], dry_run, json)))
