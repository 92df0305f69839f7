"""Which code a run names."""

import getpass
import subprocess
from pathlib import Path

import pytest

from ddpm_pipeline.tracking import lineage
from ddpm_pipeline.tracking.lineage import source_tags


def test_a_repository_in_which_the_program_is_installed_is_not_the_programs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for words in (
        ["init"],
        ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "--allow-empty", "-m", "theirs"],
    ):
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True, capture_output=True)
    installed = tmp_path / "venv/lineage.py"
    installed.parent.mkdir()
    installed.write_text("")
    monkeypatch.setattr(lineage, "__file__", str(installed))
    assert source_tags() == {"mlflow.user": getpass.getuser()}
    subprocess.run(["git", "-C", str(tmp_path), "add", "."], check=True)
    assert source_tags()["ddpm.git_dirty"] == "true"
