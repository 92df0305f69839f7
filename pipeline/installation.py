"""Where the program is installed: in a checkout of its repository, or as a wheel in an environment."""

import site
from importlib import metadata
from pathlib import Path

import ddpm_pipeline

DISTRIBUTION = "ddpm-pipeline"
"""Name of the package that pip installs."""
PACKAGE = Path(str(ddpm_pipeline.__file__)).parent
"""The folder of the package. In a checkout it is a link, and so are its folders `jobs` and `infra`."""
LOCKS = (PACKAGE / "locks" / "requirements.lock", PACKAGE / "locks" / "requirements-torch.lock")
"""The versions of all dependencies with which the program was tested."""


def checkout() -> Path | None:
    """The repository, where the program runs from a checkout; None for a wheel or a copy of the package."""
    repository = PACKAGE.resolve().parent
    return repository if (repository / "infra" / "install.sh").is_file() else None


def import_path() -> str | None:
    """The folder that a Python started from here must search besides its own; None where that Python finds the program
    by itself, because it is installed.
    """
    folder = PACKAGE.parent
    own = {*site.getsitepackages(), site.getusersitepackages()}
    return None if str(folder) in own else str(folder)


def declared_requirements() -> list[str] | None:
    """What the distribution requires, as its metadata lists it; None where only the package's folder is here."""
    try:
        return metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        return None
