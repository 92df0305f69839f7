"""Python environments of their own on top of this one's packages: of a user with the wheel, of nodes without it."""

import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from ddpm_pipeline.infra.local import environment as variables_of


def make_environment(folder: Path, python: str = sys.executable) -> Path:
    """An environment with this one's packages, without what is installed here as editable: the program itself.

    `python` is the interpreter to make it of. Returns its site-packages.
    """
    subprocess.run([python, "-m", "venv", "--without-pip", str(folder)], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    # Paths in such a file are searched, but not for files of its kind: what is installed as editable stays unseen.
    (packages / "dependencies.pth").write_text(f"{Path(pytest.__file__).parents[1]}\n")
    return packages


def install(wheel: Path, environment: Path) -> None:
    """Install a wheel alone, without what it requires."""
    pip = [sys.executable, "-m", "pip", "--python", str(environment / "bin/python")]
    options = ["--disable-pip-version-check", "install", "--quiet", "--no-index", "--no-deps"]
    subprocess.run([*pip, *options, str(wheel)], check=True)


def output_of(command: Sequence[str], folder: Path, environ: Mapping[str, str] | None = None) -> str:
    """What a command, which must succeed, prints in this folder; `environ` is by default this process's."""
    done = subprocess.run(
        command,
        cwd=folder,
        env=environ,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


class Installed:
    """An environment with the wheel, on top of this one's other packages, and a folder to work in."""

    def __init__(self, environment: Path, folder: Path, environ: dict[str, str]) -> None:
        self.program = environment / "bin/ddpm"
        (self.packages,) = environment.glob("lib/python*/site-packages")
        self.folder = folder
        self.environ = {name: value for name, value in environ.items() if name != "PYTHONPATH"}

    def ddpm(self, *words: str, program: Sequence[str] = (), **variables: str) -> str:
        """What the command prints, which must succeed. `program` is another `ddpm` than the installed one."""
        command = [*(program or [str(self.program)]), *words]
        return output_of(command, self.folder, {**self.environ, **variables})

    def python(self, code: str) -> str:
        """What a program of a user prints, in this environment and on this folder's stack."""
        stack = variables_of(self.folder / ".local")
        return subprocess.run(
            [str(self.program.with_name("python")), "-c", code],
            cwd=self.folder,
            env={**self.environ, **stack},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        ).stdout

    def contents(self) -> dict[str, tuple[int, int]]:
        """Every file and folder of site-packages, with its size and its time of change."""
        found = {path: path.stat() for path in self.packages.rglob("*")}
        return {str(path): (about.st_size, about.st_mtime_ns) for path, about in found.items()}
