"""Before a job is handed over, the cluster's software is compared with what the job needs."""

# pyright: reportPrivateUsage=false

import json
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.job_submission import JobStatus

from ddpm_pipeline import __version__
from ddpm_pipeline.config.training import TrainConfig
from ddpm_pipeline.errors import UserError
from ddpm_pipeline.infra.local.stack_state import State
from ddpm_pipeline.jobs import demo, submit
from ddpm_pipeline.jobs.runner import JobArguments
from ddpm_pipeline.jobs.submit import package_faults, require_compatible_cluster, requirements

HERE: dict[str, str | None] = {need.name: metadata.version(need.name) for need in requirements()}
VERSION = {"ray_version": metadata.version("ray"), "session_name": "session_2026"}


class Client:
    """As much of a job server as the comparison asks, with packages of a test's choice."""

    def __init__(
        self, packages: dict[str, str | None] | None, status: JobStatus = JobStatus.SUCCEEDED
    ) -> None:
        self.packages, self.status = packages, status
        self.submitted: list[str] = []
        self.ended: dict[str, JobStatus] = {}
        """Jobs of before."""

    def get_address(self) -> str:
        return "http://ray.example:8265"

    def list_jobs(self) -> list[Any]:
        now = dict.fromkeys(self.submitted, self.status)
        return [SimpleNamespace(submission_id=n, status=s) for n, s in {**self.ended, **now}.items()]

    def submit_job(self, *, submission_id: str, **_: object) -> None:
        self.submitted.append(submission_id)

    def get_job_status(self, _: str) -> JobStatus:
        return self.status

    def get_job_logs(self, _: str) -> str:
        return "hello\n" + ("" if self.packages is None else f"::versions {json.dumps(self.packages)}\n")


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, Any]]:
    """The head's answers, for a test to change."""
    python = ".".join(map(str, sys.version_info[:3]))
    told: dict[str, dict[str, Any]] = {
        "/api/version": dict(VERSION),
        "/api/v0/cluster_metadata": {"data": {"pythonVersion": python}},
    }
    monkeypatch.setattr(submit, "ask", lambda path: told[path])
    return told


def refusal(client: Client) -> str:
    with pytest.raises(UserError) as caught:
        require_compatible_cluster(client)  # pyright: ignore[reportArgumentType]
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith("http://ray.example:8265: ")
    return text


@pytest.mark.usefixtures("answers")
def test_a_cluster_like_this_machine_is_accepted_and_asked_only_once() -> None:
    client = Client(HERE)
    require_compatible_cluster(client)  # pyright: ignore[reportArgumentType]
    require_compatible_cluster(client)  # pyright: ignore[reportArgumentType]
    assert client.submitted == ["versions-2026"]


def test_another_ray_or_python_is_refused_before_anything_is_submitted(answers: dict[str, Any]) -> None:
    client = Client(HERE)
    answers["/api/version"]["ray_version"] = "2.9.0"
    assert "runs Ray 2.9.0, here is" in refusal(client)
    answers["/api/version"] = dict(VERSION)
    answers["/api/v0/cluster_metadata"]["data"]["pythonVersion"] = "3.8.1"
    assert "runs Python 3.8, here is" in refusal(client)
    assert client.submitted == []


@pytest.mark.usefixtures("answers")
@pytest.mark.parametrize(
    ("package", "version", "said"),
    [
        ("torch", "2.9.0+cu126", "has torch 2.9.0+cu126, here is"),
        ("mlflow", "2.0.0", "has mlflow 2.0.0, this program needs"),
        ("webdataset", None, "webdataset is not installed on the cluster"),
    ],
)
def test_a_missing_unfit_or_differently_rounding_package_is_refused(
    package: str, version: str | None, said: str
) -> None:
    assert said in refusal(Client({**HERE, package: version}))


@pytest.mark.usefixtures("answers")
def test_a_cluster_that_cannot_list_its_packages_is_refused() -> None:
    assert "ddpm logs versions-2026" in refusal(Client(None))
    assert "cannot list" in refusal(Client(HERE, JobStatus.FAILED))


@pytest.mark.usefixtures("answers")
@pytest.mark.parametrize("end", [JobStatus.FAILED, JobStatus.STOPPED])
def test_a_probe_that_failed_closes_the_cluster_to_nobody(end: JobStatus) -> None:
    client = Client(HERE)
    client.ended = {"versions-2026": end, "versions-2026-r2": end, "versions-2025": JobStatus.SUCCEEDED}
    require_compatible_cluster(client)  # pyright: ignore[reportArgumentType]
    assert client.submitted == ["versions-2026-r3"]


@pytest.mark.usefixtures("answers")
@pytest.mark.parametrize(
    ("version", "said"), [("0.0.9", "0.0.9; the job runs"), (__version__, ""), (None, "")]
)
def test_another_version_of_the_program_on_the_cluster_is_told_in_a_line(
    version: str | None, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    require_compatible_cluster(Client({**HERE, "ddpm-pipeline": version}))  # pyright: ignore[reportArgumentType]
    printed = capsys.readouterr().out
    assert said in printed
    assert len(printed.splitlines()) == (1 if said else 0)


@pytest.mark.usefixtures("answers")
def test_a_program_that_is_not_installed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submit, "declared_requirements", lambda: None)
    with pytest.raises(UserError, match="ddpm-pipeline: is not installed here"):
        require_compatible_cluster(Client(HERE))  # pyright: ignore[reportArgumentType]


def test_a_builds_label_and_a_harmless_difference_are_no_faults() -> None:
    torch = str(HERE["torch"]).partition("+")[0]
    assert package_faults({**HERE, "torch": f"{torch}+cu130", "rich": "99.0"}) == []


@pytest.mark.parametrize(("external", "asks"), [((), False), (("ray",), True)])
def test_the_demo_asks_only_a_cluster_that_is_not_its_own_for_its_packages(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, external: tuple[str, ...], asks: bool
) -> None:
    asked: list[object] = []
    started: list[str] = []
    monkeypatch.setattr(submit, "job_client", lambda: Client(None))
    monkeypatch.setattr(submit, "require_compatible_cluster", asked.append)
    monkeypatch.setattr(submit, "_base_name", lambda *_: "train-1")
    monkeypatch.setattr(submit, "_start", lambda _client, name, *_: started.append(name))
    monkeypatch.setattr(submit, "follow", lambda *_: 0)
    monkeypatch.setattr(demo, "read_state", lambda _root: State(external=external))
    monkeypatch.setenv("DDPM_ROOT", tmp_path.as_uri())
    assert demo._submit("train", TrainConfig, JobArguments(preset="demo")) == 0
    assert (bool(asked), started) == (asks, ["train-1"])
