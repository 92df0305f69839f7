"""The list of licenses is of the packages that are installed, and none of them asks for the program's own source."""

import re
from pathlib import Path

from packaging.utils import canonicalize_name

from ddpm_pipeline.jobs.doctor_checks import LOCKS, read_pins

REPOSITORY = Path(__file__).resolve().parents[2]
TABLE = [
    tuple(cell.strip() for cell in line.strip("|").split("|"))
    for line in (REPOSITORY / "docs" / "licenses.md").read_text().splitlines()
    if line.startswith("| ") and not line.startswith("| Name ")
]


def test_every_pinned_package_is_listed_in_its_pinned_version_and_no_other() -> None:
    pins = [pin for lock in LOCKS for pin in read_pins(lock)]
    here = {canonicalize_name(pin.name): next(iter(pin.specifier)).version for pin in pins}
    listed = {canonicalize_name(name): version.partition("+")[0] for name, version, _ in TABLE}
    assert listed == here, "the lock changed: run `make licenses`"


def test_no_package_is_under_a_license_that_reaches_over_to_the_program() -> None:
    strict = [row for row in TABLE if re.search(r"(?<!L)GPL|AGPL|SSPL|Commons Clause", row[2])]
    assert strict == []
    assert {name for name, _, license in TABLE if license == "UNKNOWN"} <= {
        "huey",
        "skops",
    }  # both MIT, by their files
