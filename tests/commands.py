"""The command line, run in the process of a test."""

import typer.main

from ddpm_pipeline.jobs.cli import app


def ddpm(*words: str) -> int:
    """Run `ddpm WORDS` as a process would; returns its exit code."""
    try:
        typer.main.get_command(app)(list(words))
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0
    raise AssertionError("the command did not say how it ended")
