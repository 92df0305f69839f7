"""What is handed to a cluster: the program's own modules and presets, whatever else lies in their folders."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from jobs import staging
from jobs.staging import PACKAGES, program_files, stage_program


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package `infra` of a test's own, with one module of use, in place of the program's."""
    root = tmp_path / "infra"
    (root / "local").mkdir(parents=True)
    for name in ("__init__.py", "local/__init__.py", "local/stack.py"):
        (root / name).write_text("")
    monkeypatch.setitem(staging.PACKAGES, "infra", SimpleNamespace(__file__=str(root / "__init__.py")))
    return root


def names(package: str) -> list[str]:
    return [target for _, target in program_files(package)]


@pytest.mark.parametrize(
    "beside",
    [
        "docker/secrets/ray_token",
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
    assert names("infra") == ["infra/__init__.py", "infra/local/__init__.py", "infra/local/stack.py"]


def test_a_link_out_of_the_package_is_not_followed(package: Path, tmp_path: Path) -> None:
    (tmp_path / "key.py").write_text("secret")
    (package / "local/key.py").symlink_to(tmp_path / "key.py")
    assert "infra/local/key.py" not in names("infra")


def test_what_travels_is_the_whole_program_with_its_presets_and_templates(tmp_path: Path) -> None:
    assert stage_program(tmp_path) == [tmp_path / name for name in ("pipeline", "jobs", "infra")]
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".py", ".yaml", ".html", ".css", ".js"}
    assert {path.parent.name for path in files if path.suffix == ".yaml"} == {"presets"}
    assert {path.parent.name for path in files if path.suffix in (".html", ".css", ".js")} == {"templates"}
    assert sum(path.stat().st_size for path in files) < 2_000_000
    for name, package in PACKAGES.items():
        modules = Path(str(package.__file__)).parent.rglob("*.py")
        assert {path.name for path in modules} == {path.name for path in (tmp_path / name).rglob("*.py")}
