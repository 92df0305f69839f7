"""Ending a submitted job so that it can save first, however little time its cluster gives.

Ray's own stop kills a job after RAY_JOB_STOP_WAIT_TIME_S, by default 3 seconds, within which no checkpoint is
written. So the job's driver is asked first, by a script on its node that sends it SIGTERM; it then ends in its own
time, and Ray has no part in it.
"""

import json
from urllib.parse import urlsplit

from ray.job_submission import JobStatus, JobSubmissionClient

from jobs.ray_session import SUBMITTED
from jobs.runner import DONE
from jobs.scripts import next_name, start_script, statuses, told_by, wait_for
from pipeline.errors import UserError
from pipeline.telemetry.terminal import echo

ASK_SECONDS = 60.0
"""For the script to start; a node that is full of work takes its time."""
_MARK = "::asked "
_SCRIPT = f"""
import json, signal, sys, psutil
name, asked = json.loads(sys.argv[1]), 0
for process in psutil.process_iter():
    try:
        words = process.cmdline()
        # jobs.cli, or the job's own module where an earlier version submitted it
        driver = "-m" in words and words[words.index("-m") + 1].startswith("jobs.")
        if driver and process.environ().get("{SUBMITTED}") == name:
            process.send_signal(signal.SIGTERM)
            asked += 1
    except (psutil.Error, OSError, IndexError):
        continue
print("{_MARK}" + json.dumps(asked), flush=True)
"""


def stop_job(client: JobSubmissionClient, name: str, now: bool = False) -> int:
    """Ask a job to save and end, and say so; or that it has ended already. `now`: by Ray's own stop."""
    status = client.get_job_status(name)
    if status.is_terminal():
        echo(f"{name} has ended already: {status}")
        return DONE
    asked = not now and status == JobStatus.RUNNING and _ask(client, name)
    if asked:
        echo(f"asked {name} to save and end; run the same command to resume it")
    else:
        client.stop_job(name)
        echo(
            f"told Ray to end {name}: it kills the job after RAY_JOB_STOP_WAIT_TIME_S (3 s unless the cluster's owner "
            "changed it). The same command starts it again from what was saved: a training from its last checkpoint"
        )
    echo(f"next     ddpm logs -f {name}")
    return DONE


def _ask(client: JobSubmissionClient, name: str) -> bool:
    """Whether the job's driver was found and asked; says why not."""
    agent = client.get_job_info(name).driver_agent_http_address
    script = next_name(statuses(client), f"stop-{name}")
    try:
        start_script(client, script, _SCRIPT, [json.dumps(name)], node=urlsplit(agent or "").hostname)
        wait_for(client, script, ASK_SECONDS)
        if told_by(client, script, _MARK):
            return True
        reason = f"its process was not found (see ddpm logs {script})"
    except UserError as error:
        reason = " ".join(str(error).split())[:200]
    echo(f"note     {name} cannot be asked itself: {reason}")
    return False
