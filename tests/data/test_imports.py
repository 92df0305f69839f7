"""Reading documents, packing and indexing start without the packages that compute."""

import subprocess
import sys
from pathlib import Path

import ddpm_pipeline.data

SLOW = {"torch", "webdataset", "pyarrow", "sklearn", "matplotlib", "mlflow", "ray"}


def test_documents_formats_and_packing_import_nothing_that_computes() -> None:
    folder = Path(ddpm_pipeline.data.__file__).parent
    files = [
        folder / "index.py",
        folder / "location.py",
        *folder.glob("formats/*.py"),
        *folder.glob("packing/*.py"),
    ]
    parts = [file.relative_to(folder).with_suffix("").parts for file in files if file.stem != "__init__"]
    modules = ", ".join(".".join(("ddpm_pipeline.data", *names)) for names in parts)
    code = f"import sys, {modules}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "pydantic" in loaded
    assert loaded & SLOW == set()


def test_every_public_name_of_the_package_is_found() -> None:
    for name in ddpm_pipeline.data.__all__:
        assert getattr(ddpm_pipeline.data, name).__name__ == name
