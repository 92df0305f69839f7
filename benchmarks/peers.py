"""The peers that cannot live in this project's environment: `python -m benchmarks.peers FOLDER` makes one for them.

litdata and mosaicml-streaming ask for torchvision, which would bring another torch, and the second for an older numpy
and the clients of four clouds. So they are installed without what they ask for, into an environment that sees this
one's packages (the same torch, numpy and Pillow for everyone), and `stand_in` gives them empty modules for what they
import and do not use here.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import subprocess
import sys
import sysconfig
import types
import venv
from collections.abc import Sequence
from pathlib import Path

PEERS = (
    "litdata==0.2.76", "mosaicml-streaming==0.13.0", "spdl-core==0.8.0", "spdl-io==0.8.0", "torchdata==0.11.0",
)  # fmt: skip
THEIRS = (  # what reading local files really takes
    "Brotli", "catalogue", "cramjam", "filelock", "lightning-utilities", "obstore", "python-snappy", "tifffile",
    "tqdm", "xxhash", "zstd",
)  # fmt: skip
STOOD_IN = ("azure", "google", "oci", "paramiko", "torchvision", "transformers")


def make_environment(folder: Path) -> Path:
    """A virtual environment with the peers in it, made if need be; its Python. Raises CalledProcessError."""
    python, complete, wanted = folder / "bin" / "python", folder / "complete", "\n".join([*PEERS, *THEIRS])
    if complete.exists() and complete.read_text() == wanted:
        return python
    venv.create(folder, with_pip=True, clear=True)
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    (packages / "zz-of-the-project.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    install = [str(python), "-m", "pip", "install", "--quiet", "--no-deps", *PEERS, *THEIRS]
    subprocess.run(install, check=True, stdout=sys.stderr)
    complete.write_text(wanted)
    return python


def stand_in() -> None:
    """Let imports of what is not installed, and not used by the measured code, succeed."""
    sys.meta_path.append(_StandIns())


class _StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Empty modules, which are asked last of all: what is installed is taken instead."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname.partition(".")[0] not in STOOD_IN:
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _Empty(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        """There is nothing in it."""


class _Empty(types.ModuleType):
    """A module in which every name is an empty class."""

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


if __name__ == "__main__":
    print(make_environment(Path(sys.argv[1])))
