"""Jobs watched from here: what of their output a user sees."""

from collections.abc import AsyncIterator
from typing import Any, cast

import pytest
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient, JobType

from ddpm_pipeline.jobs.ray_jobs import follow, print_log

RAY = (
    "\x1b[36m(TrainController pid=7)\x1b[0m [2026-11-22 12:56:37,684 E 30940 31262] core_worker.cc:2465: Actor with "
    "class name: 'PreemptionWatcher' and ID: '8fc672' has constructor arguments in the object store and "
    "max_restarts > 0. If the arguments in the object store go out of scope or are lost, the actor restart will fail."
)
OUTPUT = "\n".join(
    [
        "first",
        RAY,
        '::progress {"what": "generate", "unit": "images", "done": 5, "total": 10, "note": ""}',
        "[2026-11-22 12:56:37,684 E 1 2] core_worker.cc:9: The actor died: it has run out of memory",
        "\x1b[1mlast\x1b[0m",
        "",
    ]
)
SEEN = ["first", OUTPUT.splitlines()[3], "last"]


class Client:
    """Stands for a job server whose jobs have ended but for `going`."""

    def get_job_logs(self, job: str) -> str:
        return OUTPUT

    async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
        for start in range(0, len(OUTPUT), 50):  # pieces end anywhere
            yield OUTPUT[start : start + 50]

    def get_job_status(self, job: str) -> JobStatus:
        return JobStatus.RUNNING if job == "going" else JobStatus.SUCCEEDED

    def stop_job(self, job: str) -> bool:
        assert job == "going"
        return True

    def get_job_info(self, job: str) -> JobDetails:
        facts: dict[str, Any] = {"type": JobType.SUBMISSION, "entrypoint": "", "status": JobStatus.SUCCEEDED}
        return JobDetails(**facts)


@pytest.fixture
def client() -> JobSubmissionClient:
    return cast(JobSubmissionClient, Client())


def test_a_log_is_shown_without_what_ray_says_of_its_own_actors(
    client: JobSubmissionClient, capsys: pytest.CaptureFixture[str]
) -> None:
    print_log(client, "generate-1")
    assert capsys.readouterr().out.splitlines() == SEEN


def test_a_job_is_followed_by_its_lines_and_its_progress(
    client: JobSubmissionClient, capsys: pytest.CaptureFixture[str]
) -> None:
    assert follow(client, "generate-1") == 0
    said = capsys.readouterr()
    assert said.out.splitlines() == SEEN
    assert "5/10 images (50%)" in said.err
