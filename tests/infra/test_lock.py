import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from infra import lock

LOCKS = ("requirements.lock", "requirements-dev.lock")


def lines_of(name: str) -> list[str]:
    text = (lock.REPOSITORY / name).read_text()
    return [line for line in text.splitlines() if line and not line.startswith(("#", "-r requirements.lock"))]


@pytest.mark.parametrize("name", LOCKS)
def test_a_lock_holds_exact_versions_and_nothing_of_a_place(name: str) -> None:
    for line in lines_of(name):
        assert re.fullmatch(r"[a-z0-9-]+==[0-9][0-9a-z.]*(; .+)?", line), line
        assert not line.startswith(("nvidia-", "cuda-", "triton")), line


def test_everything_the_project_asks_for_is_pinned_within_what_it_accepts() -> None:
    project = tomllib.loads((lock.REPOSITORY / "pyproject.toml").read_text())["project"]
    pins = {
        r.name: r for r in map(Requirement, lines_of("requirements.lock") + lines_of("requirements-dev.lock"))
    }
    extras = project["optional-dependencies"]
    for wanted in map(Requirement, [*project["dependencies"], *extras["stack"], *extras["dev"]]):
        pin = pins[canonicalize_name(wanted.name)]
        version = next(iter(pin.specifier)).version
        assert wanted.specifier.contains(version, prereleases=True), f"{wanted} against {pin}"


def test_a_marker_is_true_exactly_where_the_package_is_needed() -> None:
    everywhere = lock.places()
    cases = {
        "new Python": [place["python_version"] != "3.11" for place in everywhere],
        "one platform": [place["sys_platform"] == "darwin" for place in everywhere],
        "one of all": [i == 4 for i in range(len(everywhere))],
        "two corners": [i in (0, 8) for i in range(len(everywhere))],
        "everywhere": [True] * len(everywhere),
    }
    for name, where in cases.items():
        requirement = Requirement(f"tea==1{lock.marker(where, everywhere)}")
        found = [
            requirement.marker is None or requirement.marker.evaluate(dict(place)) for place in everywhere
        ]
        assert found == where, name


def test_a_package_that_is_needed_but_not_installed_is_named() -> None:
    with pytest.raises(
        LookupError, match=r"no-such-package-of-ours is needed by Python 3\.11 on linux x86_64"
    ):
        lock.lock(["no-such-package-of-ours>=1"])


def test_the_lock_follows_extras_and_skips_what_torch_brings(tmp_path: Path) -> None:
    assert "uvicorn" in lock.lock(["mlflow"])
    lines = lock.lock(["torch"])
    assert lines["torch"].count("+") == 0
    assert not [name for name in lines if name.startswith("nvidia")]
