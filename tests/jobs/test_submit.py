"""Handing jobs to a cluster: what travels, how a job is named, and whose exit code comes back."""

import json
from pathlib import Path

import pytest

from ddpm_pipeline.config.data import PackConfig
from ddpm_pipeline.data.index import load_index
from ddpm_pipeline.data.packing.pack_dataset import pack
from ddpm_pipeline.infra.local import LocalStack
from ddpm_pipeline.train.training_plan import plan_training
from tests.data.making import folder
from tests.generate.tiny import plan_of, settings, tiny_model
from tests.train.tiny import tiny

pytestmark = [pytest.mark.stack, pytest.mark.timeout(240)]


def test_a_submitted_pack_is_followed_to_its_end_and_its_exit_code_is_that_of_the_job(
    stack: LocalStack, prefix: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from ddpm_pipeline.jobs.submit import submit

    config = PackConfig(source=str(folder(tmp_path, {"cat": 5, "dog": 4})), dest=f"{prefix}/data")
    assert submit("pack", config, detach=True) == 0
    name = capfd.readouterr().out.split()[1]
    assert submit("pack", config) == 0  # the same settings: joins the running job
    assert f"joined   job {name}" in capfd.readouterr().out
    assert load_index(f"{prefix}/data").num_samples == 9
    assert submit("pack", PackConfig(source=f"{prefix}/absent", dest=f"{prefix}/none", channels=1)) == 2
    assert "/absent" in capfd.readouterr().out


@pytest.mark.long
def test_a_submitted_training_is_followed_to_its_end_and_joined_or_repeated_by_name(
    stack: LocalStack, prefix: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from ddpm_pipeline.errors import UserError
    from ddpm_pipeline.jobs.ray_jobs import job_client, job_table, print_jobs, require_job
    from ddpm_pipeline.jobs.submit import submit  # imports Ray, which reads the stack's settings

    pack(PackConfig(source="digits", dest=f"{prefix}/data", channels=1), None)
    config = tiny(f"{prefix}/data", f"{prefix}/runs", name="handed", track={"experiment": "tests-submit"})
    assert submit("train", config, detach=True) == 0
    name = capfd.readouterr().out.split()[1]
    assert name.rpartition("-")[0] == f"train-{plan_training(config).identity}"
    with pytest.raises(UserError, match=f"job {name} is already running this work with different settings"):
        submit("train", config.model_copy(update={"steps": 48}))
    assert submit("train", config) == 0  # the same settings: joins the running job
    said = capfd.readouterr()
    assert f"joined   job {name}" in said.out
    assert "handed/1" in said.out
    assert "24/24 steps (100%)" in said.err

    absent = PackConfig(source=f"{prefix}/absent", dest=f"{prefix}/none", channels=1)
    assert submit("pack", absent) == 2
    said = capfd.readouterr().out
    assert "/absent" in said
    failed = said.split()[1]
    assert submit("pack", absent) == 2
    assert f"job      {failed}-r2" in capfd.readouterr().out

    client = job_client()
    assert print_jobs(client, as_json=True) == 0
    listed = json.loads(capfd.readouterr().out)
    assert [job["status"] for job in listed if job["submission_id"] == name] == ["SUCCEEDED"]
    assert sum(job["submission_id"].startswith("versions-") for job in listed) == 1
    assert sum(failed in line for line in job_table(client)) == 2
    with pytest.raises(UserError, match="did you mean"):
        require_job(client, name + "x")


def test_the_same_work_at_two_places_is_two_jobs(
    stack: LocalStack, prefix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from ddpm_pipeline.jobs.submit import _base_name  # pyright: ignore[reportPrivateUsage]

    model = tiny_model(tmp_path / "model")
    here, there, slash = (
        _base_name("generate", settings(model, f"{prefix}/{place}")) for place in ("a", "b", "a/")
    )
    digest = plan_of(settings(model, f"{prefix}/a"))[0].digest
    assert here == slash != there
    assert {name.rpartition("-")[0] for name in (here, there)} == {f"generate-{digest[:12]}"}

    pack(PackConfig(source="digits", dest=f"{prefix}/data", channels=1), None)
    names = [_base_name("train", tiny(f"{prefix}/data", f"{prefix}/{runs}")) for runs in ("runs", "others")]
    assert len({name.rpartition("-")[0] for name in names}) == 1
    assert names[0] != names[1]
    assert capsys.readouterr().err == ""  # nothing was named by its settings


def test_only_the_program_and_its_settings_travel(tmp_path: Path) -> None:
    from ddpm_pipeline.jobs.submit import _stage  # pyright: ignore[reportPrivateUsage]

    _stage(tmp_path, "train: {}\n")
    assert {path.name for path in tmp_path.iterdir()} == {
        "ddpm_pipeline",
        "settings.yaml",
        "launch.sh",
    }
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in files if path.suffix == ".pyc" or path.name.startswith(".")]
    assert sum(path.stat().st_size for path in files) < 3_000_000
