"""Handing a job to a Ray cluster, and watching it from here.

What travels is the program itself (three packages) and the settings, resolved here, so that the cluster needs
neither this folder nor these files. A job is named by what determines its result and by where that goes: submitting
the same twice joins the first.
"""

import hashlib
import json
import sys
import tempfile
from pathlib import Path

import yaml
from ray.job_submission import JobSubmissionClient

from jobs.agreement import require_agreement
from jobs.cluster import SUBMITTED, shared_variables
from jobs.progress import MODE_VARIABLE
from jobs.shell import DONE
from jobs.staging import stage_program
from jobs.watch import follow, job_client
from pipeline.config.base import Settings
from pipeline.config.generate import GenerateConfig
from pipeline.config.train import TrainConfig
from pipeline.errors import DamageError, UserError
from pipeline.generate.model import pin
from pipeline.store import open_store
from pipeline.track import TrackingError
from pipeline.track.lineage import SOURCE_VARIABLE, source_tags
from pipeline.train.prepare import prepare

SETTINGS_FILE = "settings.yaml"
SETTINGS_DIGEST = "settings_sha256"
NAME_DIGITS = 12
PLACE_DIGITS = 6


def submit(job: str, settings: Settings, detach: bool = False) -> int:
    """Submit `python -m jobs.<job>` with these settings and follow it. Returns the job's exit code.

    Raises UserError when no cluster answers, or refuses our token.
    """
    client = job_client()
    content = yaml.safe_dump({job: settings.model_dump(mode="json")}, sort_keys=False)
    require_agreement(client)
    base = _base_name(job, settings)
    digest = _digest(content)
    name, going = _job_name(client, base, digest)
    if going:
        print(f"joined   job {name}, which is already going on")
    else:
        with tempfile.TemporaryDirectory(prefix="ddpm-submit-") as folder:
            _stage(Path(folder), content)
            client.submit_job(
                entrypoint=f"python -m jobs.{job} --config {SETTINGS_FILE}",
                submission_id=name,
                metadata={"job": job, SETTINGS_DIGEST: digest},
                entrypoint_num_cpus=0,
                runtime_env={"working_dir": folder, "env_vars": _variables(name)},
            )
        print(f"job      {name}  {client.get_address()}/#/jobs/{name}", flush=True)
    if detach:
        print(f"next     ddpm logs -f {name}")
        return DONE
    return follow(client, name)


def _base_name(job: str, settings: Settings) -> str:
    """`train-IDENTITY-PLACE` or `generate-SPEC DIGEST-PLACE`: equal names, equal bits at the same place.

    Where this machine cannot reach what the work is made of, the settings name it instead, and the cluster decides
    whether they are right.
    """
    try:
        identity, place = _identity_and_place(settings)
        return f"{job}-{identity[:NAME_DIGITS]}-{_digest(place)[:PLACE_DIGITS]}"
    except (UserError, DamageError, TrackingError) as error:
        print(f"note     named by its settings, for here {error}", file=sys.stderr)
        return f"{job}-{_digest(settings.model_dump_json())[:NAME_DIGITS]}"


def _identity_and_place(settings: Settings) -> tuple[str, str]:
    """What determines the bits, and where they go: the same work at two places is two jobs."""
    if isinstance(settings, TrainConfig):
        plan = prepare(settings)
        return plan.identity, plan.store.uri
    if isinstance(settings, GenerateConfig):
        return pin(settings)[1].digest, open_store(settings.output).uri
    raise TypeError(f"{type(settings).__name__} cannot be submitted")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _job_name(client: JobSubmissionClient, base: str, digest: str) -> tuple[str, bool]:
    """The name to submit under, and whether the job of that name is going on.

    A finished job keeps its name for the life of the cluster: the next of the same work is its `-r2`. UserError when
    the one that is going on was given other settings (another count, other workers).
    """
    known = {str(info.submission_id): info for info in client.list_jobs()}
    name, again = base, 1
    while name in known:
        if not known[name].status.is_terminal():
            if (known[name].metadata or {}).get(SETTINGS_DIGEST) != digest:
                raise UserError(
                    f"job {name}: is at the same work with other settings; wait for it (ddpm logs -f {name}) "
                    f"or end it (ddpm stop {name}), then submit again"
                )
            return name, True
        again += 1
        name = f"{base}-r{again}"
    return name, False


def _stage(folder: Path, settings: str) -> None:
    """The program and its settings, and nothing else of the folders they lie in."""
    stage_program(folder)
    (folder / SETTINGS_FILE).write_text(settings, encoding="utf-8")


def _variables(name: str) -> dict[str, str]:
    """Where the services are; no keys, which Ray would show on its dashboard: a cluster's nodes have their own."""
    return {
        **shared_variables(),
        SUBMITTED: name,
        SOURCE_VARIABLE: json.dumps(source_tags()),
        MODE_VARIABLE: "json",
        "PYTHONUNBUFFERED": "1",
    }
