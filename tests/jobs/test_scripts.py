"""Scripts on a cluster: which interpreter runs them, how they are named, and how a job is asked to end."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient, JobType

from ddpm_pipeline.jobs import stop
from ddpm_pipeline.jobs.scripts import names_of, next_name
from ddpm_pipeline.jobs.staging import entrypoint, stage_launcher
from ddpm_pipeline.jobs.stop import stop_job


def test_a_name_that_was_used_gets_a_number() -> None:
    known = dict.fromkeys(["a-1", "a-1-r2", "a-1-r10", "a-12", "a-1-rx"])
    assert names_of(known, "a-1") == ["a-1", "a-1-r2", "a-1-r10"]
    assert next_name(known, "a-1") == "a-1-r3"
    assert next_name(known, "b") == "b"


def launched(folder: Path, path: str, raylet: list[str]) -> str:
    """What a job's command says that prints its interpreter, where `raylet` are the words of an ancestor."""
    stage_launcher(folder)
    command = entrypoint("-c", "'import sys; print(sys.executable)'")
    ancestor = f"import subprocess; subprocess.run({command!r}, shell=True)"
    found = subprocess.run(
        [sys.executable, "-c", ancestor, *raylet],
        cwd=folder,
        env={"PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    return (found.stdout + found.stderr).strip()


@pytest.fixture
def tools(tmp_path: Path) -> str:
    """A PATH with the shell's tools and without any python."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("sh", "sed", "tr"):
        (folder / name).symlink_to(str(shutil.which(name)))
    return str(folder)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks /proc, which only Linux has")
def test_a_job_runs_by_the_interpreter_of_rays_workers(tools: str, tmp_path: Path) -> None:
    raylet = ["--port=1", f"--python_worker_command={sys.executable} default_worker.py --x=1"]
    assert launched(tmp_path, tools, raylet) == sys.executable


def test_without_any_python_it_says_so_in_one_line(tools: str, tmp_path: Path) -> None:
    said = launched(tmp_path, tools, [])
    assert said.startswith(f"error: no python on this node's PATH ({tools})")
    assert "\n" not in said


class Client:
    """A job server with one job; a script that is started there tells `answer`."""

    def __init__(self, status: JobStatus, answer: str) -> None:
        self.status, self.answer = status, answer
        self.scripts: dict[str, dict[str, Any]] = {}
        self.stopped: list[str] = []

    def get_job_status(self, name: str) -> JobStatus:
        return JobStatus.SUCCEEDED if name in self.scripts else self.status

    def list_jobs(self) -> list[Any]:
        return [SimpleNamespace(submission_id=name, status=JobStatus.SUCCEEDED) for name in self.scripts]

    def get_job_info(self, name: str) -> JobDetails:
        facts: dict[str, Any] = {"type": JobType.SUBMISSION, "entrypoint": "", "status": self.status}
        return JobDetails(**facts, driver_agent_http_address="http://10.77.0.3:52365")

    def submit_job(self, *, submission_id: str, **asked: Any) -> None:
        self.scripts[submission_id] = asked

    def get_job_logs(self, name: str) -> str:
        return self.answer

    def stop_job(self, name: str) -> bool:
        self.stopped.append(name)
        return True


def stopping(client: Client, now: bool = False) -> int:
    return stop_job(cast(JobSubmissionClient, client), "train-1", now)


def test_a_running_job_is_asked_itself_on_its_drivers_node(capsys: pytest.CaptureFixture[str]) -> None:
    client = Client(JobStatus.RUNNING, "::signaled 1\n")
    assert stopping(client) == stopping(client) == 0
    assert list(client.scripts) == ["stop-train-1", "stop-train-1-r2"]
    assert client.scripts["stop-train-1"]["entrypoint_resources"] == {"node:10.77.0.3": 0.001}
    assert client.stopped == []  # Ray's stop would kill it after seconds
    assert "stopping train-1: it saves and ends; run the same command to resume it" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("status", "answer", "now"),
    [
        (JobStatus.PENDING, "", False),
        (JobStatus.RUNNING, "::signaled 0\n", False),
        (JobStatus.RUNNING, "Killed\n", False),
        (JobStatus.RUNNING, "::signaled 1\n", True),
    ],
)
def test_what_rays_own_stop_may_lose_is_said(
    status: JobStatus, answer: str, now: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    client = Client(status, answer)
    assert stopping(client, now) == 0
    assert client.stopped == ["train-1"]
    said = capsys.readouterr().out
    assert "RAY_JOB_STOP_WAIT_TIME_S (3 s" in said
    assert "a training from its last checkpoint" in said
    assert ("cannot be signaled" in said) == (status == JobStatus.RUNNING and not now)


def test_a_job_that_has_ended_is_left_alone(capsys: pytest.CaptureFixture[str]) -> None:
    client = Client(JobStatus.SUCCEEDED, "")
    assert stopping(client) == 0
    assert client.stopped == []
    assert capsys.readouterr().out == "train-1 has ended already: SUCCEEDED\n"


# Version 0.1 submitted `python -m jobs.train`.
@pytest.mark.parametrize("module", ["ddpm_pipeline.jobs.cli", "jobs.train"])
def test_the_script_ends_the_driver_of_this_job_and_no_other_process(tmp_path: Path, module: str) -> None:
    file = tmp_path / f"{module.replace('.', '/')}.py"
    file.parent.mkdir(parents=True)
    file.write_text("import time; print(1, flush=True); time.sleep(60)")
    words = [sys.executable, "-m", module]

    def start(words: list[str], name: str) -> subprocess.Popen[bytes]:
        variables = {"DDPM_SUBMITTED_AS": name, "PYTHONPATH": str(tmp_path)}
        process = subprocess.Popen(words, env=variables, stdout=subprocess.PIPE, cwd=tmp_path)
        assert process.stdout is not None
        process.stdout.readline()
        return process

    name = f"train-{tmp_path.name}"
    worker = [sys.executable, "-c", f"import {module}"]
    processes = [start(words, name), start(words, f"{name}-r2"), start(worker, name)]
    try:
        script = stop._SCRIPT  # pyright: ignore[reportPrivateUsage]
        found = subprocess.run(
            [sys.executable, "-c", script, json.dumps(name)], capture_output=True, text=True, check=True
        )
        assert found.stdout == "::signaled 1\n"
        assert processes[0].wait(10) == -signal.SIGTERM
        assert [process.poll() for process in processes[1:]] == [None, None]
    finally:
        for process in processes:
            process.kill()
            process.wait()
