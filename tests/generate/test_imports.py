"""Commands that only look at something start without the packages that compute."""

import json
import subprocess
import sys
from pathlib import Path

from tests.generate.tiny import fill, settings, tiny_model

COMPUTE = {"torch", "mlflow", "matplotlib", "PIL", "pyarrow", "sklearn", "safetensors", "webdataset"}
DOCUMENTS = [
    "evaluate.document",
    "generate.completeness",
    "generate.done_records",
    "generate.stored_generation",
    "generate.generation_status",
    "generate.heartbeat",
    "generate.layout",
    "generate.manifest",
    "generate.plan",
    "generate.prefix_spec",
    "generate.spec",
    "nightly.history",
    "nightly.retention",
]
COMMANDS = """
import contextlib, json, sys
from ddpm_pipeline.jobs.cli import main
for words in json.loads(sys.argv[1]):
    sys.argv[1:] = words
    with contextlib.suppress(SystemExit):
        main()
print("LOADED", *{name.partition(".")[0] for name in sys.modules})
"""


def loaded(code: str, *arguments: str, folder: Path) -> set[str]:
    """Top-level packages that a program has imported by its end."""
    environment = {"PYTHONPATH": str(Path.cwd()), "HOME": str(folder), "PATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=folder, env=environment, capture_output=True, text=True
    )
    last = done.stdout.splitlines()[-1] if done.stdout else ""
    assert last.startswith("LOADED "), done.stderr
    return set(last.split()[1:])


def test_document_modules_import_nothing_that_computes(tmp_path: Path) -> None:
    modules = ", ".join(f"ddpm_pipeline.{name}" for name in DOCUMENTS)
    code = f'import sys, {modules}; print("LOADED", *{{n.partition(".")[0] for n in sys.modules}})'
    assert loaded(code, folder=tmp_path) & {*COMPUTE, "ray", "boto3"} == set()


def test_help_and_status_import_neither_ray_nor_what_computes(tmp_path: Path) -> None:
    uri = f"file://{tmp_path}/out"
    fill(settings(tiny_model(tmp_path / "model"), uri, count=12))
    commands = json.dumps([["--help"], ["status", uri]])
    assert loaded(COMMANDS, commands, folder=tmp_path) & {*COMPUTE, "ray", "boto3"} == set()


def test_settings_are_refused_before_anything_that_computes_is_imported(tmp_path: Path) -> None:
    jobs = ("train", "distill", "generate", "sample", "evaluate", "promote", "nightly")
    commands = json.dumps([[job, "digits", "no_such_setting=1"] for job in jobs])
    assert loaded(COMMANDS, commands, folder=tmp_path) & {*COMPUTE, "ray"} == set()


def test_a_gallery_without_training_data_needs_no_torch(tmp_path: Path) -> None:
    uri = f"file://{tmp_path}/out"
    fill(settings(tiny_model(tmp_path / "model"), uri, count=12))
    found = loaded(COMMANDS, json.dumps([["gallery", uri]]), folder=tmp_path) & {*COMPUTE, "ray", "boto3"}
    assert (tmp_path / "out-gallery/index.html").exists()
    assert found == {"PIL"}


def test_commands_about_submitted_jobs_import_nothing_that_computes(tmp_path: Path) -> None:
    packages = loaded(COMMANDS, json.dumps([["jobs"], ["logs", "train-1"]]), folder=tmp_path)
    assert "ray" in packages
    assert packages & COMPUTE == set()
