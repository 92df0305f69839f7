"""What is installed: exact versions, and files known by their hash, on every platform and Python of the project."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from ddpm_pipeline.jobs.doctor_checks import read_pins

REPOSITORY = Path(__file__).resolve().parents[2]
HASHED, TORCH = ("requirements.lock", "requirements-dev.lock"), "requirements-torch.lock"
OF_TOOLS = ("infra/docker/mlflow.lock", "infra/supply.lock")


def blocks_of(name: str) -> dict[str, list[str]]:
    """The hash lines of each pin of a lock, by its line."""
    found: dict[str, list[str]] = {}
    for line in (REPOSITORY / name).read_text().splitlines():
        if re.match("[a-z]", line):
            found[line] = []
        elif line.startswith(" "):
            found[next(reversed(found))].append(line)
    return found


@pytest.mark.parametrize("name", [*HASHED, *OF_TOOLS])
def test_every_pin_is_an_exact_version_with_the_hashes_of_its_files(name: str) -> None:
    for line, hashes in blocks_of(name).items():
        assert re.fullmatch(r"[a-z0-9-]+==[0-9][0-9a-z.]*( ; .+)? \\", line), line
        assert hashes, line
        for number, text in enumerate(hashes, start=1):
            end = r" \\" if number < len(hashes) else ""
            assert re.fullmatch(rf"    --hash=sha256:[0-9a-f]{{64}}{end}", text), f"{line}: {text}"


@pytest.mark.parametrize("name", [*HASHED, *OF_TOOLS, TORCH])
def test_a_lock_holds_nothing_of_a_place(name: str) -> None:
    text = (REPOSITORY / name).read_text()
    assert not re.search(r"://|index-url|find-links|trusted-host|@", text)
    assert not re.search(r"^(nvidia-(?!ml-py)|cuda-)|sys_platform == .win32", text, re.M)
    # A CUDA build of torch brings its own; the tests interpret and compile its kernels on a CPU.
    assert ("\ntriton==" in text) == (name == "requirements-dev.lock")


def test_compiled_packages_have_the_hashes_of_many_builds() -> None:
    hashes = {line.partition("==")[0]: found for line, found in blocks_of("requirements.lock").items()}
    for name in (
        "numpy",
        "pillow",
        "pyarrow",
        "scikit-learn",
    ):  # 3 Pythons on x86_64, aarch64 and macOS at least
        assert len(hashes[name]) >= 9, name


def test_torch_alone_is_without_hashes_and_the_lock_says_why() -> None:
    assert list(blocks_of(TORCH)) == [str(pin) for pin in read_pins(REPOSITORY / TORCH)]
    assert [pin.name for pin in read_pins(REPOSITORY / TORCH)] == ["torch"]
    assert "no hashes here: which build" in (REPOSITORY / TORCH).read_text()


def test_everything_the_project_asks_for_is_pinned_within_what_it_accepts() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    pins = {pin.name: pin for name in (*HASHED, TORCH) for pin in read_pins(REPOSITORY / name)}
    extras = project["optional-dependencies"]
    for wanted in map(Requirement, [*project["dependencies"], *extras["stack"], *extras["dev"]]):
        pin = pins[canonicalize_name(wanted.name)]
        version = next(iter(pin.specifier)).version
        assert wanted.specifier.contains(version, prereleases=True), f"{wanted} against {pin}"


def test_whatever_installs_takes_no_file_of_another_hash() -> None:
    for text in ("infra/install.sh", "infra/supply.sh", "infra/docker/Dockerfile"):
        lines = (REPOSITORY / text).read_text().splitlines()
        locks = r"requirements(-dev)?\.lock|mlflow\.lock|\$wanted"
        hashed = [line for line in lines if re.search(rf"(install_lock|pip install) .*({locks})", line)]
        assert hashed, text
        assert all("--require-hashes --no-deps" in line for line in hashed), text
