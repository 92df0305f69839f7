"""The installed wheel does everything outside a checkout: in an environment of its own, which nothing writes to."""

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

import ddpm_pipeline
from ddpm_pipeline.infra.local import LocalStack
from ddpm_pipeline.jobs.runner import PROGRAM
from tests.built_wheel import REPOSITORY, build_wheel
from tests.driving import ended_after
from tests.environments import Installed, install, make_environment

pytestmark = [pytest.mark.stack, pytest.mark.long, pytest.mark.timeout(1200)]
VERSION = "9.8.7"
"""What the wheel says it is, to tell it from the checkout."""
SMALL = (
    "steps=60",
    "optimizer.warmup_steps=10",
    "log_every_steps=20",
    "checkpoint.every_steps=20",
    "grid.every_steps=20",
    "grid.count=4",
)

PREDICTION = """
import mlflow
model = mlflow.pyfunc.load_model("models:/demo@champion")
images = model.predict({"seed": 3, "count": 2, "class": 5, "steps": 4})
print(images.shape, images.dtype)
"""
"""Of someone who has the model's address and what it declares, and no checkout."""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory, bare_environ: dict[str, str]) -> Iterator[Installed]:
    base = tmp_path_factory.mktemp("wheel")
    work = base / "empty"
    work.mkdir()
    make_environment(base / "environment")
    install(build_wheel(base, VERSION), base / "environment")
    found = Installed(base / "environment", work, bare_environ)
    for path in [found.packages, *found.packages.rglob("*")]:
        path.chmod(path.stat().st_mode & ~0o222)  # root may write all the same: `contents` tells
    with ended_after(LocalStack(work / ".local", environ=bare_environ)):
        yield found
    for path in [found.packages, *found.packages.rglob("*")]:
        path.chmod(path.stat().st_mode | 0o200)


def test_the_program_is_the_wheels(installed: Installed) -> None:
    python = installed.program.with_name("python")
    asked = "import ddpm_pipeline as p; from ddpm_pipeline.installation import checkout; print(p.__file__, checkout())"
    words = [str(python), "-c", asked]
    said = subprocess.run(
        words, cwd=installed.folder, env=installed.environ, stdout=subprocess.PIPE, text=True, check=True
    ).stdout
    assert said.split() == [str(installed.packages / "ddpm_pipeline/__init__.py"), "None"]
    assert installed.ddpm("--version") == f"ddpm {VERSION}\n"


def test_from_a_stack_to_verified_samples_in_an_empty_folder_with_packages_that_stay_as_installed(
    installed: Installed,
) -> None:
    before = installed.contents()
    assert "ray is ready" in installed.ddpm("up")
    assert "packages" in installed.ddpm("doctor", "--write")
    assert "packed: 1797 images" in installed.ddpm("pack", "demo")
    # A driver of the local stack sends its workers nothing: they have the wheel. A submitted job brings the program.
    assert "demo/1" in installed.ddpm("train", "demo", *SMALL)
    assert installed.python(PREDICTION) == "(2, 8, 8, 1) uint8\n"
    assert "complete" in installed.ddpm(
        "submit", "generate", "demo", "count=40", "shard_size=20", "batch_size=20"
    )
    # The same from a checkout, whose program travels to nodes that have the wheel.
    checkout = {"program": [sys.executable, *PROGRAM], "PYTHONPATH": str(REPOSITORY)}
    more = ("generate", "demo", "count=60", "shard_size=20", "batch_size=20")
    said = installed.ddpm("submit", *more, **checkout)
    assert f"has ddpm-pipeline {VERSION}; the job runs {ddpm_pipeline.__version__}" in said
    assert "60 images" in said
    assert "sound and complete" in installed.ddpm("verify", "s3://ddpm/samples/demo", "--regenerate", "2")
    assert "kubectl" in installed.ddpm("files", "deploy")
    assert "ddpm.schema.json" in installed.ddpm("schema")
    assert "ray" in installed.ddpm("down")
    assert installed.contents() == before
    made = {path.name for path in installed.folder.iterdir()}
    assert made == {".local", "deploy", "ddpm.schema.json"}
    assert not os.path.exists(installed.folder / "deploy/pyproject.toml")
