"""The package in `package/`, as if pip had installed it: its metadata in a folder on the path."""

import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent / "package"
Install = Callable[[str], None]


def write_metadata(folder: Path, version: str) -> Path:
    """What pip would write of `package/` in this version; returns the folder, for the path."""
    project = tomllib.loads((PACKAGE / "pyproject.toml").read_text())["project"]
    info = folder / f"tiny_dit-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {version}\n")
    (info / "top_level.txt").write_text("tiny_dit\n")
    lines: list[str] = []
    for group, entries in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {value}" for name, value in entries.items()), ""]
    (info / "entry_points.txt").write_text("\n".join(lines))
    return folder


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Installs the package in a version, in place of the one before; "" uninstalls it."""
    before = list(sys.path)

    def installed(version: str) -> None:
        monkeypatch.setattr(sys, "path", list(before))
        for name in [name for name in sys.modules if name.partition(".")[0] == "tiny_dit"]:
            monkeypatch.delitem(sys.modules, name)
        if version:
            folder = tmp_path / "site" / version
            sys.path[:0] = [str(folder if folder.exists() else write_metadata(folder, version)), str(PACKAGE)]

    installed("1.0.0")
    yield installed
    for name in [name for name in sys.modules if name.partition(".")[0] == "tiny_dit"]:
        del sys.modules[name]
