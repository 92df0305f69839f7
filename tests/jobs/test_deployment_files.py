"""`ddpm files` writes what a deployment needs, where the documentation says it is."""

import json
import os
from pathlib import Path

import pytest

from ddpm_pipeline.errors import UserError
from ddpm_pipeline.jobs.deployment_files import PARTS, write_files
from tests.built_wheel import REPOSITORY, tracked_files
from tests.test_wheel import TOOLS_OF_THE_REPOSITORY


def test_the_files_are_those_of_the_repository_at_the_same_paths(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "deploy"
    assert write_files(folder) == 0
    assert all((folder / part).exists() for part in PARTS)
    written = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    deployed = {path for path in tracked_files("infra") if path not in TOOLS_OF_THE_REPOSITORY}
    assert deployed < written
    for path in written:
        assert (folder / path).read_bytes() == (REPOSITORY / path).read_bytes(), path
    json.loads((folder / "docs/schema/settings.json").read_text())
    assert os.access(folder / "infra/docker/secrets.sh", os.X_OK)
    assert f"next     cd {folder}" in capsys.readouterr().out


def test_every_file_that_the_dockerfile_copies_is_among_them(tmp_path: Path) -> None:
    write_files(tmp_path / "deploy")
    for line in (tmp_path / "deploy/infra/docker/Dockerfile").read_text().splitlines():
        if line.startswith("COPY ") and "--from" not in line:
            sources = [word for word in line.split()[1:-1] if not word.startswith("--")]
            assert sources
            assert all((tmp_path / "deploy" / source).exists() for source in sources), line


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").touch()
    with pytest.raises(UserError, match="is not an empty folder"):
        write_files(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
