"""What travels to a cluster: the program's own files, chosen by an allow-list, never a whole folder.

Whatever else is in a package's folder (keys that a script made, caches, an editor's copies) stays here: Ray keeps
what it is handed where every user of the cluster can read it.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path

import infra
import jobs
import pipeline

PACKAGES = {"pipeline": pipeline, "jobs": jobs, "infra": infra}
DATA = {"jobs": "presets/*.yaml", "pipeline": "templates/*"}
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
