"""What travels to a cluster: the program's own files, chosen by an allow-list, never a folder as it lies there.

Whatever else lies in a package's folder (keys that a script made, caches, an editor's copies) stays here: Ray keeps
what it is handed where every user of the cluster can read it.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path

import infra
import jobs
import pipeline

PACKAGES = {"pipeline": pipeline, "jobs": jobs, "infra": infra}
DATA = {"jobs": "presets/*.yaml"}
"""Files beside the modules, as pyproject.toml's package-data lists them."""


def stage_program(folder: Path) -> list[Path]:
    """Copy the packages to `folder`, which exists; returns the folder of each, as Ray's `py_modules` wants them."""
    for name in PACKAGES:
        for source, target in program_files(name):
            copy = folder / target
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, copy)
    return [folder / name for name in PACKAGES]


def program_files(name: str) -> Iterator[tuple[Path, str]]:
    """The files of a package that travel, each with its path below the folder that holds the package."""
    root = Path(str(PACKAGES[name].__file__)).parent.resolve()
    modules = (file for file in root.rglob("*.py") if _is_module(file, root))
    for source in sorted([*modules, *root.glob(DATA.get(name, "no data"))]):
        if source.is_file() and source.resolve().is_relative_to(root):  # a link may lead anywhere
            yield source, f"{name}/{source.relative_to(root).as_posix()}"


def _is_module(file: Path, root: Path) -> bool:
    """Whether Python could import this file as a part of the package."""
    if not file.stem.isidentifier():
        return False
    folders = [parent for parent in file.parents if parent.is_relative_to(root)]
    return all((parent / "__init__.py").is_file() for parent in folders)
