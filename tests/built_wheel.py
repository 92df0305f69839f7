"""The project's source distribution and wheel, built from the files that git tracks."""

import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import ddpm_pipeline

REPOSITORY = Path(__file__).resolve().parents[1]


def tracked_files(*folders: str) -> list[str]:
    """Paths that git tracks below these folders, and new ones that it does not ignore; links to folders left out."""
    words = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z", *folders]
    listed = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    return [path for path in listed.split("\0") if (REPOSITORY / path).is_file()]


def build_wheel(folder: Path, version: str | None = None) -> Path:
    """A wheel in `folder`, as `python -m build` makes it: from the unpacked source distribution, with this Python's
    setuptools. `version` is one to claim instead of the program's own.
    """
    tree = folder / "tree"
    for path in tracked_files(
        "pipeline", "jobs", "infra", "docs/schema", "*.lock", "*.toml", "*.md", "LICENSE", "NOTICE"
    ):
        (tree / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPOSITORY / path, tree / path, follow_symlinks=False)
    for link, target in (
        ("ddpm_pipeline", "pipeline"),
        ("pipeline/jobs", "../jobs"),
        ("pipeline/infra", "../infra"),
    ):
        (tree / link).symlink_to(target)
    if version is not None:
        module = tree / "pipeline/__init__.py"
        module.write_text(module.read_text().replace(ddpm_pipeline.__version__, version))
    source = _build("sdist", tree, folder)
    with tarfile.open(source) as archive:
        archive.extractall(folder, filter="data")
    return _build("wheel", folder / source.name.removesuffix(".tar.gz"), folder)


def _build(kind: str, tree: Path, folder: Path) -> Path:
    call = f"import sys; from setuptools import build_meta; print(build_meta.build_{kind}(sys.argv[1]))"
    words = [sys.executable, "-c", call, str(folder)]
    done = subprocess.run(words, cwd=tree, capture_output=True, text=True, check=True)
    return folder / done.stdout.split()[-1]
