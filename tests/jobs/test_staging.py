"""What is handed to a cluster: the program's own modules and presets, whatever else lies in their folders."""

from pathlib import Path

import pytest

import ddpm_pipeline
from ddpm_pipeline.jobs.staging import program_files, stage_program

REPOSITORY = Path(__file__).resolve().parents[2]
MODULES = ["__init__.py", "jobs/__init__.py", "local/__init__.py", "local/stack.py"]


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of a test's own with one module of use, and a link to a folder of it, in place of the program's."""
    root = tmp_path / "ddpm_pipeline"
    (root / "local").mkdir(parents=True)
    (tmp_path / "jobs").mkdir()
    (root / "jobs").symlink_to("../jobs")
    for name in MODULES:
        (root / name).write_text("")
    monkeypatch.setattr(ddpm_pipeline, "__file__", str(root / "__init__.py"))
    return root


def names() -> list[str]:
    return [target for _, target in program_files()]


@pytest.mark.parametrize(
    "beside",
    [
        "jobs/secrets/ray_token",
        "jobs/secrets/keys.py",
        "docker/secrets/keys.py",  # no package: nothing could import it
        "local/secrets.json",
        "local/.env",
        "local/.#stack.py",
        "local/stack.py.orig",
        "local/stack copy.py",
        "id_ed25519",
    ],
)
def test_nothing_beside_the_modules_travels(package: Path, beside: str) -> None:
    file = package / beside
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("secret")
    assert names() == MODULES


def test_a_link_out_of_the_package_is_not_followed(package: Path, tmp_path: Path) -> None:
    (tmp_path / "key.py").write_text("secret")
    (package / "local/key.py").symlink_to(tmp_path / "key.py")
    (tmp_path / "keys").mkdir()
    (tmp_path / "keys/__init__.py").touch()
    (package / "local/keys").symlink_to(tmp_path / "keys")
    assert names() == MODULES


def test_what_travels_is_the_whole_program_with_its_presets_and_templates(tmp_path: Path) -> None:
    copy = stage_program(tmp_path)
    assert copy == tmp_path / "ddpm_pipeline"
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".py", ".yaml", ".html", ".css", ".js", ".md"}
    assert {path.parent.name for path in files if path.suffix == ".yaml"} == {"presets"}
    assert {path.parent.name for path in files if path.suffix in (".html", ".css", ".js", ".md")} == {
        "templates"
    }
    assert sum(path.stat().st_size for path in files) < 3_000_000
    for part in ("pipeline", "jobs", "infra"):
        modules = (REPOSITORY / part).rglob("*.py")
        below = copy if part == "pipeline" else copy / part
        assert {path.relative_to(REPOSITORY / part) for path in modules} <= {
            path.relative_to(below) for path in below.rglob("*.py")
        }
