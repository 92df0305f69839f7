"""Every row of the tables of faults and attacks names tests that exist."""

import re
from dataclasses import dataclass

import pytest

from tests.docs.lines import REPOSITORY

TABLES = {"docs/reliability.md": "Kinds of fault", "docs/security.md": "Kinds of attack"}


@dataclass(frozen=True)
class Row:
    document: str
    kind: str
    now: str
    tests: str

    def __str__(self) -> str:
        return f"{self.document}: {self.kind}"


def rows(document: str, heading: str) -> list[Row]:
    """The rows below a heading, without the header of the table."""
    _, _, section = (REPOSITORY / document).read_text().partition(f"\n## {heading}\n")
    lines = re.findall(r"^\| (.+) \|$", section.partition("\n## ")[0], re.M)
    return [Row(document, *line.split(" | ")) for line in lines[1:]]


def missing(reference: str) -> str | None:
    """What of `tests/FILE.py`, `tests/FILE.py::test_name` or `tests/FOLDER` does not exist."""
    name, _, test = reference.partition("::")
    file = REPOSITORY / name
    if file.is_dir():
        return None if any(file.rglob("test_*.py")) else f"{name} holds no tests"
    if not file.is_file():
        return f"no file {name}"
    names = set(re.findall(r"^(?:async )?def (test_\w+)", file.read_text(), re.M))
    if not names:
        return f"{name} holds no tests"
    return None if not test or test in names else f"no test {test} in {name}"


@pytest.mark.parametrize("row", [row for item in TABLES.items() for row in rows(*item)], ids=str)
def test_every_row_says_what_happens_and_names_tests_that_exist(row: Row) -> None:
    assert row.kind
    assert row.now
    references = re.findall(r"`([^`]+)`", row.tests)
    assert references
    assert all(reference.startswith("tests/") for reference in references)
    assert [problem for reference in references if (problem := missing(reference))] == []


@pytest.mark.parametrize(("document", "heading"), TABLES.items())
def test_the_tables_are_where_they_are_looked_for(document: str, heading: str) -> None:
    kinds = [row.kind for row in rows(document, heading)]
    assert len(kinds) >= 20
    assert len(set(kinds)) == len(kinds)


@pytest.mark.parametrize(
    ("reference", "problem"),
    [
        ("tests/docs/test_tables.py", None),
        ("tests/docs/test_tables.py::test_a_missing_test_is_found", None),
        ("tests/docs", None),
        ("tests/docs/test_tables.py::test_gone", "no test test_gone in tests/docs/test_tables.py"),
        ("tests/docs/test_gone.py", "no file tests/docs/test_gone.py"),
        ("tests/docs/lines.py", "tests/docs/lines.py holds no tests"),
    ],
)
def test_a_missing_test_is_found(reference: str, problem: str | None) -> None:
    assert missing(reference) == problem
