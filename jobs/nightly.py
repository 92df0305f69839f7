"""The nightly job: `ddpm nightly digits`, and `ddpm nightly digits --from 2026-03-01 --to 2026-03-03`."""

import datetime as dt
from functools import partial

from ddpm_pipeline.config.nights import NightlyConfig
from ddpm_pipeline.errors import UserError
from ddpm_pipeline.jobs.generate import generate
from ddpm_pipeline.jobs.ray_map import measuring_workers
from ddpm_pipeline.jobs.runner import DONE, FAILED, STOPPED, JobArguments, run_job
from ddpm_pipeline.progress import Progress

DRIFTED = 3
"""Exit code of a night that is complete and unlike the nights before."""
_EXIT_CODES = {"done": DONE, "drifted": DRIFTED, "failed": FAILED, "drained": STOPPED}


def run_call(call: JobArguments, first: str | None = None, last: str | None = None) -> int:
    """Run the nights from `first` to `last`, or those that are pending."""
    span = (_date(first, "--from"), _date(last, "--to"))
    return run_job("nightly", NightlyConfig, lambda c, p: run(c, p, *span), call, unit="images")


def run(
    config: NightlyConfig, progress: Progress, first: dt.date | None = None, last: dt.date | None = None
) -> int:
    """Run the nights; returns the exit code of the worst one."""
    from ddpm_pipeline.nightly.run_nights import run_nights

    workers = partial(measuring_workers, config.evaluate, "nightly.evaluate")
    return _EXIT_CODES[run_nights(config, generate, progress, first, last, workers)]


def _date(text: str | None, flag: str) -> dt.date | None:
    if text is None:
        return None
    try:
        return dt.date.fromisoformat(text)
    except ValueError:
        raise UserError(f"{flag}: {text!r} is no date; write YYYY-MM-DD") from None
