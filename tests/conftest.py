"""What every test may use: the real local stack, started once, and a place of its own in the object store."""

import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import pytest

from ddpm_pipeline.errors import UserError
from ddpm_pipeline.infra.local import LocalStack, export_environment
from ddpm_pipeline.infra.local.ray import LOOPBACK_SETTINGS
from ddpm_pipeline.retry import START_VARIABLE
from tests.chronicle import PROPERTY
from tests.driving import ended_after
from tests.effort import LONG_VARIABLE
from tests.traces import require_end, require_no_secret

# Ray reads these when it is first imported, which is before the stack is there to say so.
os.environ.update(LOOPBACK_SETTINGS)
os.environ.setdefault("RAY_AUTH_MODE", "token")

# Set before a test imports torch. Several processes share the cores in the tests of distributed training.
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(_name, "1")

os.environ.setdefault(START_VARIABLE, "0")

_OF_SERVICES = ("AWS_", "MLFLOW_", "RAY_", "DDPM_")
LOGICAL_CPUS = 4  # more than the cores of a small machine: jobs and their workers must fit side by side


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="also repetitions, variants and what takes minutes")


def pytest_configure(config: pytest.Config) -> None:
    """Tell modules of tests how thorough to be: they choose numbers of examples while they are imported."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # A shell's background job ignores Ctrl-C, and so would every program that the tests start and interrupt.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ[LONG_VARIABLE] = "1" if config.getoption("--long") else "0"


def may_need_stack(file: Path) -> bool:
    """Whether a test file can hold tests on the stack: it says so itself, or a fixture of its folder does."""
    texts = [one.read_text() for one in (file, file.parent / "conftest.py") if one.exists()]
    return any("mark.stack" in text for text in texts)


def needs_stack_throughout(file: Path) -> bool:
    """Whether all tests of a file are on the stack."""
    return re.search(r"^pytestmark = .*mark\.stack\b", file.read_text(), re.M) is not None


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Files none of whose tests would run are not imported, which would take longer than many a test."""
    if not (collection_path.name.startswith("test_") and collection_path.suffix == ".py"):
        return None
    passed_over = {
        "stack": lambda: not may_need_stack(collection_path),
        "not stack": lambda: needs_stack_throughout(collection_path),
    }.get(config.getoption("markexpr"))
    return True if passed_over is not None and passed_over() else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Fast tests first: what can fail in seconds should not wait for servers. Last: what looks at others' traces.

    Of the tests on the stack those of minutes come first, so that two processes that share them end together.
    """
    passed_over = {
        str(item.path) for item in items if item.get_closest_marker("stack") and not may_need_stack(item.path)
    }
    if passed_over:
        raise pytest.UsageError(f"`-m stack` would pass over {', '.join(passed_over)}: say mark.stack there")
    if not config.getoption("--long"):
        for item in items:
            if item.get_closest_marker("long"):
                item.add_marker(pytest.mark.skip(reason="make test LONG=1 runs it"))
    items.sort(key=_turn)


def _turn(item: pytest.Item) -> tuple[bool, bool, bool]:
    stack, last, first = (item.get_closest_marker(name) is not None for name in ("stack", "last", "first"))
    return stack, last, not first


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What tests recorded of how long things took, also of those that passed."""
    reports = [report for found in terminalreporter.stats.values() for report in found]
    for report in reports:
        told = dict(getattr(report, "user_properties", ())).get(PROPERTY)
        if told is not None and report.when == "call":
            terminalreporter.section(f"chronicle of {report.nodeid}")
            terminalreporter.write_line("\n".join(told))


@pytest.fixture(scope="session", autouse=True)
def own_state(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Spools, locks and fetched files go to temporary folders, not to the home of whoever runs the tests."""
    folders = {f"XDG_{kind}_HOME": str(tmp_path_factory.mktemp(kind.lower())) for kind in ("STATE", "CACHE")}
    with mock.patch.dict(os.environ, folders):
        yield


@pytest.fixture
def as_another_user(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Called, it makes the rest of the test see all that is there as another user's."""
    return lambda: monkeypatch.setattr(os, "geteuid", lambda: 4_000_000)


@pytest.fixture(scope="session")
def bare_environ(own_state: None) -> dict[str, str]:
    """The environment without any setting of a service: tests never reach a server of the user's."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_OF_SERVICES)}
    return {**kept, START_VARIABLE: "0"}  # what is away on purpose is not waited for


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory, bare_environ: dict[str, str]) -> Iterator[LocalStack]:
    """The real stack on fresh ports in a temporary folder; its variables stand in os.environ from here on.

    At the end no file of it holds one of its secrets, and none of its processes outlives it.
    """
    local = LocalStack(tmp_path_factory.mktemp("stack"), "s3", LOGICAL_CPUS, environ=bare_environ)
    with ended_after(local), mock.patch.dict(os.environ):
        try:
            local.up()
        except UserError as error:
            pytest.exit(f"the local stack cannot start: {error}", returncode=3)
        os.environ.clear()
        os.environ.update(bare_environ)
        export_environment(local.root)
        os.environ.update(RAY_metrics_report_interval_ms="2000")  # read when a process first joins Ray
        yield local
        require_no_secret(local)
        require_end(local)


@pytest.fixture
def prefix(stack: LocalStack, tmp_path: Path) -> str:
    """A URI prefix in the stack's bucket that no other test writes to."""
    return f"s3://ddpm/tests/{tmp_path.parent.name}/{tmp_path.name}"
