"""The units of a server without containers, judged by systemd itself. None is started here."""

import configparser
import shutil
import subprocess
from pathlib import Path

import pytest
import typer.main

from ddpm_pipeline.jobs.cli import app
from ddpm_pipeline.jobs.nightly import DRIFTED
from ddpm_pipeline.jobs.runner import REFUSED, STOPPED

SYSTEMD = Path(__file__).resolve().parents[2] / "infra" / "systemd"
UNITS = sorted(SYSTEMD.iterdir())
SERVICES = [unit for unit in UNITS if unit.suffix == ".service"]
judged = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed"
)


def section(unit: Path, name: str) -> configparser.SectionProxy:
    parser = configparser.ConfigParser(interpolation=None, strict=True)
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    parser.read(unit)
    return parser[name]


@pytest.fixture
def installed(tmp_path: Path) -> list[Path]:
    """The units as they would stand on a server whose /srv/ddpm is a folder of this test."""
    program = tmp_path / "srv" / ".venv" / "bin" / "ddpm"
    program.parent.mkdir(parents=True)
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    placed: list[Path] = []
    for unit in UNITS:
        placed.append(tmp_path / unit.name)
        placed[-1].write_text(unit.read_text().replace("/srv/ddpm", str(tmp_path / "srv")))
    return placed


@judged
def test_systemd_finds_nothing_to_say_about_the_units(installed: list[Path]) -> None:
    told = subprocess.run(["systemd-analyze", "verify", *installed], capture_output=True, text=True)
    assert (told.returncode, told.stderr) == (0, "")


@judged
@pytest.mark.parametrize("name", [unit.name for unit in SERVICES])
def test_no_service_is_exposed_beyond_its_need(installed: list[Path], name: str) -> None:
    unit = next(path for path in installed if path.name == name)
    command = ["systemd-analyze", "security", "--offline=true", "--threshold=25", str(unit)]
    told = subprocess.run(
        command, capture_output=True, text=True, env={"LC_ALL": "C", "PATH": "/usr/bin:/bin"}
    )
    assert told.returncode == 0, told.stdout[-300:]


@pytest.mark.parametrize("unit", SERVICES, ids=lambda unit: unit.name)
def test_services_run_as_their_own_user_and_never_wait_for_ever(unit: Path) -> None:
    service = section(unit, "Service")
    assert service["User"] == "ddpm"
    assert service["NoNewPrivileges"] == "yes"
    assert service["TimeoutStartSec"] != "infinity"
    assert service["WorkingDirectory"] == service["ReadWritePaths"] == "/srv/ddpm"


def test_every_timer_starts_a_service_that_is_there() -> None:
    timers = [unit for unit in UNITS if unit.suffix == ".timer"]
    assert [timer.stem for timer in timers] == ["ddpm-doctor", "ddpm-nightly"]
    for timer in timers:
        assert timer.with_suffix(".service") in SERVICES


def test_the_night_shares_the_stacks_tmp_where_rays_sockets_are() -> None:
    night, stack = (SYSTEMD / f"ddpm-{name}.service" for name in ("nightly", "stack"))
    assert section(night, "Unit")["JoinsNamespaceOf"] == stack.name
    assert section(night, "Service")["PrivateTmp"] == section(stack, "Service")["PrivateTmp"] == "yes"


def test_a_night_is_not_tried_again_for_ends_that_trying_does_not_change() -> None:
    service = section(SYSTEMD / "ddpm-nightly.service", "Service")
    assert service["RestartPreventExitStatus"].split() == [str(code) for code in (REFUSED, DRIFTED, STOPPED)]
    commands = getattr(typer.main.get_command(app), "commands", {})
    assert service["ExecStart"].split()[1] in commands
