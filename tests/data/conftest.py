"""Places for data sets."""

from pathlib import Path

import pytest


@pytest.fixture
def uri(tmp_path: Path) -> str:
    """An empty place on disk."""
    return (tmp_path / "set").as_uri()


@pytest.fixture(params=["file", pytest.param("gateway", marks=pytest.mark.stack)])
def any_uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty place on disk, and one in the real gateway."""
    return _place(request, tmp_path)


@pytest.fixture(params=["file", pytest.param("gateway", marks=[pytest.mark.stack, pytest.mark.long])])
def either_uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The same, in the gateway only with --long."""
    return _place(request, tmp_path)


def _place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "file":
        return (tmp_path / "set").as_uri()
    return str(request.getfixturevalue("prefix"))
