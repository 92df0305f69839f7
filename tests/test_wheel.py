"""The wheel: it holds the package and what the package needs, and nothing else."""

import os
import re
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

import ddpm_pipeline
from ddpm_pipeline.jobs import deployment_files, staging
from tests.built_wheel import REPOSITORY, build_wheel, tracked_files

TOOLS_OF_THE_REPOSITORY = {
    "infra/grafana/alerts_test.yaml",
    "infra/install.sh",
    "infra/kuberay/checkov.yaml",
    "infra/kuberay/lint.sh",
    "infra/lock.sh",
    "infra/supply.lock",
    "infra/supply.sh",
}
INSTALLATION = {
    "METADATA",
    "RECORD",
    "WHEEL",
    "entry_points.txt",
    "licenses/LICENSE",
    "licenses/NOTICE",
    "top_level.txt",
}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("build"))


def in_package(path: str) -> str:
    """Where a file of the repository lies in the wheel."""
    folder, _, rest = path.partition("/")
    return f"ddpm_pipeline/{rest}" if folder == "pipeline" else f"ddpm_pipeline/{path}"


def test_the_wheel_holds_every_file_of_the_three_folders_but_the_repositorys_tools(wheel: Path) -> None:
    files = set(tracked_files("pipeline", "jobs", "infra"))
    assert files > TOOLS_OF_THE_REPOSITORY
    described = f"ddpm_pipeline-{ddpm_pipeline.__version__}.dist-info"
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        assert b"Name: ddpm-pipeline\n" in archive.read(f"{described}/METADATA")
        assert archive.read(f"{described}/top_level.txt").split() == [b"ddpm_pipeline"]
        for lock in ("requirements.lock", "requirements-torch.lock"):
            assert archive.read(f"ddpm_pipeline/locks/{lock}") == (REPOSITORY / lock).read_bytes()
        schema = archive.read("ddpm_pipeline/schema/settings.json")
    assert schema == (REPOSITORY / "docs/schema/settings.json").read_bytes()
    assert len(names) == len(set(names))
    own = {in_package(path) for path in files - TOOLS_OF_THE_REPOSITORY}
    assert set(names) == own | {f"{described}/{name}" for name in INSTALLATION}


def test_the_lists_of_the_packages_files_are_one() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["setuptools"]
    packaged = project["package-data"]["ddpm_pipeline"]
    assert len(packaged) == len(set(packaged))
    assert {*staging.DATA, *deployment_files.DATA, "py.typed", "schema/*.json"} == set(packaged)


def test_in_an_image_the_package_finds_the_locks_where_the_dockerfile_puts_them() -> None:
    docker = (REPOSITORY / "infra/docker/Dockerfile").read_text()
    assert "COPY requirements.lock requirements-torch.lock /opt/ddpm/\n" in docker
    assert "COPY pipeline /opt/ddpm/ddpm_pipeline\n" in docker
    for lock in ("requirements.lock", "requirements-torch.lock"):
        link = REPOSITORY / "pipeline/locks" / lock
        place = Path("/opt/ddpm/ddpm_pipeline/locks") / link.readlink()
        assert os.path.normpath(place) == f"/opt/ddpm/{lock}"


def test_the_citation_names_the_version() -> None:
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text())
    assert citation["version"] == ddpm_pipeline.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+", ddpm_pipeline.__version__)
