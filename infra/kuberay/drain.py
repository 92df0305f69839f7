"""Ask this node's running jobs to save and end, and wait for them: `python -m infra.kuberay.drain SECONDS`.

The head's preStop hook. Kubernetes' own SIGTERM would reach Ray, which takes its jobs down with it; through the job
server each driver gets the SIGTERM that it answers with a checkpoint.
"""

import json
import os
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import Any

ADDRESS = "http://127.0.0.1:8265"
_ENDED = {"STOPPED", "SUCCEEDED", "FAILED"}


def drain(address: str, token: str, limit_seconds: float, poll_seconds: float = 0.5) -> list[str]:
    """Stop every running job and wait; return the names of those still running after `limit_seconds`.

    Raises OSError when the job server does not answer.
    """
    deadline = time.monotonic() + limit_seconds
    asked: set[str] = set()
    while True:
        running = [
            job["submission_id"]
            for job in _ask(f"{address}/api/jobs/", token)
            if job.get("submission_id") and job.get("status") not in _ENDED
        ]
        for name in running:
            if name not in asked:
                _ask(f"{address}/api/jobs/{name}/stop", token, b"")
                asked.add(name)
        if not running or time.monotonic() > deadline:
            return running
        time.sleep(poll_seconds)


def _ask(url: str, token: str, body: bytes | None = None) -> Any:
    request = urllib.request.Request(url, data=body, headers={"Authorization": f"Bearer {token}"})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=10) as answer:
        return json.load(answer)


def main(argv: Sequence[str]) -> int:
    """Exit code 0 when all jobs ended, 1 when some did not or nobody answers."""
    seconds = float(argv[0]) if argv else 35.0
    try:
        left = drain(
            os.environ.get("RAY_JOB_ADDRESS", ADDRESS), os.environ.get("RAY_AUTH_TOKEN", ""), seconds
        )
    except (OSError, urllib.error.URLError) as error:
        print(f"error: the job server does not answer ({error})", file=sys.stderr)
        return 1
    for name in left:
        print(f"error: {name} still runs after {seconds:.0f} s", file=sys.stderr)
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
