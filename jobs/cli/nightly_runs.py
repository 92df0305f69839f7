"""Commands of the nightly job."""

from typing import Annotated

import typer

from ddpm_pipeline.jobs.cli.options import (
    NIGHTS,
    AsJson,
    Config,
    DryRun,
    First,
    Last,
    Words,
    end_job,
    examples,
)

app = typer.Typer()


@app.command(
    rich_help_panel=NIGHTS,
    epilog=examples("ddpm nightly digits", "ddpm nightly digits --from 2026-03-01 --to 2026-03-03"),
)
def nightly(
    words: Words = None,
    config: Config = None,
    first: First = None,
    last: Last = None,
    dry_run: DryRun = False,
    json: AsJson = False,
) -> None:
    """Generate, measure and record the nights that are due, with the champion. Does nothing when all are done."""
    from ddpm_pipeline.jobs.nightly import run_call

    end_job(lambda call: run_call(call, first, last), words, config, dry_run, json)


@app.command(
    rich_help_panel=NIGHTS,
    epilog=examples("ddpm schedule digits", "ddpm schedule digits --at 02:00 --now"),
)
def schedule(
    words: Words = None,
    config: Config = None,
    at: Annotated[str, typer.Option(help="Time of day, HH:MM in UTC.")] = "02:00",
    now: Annotated[bool, typer.Option("--now", help="Also run once at the start.")] = False,
    catch_up: Annotated[
        bool, typer.Option("--catch-up", help="Run at the start if a night since the latest was missed.")
    ] = False,
) -> None:
    """Run the nightly job every night, in the foreground, until stopped."""
    from ddpm_pipeline.jobs.nightly_schedule import schedule as run

    end_job(lambda call: run(call, at, now, catch_up), words, config)
