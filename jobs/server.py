"""Ray's client of a job server, with its failures reported in one line."""

import re
from collections.abc import AsyncIterator, Generator
from contextlib import contextmanager
from typing import Any

import aiohttp
import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from ddpm_pipeline.errors import Outage, UserError
from ddpm_pipeline.telemetry.redaction import redact

MOST_CHARACTERS = 200
REFUSED = re.compile(r"status code 4\d\d")  # Ray keeps the status in its message alone
UNREACHABLE = (requests.RequestException, AuthenticationError)
"""What Ray's client raises without an answer, or when the server rejects the token."""


class JobServer(JobSubmissionClient):
    """Ray's client, which raises Outage where the server does not answer or answers with an error."""

    def list_jobs(self) -> list[JobDetails]:
        with self._one_line_errors(RuntimeError):
            return super().list_jobs()

    def get_job_info(self, job_id: str) -> JobDetails:
        with self._one_line_errors(RuntimeError):
            return super().get_job_info(job_id)

    def get_job_status(self, job_id: str) -> JobStatus:
        with self._one_line_errors(RuntimeError):
            return super().get_job_status(job_id)

    def get_job_logs(self, job_id: str) -> str:
        with self._one_line_errors(RuntimeError):
            return super().get_job_logs(job_id)

    def stop_job(self, job_id: str) -> bool:
        with self._one_line_errors(RuntimeError):
            return super().stop_job(job_id)

    def submit_job(self, **request: Any) -> str:
        """Ray's own, with a refusal of this job (a status of 400 and more) as UserError."""
        with self._one_line_errors(RuntimeError):
            try:
                return super().submit_job(**request)
            except RuntimeError as error:
                if not REFUSED.search(str(error)):
                    raise
                job = request.get("submission_id")
                raise UserError(
                    f"{redact(self.get_address())}: does not take job {job} ({reason(error)})"
                ) from error

    async def tail_job_logs(self, job_id: str) -> AsyncIterator[str]:
        """The job's output in pieces, until it ends. Outage where the connection ends before."""
        pieces: Any = super().tail_job_logs(job_id)
        with self._one_line_errors(RuntimeError, aiohttp.ClientError, OSError):
            async for piece in pieces:
                yield piece

    @contextmanager
    def _one_line_errors(self, *others: type[Exception]) -> Generator[None]:
        try:
            yield
        except (*UNREACHABLE, *others) as error:
            raise Outage(
                f"{redact(self.get_address())}: the job server fails ({reason(error)}); once the cluster is up, run "
                "the same command again"
            ) from error


def reason(error: Exception) -> str:
    """An error's message, on one short line without secrets."""
    if isinstance(error, requests.ConnectionError):
        return "no connection"  # the message of requests names its own classes
    return redact(" ".join(str(error).split()))[:MOST_CHARACTERS] or type(error).__name__
