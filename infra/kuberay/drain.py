"""Before a pod ends, let the jobs of its cluster save.

    python -m ddpm_pipeline.infra.kuberay.drain head|worker SECONDS

The preStop hook of every Ray pod. Kubernetes' own SIGTERM would reach Ray, which kills its jobs. So the
head stops them through the job server, whose SIGTERM drivers answer with a checkpoint; and since a save needs the
workers, these stay until no job runs or the head is gone, when a whole cluster ends at once.
"""

import json
import os
import sys
import time
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

PORT = 8265
MOST_UNANSWERED = 3
_ENDED = {"STOPPED", "SUCCEEDED", "FAILED"}


def drain(
    address: str, token: str, limit_seconds: float, *, stop: bool = True, poll_seconds: float = 0.5
) -> list[str]:
    """Wait until no job runs, with `stop` after asking each to end; return those still running at the limit.

    A job whose stop request fails is asked again, and delays no other. Raises OSError when the job server does not
    answer several times in a row: one failure may only mean a busy machine.
    """
    deadline = time.monotonic() + limit_seconds
    stopped: set[str] = set()
    unanswered, running = 0, list[str]()
    while True:
        try:
            running = _running(address, token)
        except OSError:
            unanswered += 1
            if unanswered >= MOST_UNANSWERED or (not running and time.monotonic() > deadline):
                raise
        else:
            unanswered = 0
            if not running:
                return running
            for name in [name for name in running if stop and name not in stopped]:
                with suppress(OSError):
                    _ask(f"{address}/api/jobs/{name}/stop", token, b"")
                    stopped.add(name)
        if time.monotonic() > deadline:
            return running  # as the last answer had it
        time.sleep(poll_seconds)


def _running(address: str, token: str) -> list[str]:
    found = _ask(f"{address}/api/jobs/", token)
    return [
        job["submission_id"] for job in found if job.get("submission_id") and job.get("status") not in _ENDED
    ]


def _ask(url: str, token: str, body: bytes | None = None) -> Any:
    request = urllib.request.Request(url, data=body, headers={"Authorization": f"Bearer {token}"})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=10) as answer:
        return json.load(answer)


def main(argv: Sequence[str], environ: Mapping[str, str] = os.environ) -> int:
    """Exit code 0 when all jobs ended (for a worker also: when the head is gone), 1 otherwise, 2 for bad arguments."""
    if len(argv) != 2 or argv[0] not in ("head", "worker"):
        print("usage: python -m ddpm_pipeline.infra.kuberay.drain head|worker SECONDS", file=sys.stderr)
        return 2
    is_head, seconds = argv[0] == "head", float(argv[1])
    host = "127.0.0.1" if is_head else environ.get("FQ_RAY_IP", "127.0.0.1")  # KubeRay's name of the head
    address = environ.get("RAY_JOB_ADDRESS", f"http://{host}:{PORT}")
    try:
        left = drain(address, environ.get("RAY_AUTH_TOKEN", ""), seconds, stop=is_head)
    except OSError as error:
        if not is_head:
            return 0
        print(f"error: the job server does not answer ({error})", file=sys.stderr)
        return 1
    for name in left:
        print(f"error: {name} still runs after {seconds:.0f} s", file=sys.stderr)
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
