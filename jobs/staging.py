"""What travels to a cluster: the program's own files, chosen by an allow-list, never a whole folder.

Whatever else is in a package's folder (keys that a script made, caches, an editor's copies) stays here: Ray keeps
what it is handed where every user of the cluster can read it.
"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import ddpm_pipeline

PACKAGE = ddpm_pipeline.__name__
PARTS = ("", "jobs", "infra")
"""Folders of the package. In a checkout the last two are links to folders beside it."""
DATA = ("templates/*", "jobs/presets/*.yaml")
"""Files beside the modules, as pyproject.toml's package-data lists them."""
LAUNCHER_FILE = "launch.sh"
# Ray may have been started by its full path, with no `python` on PATH or with another one: the raylet, from which a
# job's shell descends, has its workers' interpreter among its arguments.
LAUNCHER = r"""
pid=$PPID python=
while [ -z "$python" ] && [ "${pid:-0}" -gt 1 ]; do
    python=$(tr '\0' '\n' <"/proc/$pid/cmdline" | sed -n 's/^--python_worker_command=\([^" ]*\) .*/\1/p')
    pid=$(sed -n 's/^PPid:[[:space:]]*//p' "/proc/$pid/status")
done 2>/dev/null
for program in "$python" python python3; do
    if [ -n "$program" ] && command -v "$program" >/dev/null 2>&1; then exec "$program" "$@"; fi
done
echo "error: no python on this node's PATH ($PATH), and Ray's own was not found" >&2
exit 127
"""


def stage_launcher(folder: Path) -> None:
    """Put the script that `entrypoint` calls into a job's working directory."""
    (folder / LAUNCHER_FILE).write_text(LAUNCHER.lstrip(), encoding="utf-8")


def entrypoint(*words: str) -> str:
    """A job's command: Ray's own interpreter with these words, which are quoted where they must be."""
    return " ".join(["sh", LAUNCHER_FILE, *words])


def stage_program(folder: Path) -> Path:
    """Copy the package into `folder`, which exists; returns the copy, for Ray's `py_modules`."""
    for source, target in program_files():
        copy = folder / PACKAGE / target
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, copy)
    return folder / PACKAGE


def program_files() -> Iterator[tuple[Path, str]]:
    """The files that travel, each with its path below the package."""
    root = Path(str(ddpm_pipeline.__file__)).parent
    homes = [(root / part).resolve() for part in PARTS]
    found = [file for pattern in DATA for file in root.glob(pattern)]
    for folder, subfolders, names in os.walk(root, followlinks=True):
        here = Path(folder)
        subfolders[:] = [name for name in subfolders if (here / name / "__init__.py").is_file()]
        found += [here / name for name in names if name.endswith(".py") and name[:-3].isidentifier()]
    for source in sorted(found):
        # A link may lead anywhere.
        if source.is_file() and any(source.resolve().is_relative_to(home) for home in homes):
            yield source, source.relative_to(root).as_posix()
