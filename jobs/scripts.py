"""Short scripts that run on a cluster as jobs of their own, with Ray's interpreter and without this program."""

import json
import re
import shlex
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from ray.job_submission import JobStatus, JobSubmissionClient

from ddpm_pipeline.errors import UserError
from ddpm_pipeline.jobs.staging import entrypoint, stage_launcher

POLL_SECONDS = 0.2
SCRIPT_FILE = "script.py"


def next_name(known: Mapping[str, object], base: str) -> str:
    """`base`, or `base-r2` and so on: a cluster keeps a finished job's name for as long as it lives."""
    name, again = base, 1
    while name in known:
        again += 1
        name = f"{base}-r{again}"
    return name


def names_of(known: Mapping[str, object], base: str) -> list[str]:
    """The known jobs that `next_name` named from `base`, oldest first."""
    form = re.compile(rf"{re.escape(base)}(?:-r(\d+))?")
    found = [(int(match[1] or 1), name) for name in known if (match := form.fullmatch(name))]
    return [name for _, name in sorted(found)]


def statuses(client: JobSubmissionClient) -> dict[str, JobStatus]:
    """Status of every job that was submitted under a name."""
    return {str(info.submission_id): info.status for info in client.list_jobs() if info.submission_id}


def start_script(
    client: JobSubmissionClient, name: str, script: str, words: Sequence[str], node: str | None = None
) -> None:
    """Submit `script` with its arguments under `name`; on the node with the address `node`, if one is given."""
    with tempfile.TemporaryDirectory(prefix="ddpm-script-") as folder:
        stage_launcher(Path(folder))
        (Path(folder) / SCRIPT_FILE).write_text(script, encoding="utf-8")
        client.submit_job(
            entrypoint=entrypoint(SCRIPT_FILE, *map(shlex.quote, words)),
            submission_id=name,
            entrypoint_num_cpus=0,
            entrypoint_resources=None if node is None else {f"node:{node}": 0.001},
            runtime_env={"working_dir": folder},
        )


def wait_for(client: JobSubmissionClient, name: str, seconds: float) -> JobStatus:
    """The status in which the job ended. UserError when it has not within `seconds`."""
    deadline = time.monotonic() + seconds
    while not (status := client.get_job_status(name)).is_terminal():
        if time.monotonic() > deadline:
            raise UserError(f"{client.get_address()}: job {name} does not end; see `ddpm logs {name}`")
        time.sleep(POLL_SECONDS)
    return status


def printed_by(client: JobSubmissionClient, name: str, mark: str) -> object | None:
    """What a script printed as JSON behind `mark`, in the last such line of its output; None without such a line."""
    lines = [line for line in client.get_job_logs(name).splitlines() if line.startswith(mark)]
    return json.loads(lines[-1].removeprefix(mark)) if lines else None
