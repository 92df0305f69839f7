"""Ending a submitted job so that it can save first, however little time its cluster gives.

Ray's own stop kills a job after RAY_JOB_STOP_WAIT_TIME_S, by default 3 seconds, within which no checkpoint is
written. So a script on its node first sends the job's driver SIGTERM; it then saves and ends by itself, without
Ray's stop.
"""

import json
from urllib.parse import urlsplit

from ray.job_submission import JobStatus, JobSubmissionClient

from ddpm_pipeline.errors import UserError
from ddpm_pipeline.jobs.ray_session import SUBMITTED
from ddpm_pipeline.jobs.runner import DONE
from ddpm_pipeline.jobs.scripts import next_name, printed_by, start_script, statuses, wait_for
from ddpm_pipeline.telemetry.terminal import echo

ASK_SECONDS = 60.0
"""For the script to start; slow on a busy node."""
_MARK = "::signaled "
_SCRIPT = f"""
import json, signal, sys, psutil
name, signaled = json.loads(sys.argv[1]), 0
for process in psutil.process_iter():
    try:
        words = process.cmdline()
        # jobs.cli, or the job's own module, where an earlier version submitted it
        driver = "-m" in words and words[words.index("-m") + 1].startswith(("ddpm_pipeline.jobs.", "jobs."))
        if driver and process.environ().get("{SUBMITTED}") == name:
            process.send_signal(signal.SIGTERM)
            signaled += 1
    except (psutil.Error, OSError, IndexError):
        continue
print("{_MARK}" + json.dumps(signaled), flush=True)
"""


def stop_job(client: JobSubmissionClient, name: str, now: bool = False) -> int:
    """Ask a job to save and end, and print that; or that it has ended already. `now`: by Ray's own stop."""
    status = client.get_job_status(name)
    if status.is_terminal():
        echo(f"{name} has ended already: {status}")
        return DONE
    if not now and status == JobStatus.RUNNING and _signal_driver(client, name):
        echo(f"stopping {name}: it saves and ends; run the same command to resume it")
    else:
        client.stop_job(name)
        echo(
            f"stopping {name} through Ray, which kills the job after RAY_JOB_STOP_WAIT_TIME_S (3 s unless the cluster "
            "sets another). The same command starts it again from what was saved: a training from its last checkpoint"
        )
    echo(f"next     ddpm logs -f {name}")
    return DONE


def _signal_driver(client: JobSubmissionClient, name: str) -> bool:
    """Whether the job's driver was found and signaled; prints why not."""
    agent = client.get_job_info(name).driver_agent_http_address
    script = next_name(statuses(client), f"stop-{name}")
    try:
        start_script(client, script, _SCRIPT, [json.dumps(name)], node=urlsplit(agent or "").hostname)
        wait_for(client, script, ASK_SECONDS)
        if printed_by(client, script, _MARK):
            return True
        reason = f"its process was not found (see ddpm logs {script})"
    except UserError as error:
        reason = " ".join(str(error).split())[:200]
    echo(f"note     {name} cannot be signaled: {reason}")
    return False
