"""Create tonight's RayJob: a dated copy of a suspended one.

    python -m ddpm_pipeline.infra.kuberay.night PATTERN PREFIX

Runs in the CronJob's pod with an account that may read this one pattern and create RayJobs, nothing else. The date
is the scheduled one, also when the pod starts after midnight, and a second start on the same night finds the job
and does nothing.
"""

import json
import os
import re
import ssl
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

from ddpm_pipeline.errors import UserError

ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
TIMEOUT_SECONDS = 30.0
LOOK_SECONDS = 600
"""For a look at the pods of a job that failed."""
QUEUE_ANNOTATION, KUEUE_LABEL = "ddpm/queue", "kueue.x-k8s.io/queue-name"
"""The pattern names its queue by the annotation: with the label Kueue would start the pattern itself."""
_FIRST_MINUTE = 26_297_280  # 2020: a job name may end in digits of its own


@dataclass(frozen=True)
class Api:
    """The RayJobs of a namespace, as an account sees them."""

    url: str
    token: str
    context: ssl.SSLContext | None = None

    @classmethod
    def of_pod(cls, environ: Mapping[str, str] = os.environ, account: Path = ACCOUNT) -> "Api":
        """The API server as a pod finds it. Raises UserError outside a cluster."""
        host, port = environ.get("KUBERNETES_SERVICE_HOST"), environ.get("KUBERNETES_SERVICE_PORT", "443")
        if not host or not account.is_dir():
            raise UserError("KUBERNETES_SERVICE_HOST: not set; this program runs inside a Kubernetes pod")
        namespace = (account / "namespace").read_text().strip()
        return cls(
            f"https://{f'[{host}]' if ':' in host else host}:{port}/apis/ray.io/v1/namespaces/{namespace}/rayjobs",
            (account / "token").read_text().strip(),
            ssl.create_default_context(cafile=str(account / "ca.crt")),
        )

    def read(self, name: str) -> dict[str, Any]:
        """A RayJob. Raises UserError when it is absent or not ours to read."""
        return self._ask(f"{self.url}/{name}", None)

    def create(self, job: Mapping[str, Any]) -> bool:
        """Create a RayJob; False when one of its name exists already."""
        try:
            self._ask(self.url, json.dumps(job).encode())
        except FileExistsError:
            return False
        return True

    def _ask(self, url: str, body: bytes | None) -> dict[str, Any]:
        headers = {"Authorization": f"Bearer {self.token}", "Content-Type": "application/json"}
        request = urllib.request.Request(url, data=body, headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS, context=self.context) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            if error.code == 409:
                raise FileExistsError(url) from None
            raise UserError(f"{url}: the API server answers {error.code}; {_reason(error)}") from None
        except OSError as error:
            raise UserError(
                f"{url}: the API server does not answer ({error}); check the egress rule"
            ) from None


def scheduled_time(cron_job_pod: str, now: datetime) -> datetime:
    """When a CronJob's job was due: its name ends in the minutes since 1970 (kept by Kubernetes since 1.21).

    A job created manually has no such name and is due now.
    """
    digits = re.search(r"-(\d{8,})$", cron_job_pod)
    minutes = int(digits.group(1)) if digits else 0
    return datetime.fromtimestamp(minutes * 60, UTC) if minutes > _FIRST_MINUTE else now


def dated(pattern: Mapping[str, Any], prefix: str, night: datetime) -> dict[str, Any]:
    """The pattern as a job of its own: named by its date, such as ddpm-nightly-20260131, and not suspended.

    Its cluster is deleted when it is over, and the job itself after the pattern's `ttlSecondsAfterFinished`. Where the
    pattern names a queue of Kueue's, the job is put there, suspended and with the pattern's own way of ending.
    """
    queue = pattern["metadata"].get("annotations", {}).get(QUEUE_ANNOTATION)
    labels = {**pattern["metadata"].get("labels", {}), **({KUEUE_LABEL: queue} if queue else {})}
    spec = {**pattern["spec"], "suspend": bool(queue)}
    if not queue:
        spec.pop("shutdownAfterJobFinishes", None)
        spec["deletionStrategy"] = {"deletionRules": _deletion_rules(spec.pop("ttlSecondsAfterFinished", 0))}
    return {
        "apiVersion": pattern["apiVersion"],
        "kind": pattern["kind"],
        "metadata": {"name": f"{prefix}-{night:%Y%m%d}", "labels": labels},
        "spec": spec,
    }


def _deletion_rules(log_seconds: int) -> list[dict[str, Any]]:
    """The cluster goes at once, or, after a failure, when there was time to look at it; the job with its log later."""
    ended = ({"jobStatus": "SUCCEEDED"}, {"jobDeploymentStatus": "Failed"})
    after = {"DeleteCluster": (0, LOOK_SECONDS), "DeleteSelf": (log_seconds, max(LOOK_SECONDS, log_seconds))}
    return [
        {"policy": policy, "condition": {**condition, "ttlSeconds": seconds}}
        for policy, times in after.items()
        for condition, seconds in zip(ended, times, strict=True)
    ]


def launch(api: Api, pattern: str, prefix: str, environ: Mapping[str, str] = os.environ) -> str:
    """Create tonight's job from the pattern of that name; returns a line on what happened."""
    zone = ZoneInfo(environ.get("NIGHT_TIME_ZONE", "Etc/UTC"))
    due = scheduled_time(environ.get("JOB_NAME", ""), datetime.now(UTC))
    job = dated(api.read(pattern), prefix, due.astimezone(zone))
    name = job["metadata"]["name"]
    return f"created {name}" if api.create(job) else f"{name} exists already: nothing to do"


def _reason(error: urllib.error.HTTPError) -> str:
    try:
        return str(json.load(error).get("message", "no reason given"))[:300]
    except ValueError:
        return "no reason given"


def main(argv: Sequence[str]) -> int:
    """Exit code 0 when the night's job exists, 2 when it could not be created."""
    if len(argv) != 2:
        print("usage: python -m ddpm_pipeline.infra.kuberay.night PATTERN PREFIX", file=sys.stderr)
        return 2
    try:
        print(launch(Api.of_pod(), argv[0], argv[1]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
