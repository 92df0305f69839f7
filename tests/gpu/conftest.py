"""Collects what the tests of this folder find on GPUs, and writes the report at the end."""

from collections.abc import Generator
from pathlib import Path

import pytest

from tests.gpu.report import Result, about_this_machine, rendered

REPORT = Path("build/gpu-report.md")
_RESULTS = pytest.StashKey[list[Result]]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Keep the outcome of a promise on a GPU."""
    report = yield
    promise = dict(item.user_properties).get("promise")
    if promise is not None and (report.when == "call" or report.skipped):
        reason = f": {report.longrepr[2]}" if isinstance(report.longrepr, tuple) else ""
        result = Result(str(promise), f"{report.outcome}{reason}", report.duration)
        item.config.stash.setdefault(_RESULTS, []).append(result)
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write the report where a GPU was used."""
    results = session.config.stash.get(_RESULTS, [])
    if results:
        REPORT.parent.mkdir(exist_ok=True)
        REPORT.write_text(rendered(about_this_machine(), results))
        print(f"\nreport: {REPORT}")
