"""Another's package with the name of one of ours is told in one line, not in a traceback."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import jobs


@pytest.mark.parametrize("name", ["pipeline", "infra"])
def test_a_package_that_hides_ours_is_named_in_one_line(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").touch()
    ours = str(Path(jobs.__file__).parents[1])
    found = subprocess.run(
        [sys.executable, "-P", "-c", "import jobs.cli"],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": os.pathsep.join([str(tmp_path), ours])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 2
    assert found.stdout == ""
    assert found.stderr.startswith(
        f"error: {name}: Python finds another package of this name, at {tmp_path}/{name}"
    )
    assert found.stderr.count("\n") == 1


def test_our_own_packages_are_known() -> None:
    assert jobs.foreign_package("pipeline") is None
    assert jobs.foreign_package("infra") is None
