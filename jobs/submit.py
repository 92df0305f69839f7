"""Submitting a job to a Ray cluster, and following it from here.

What travels is the program itself, of this version, and the settings, resolved here, so that the cluster needs neither
this folder nor these files. Where its nodes have another version installed, a line says so. A job is named by what
determines its result and by its destination: submitting the same twice joins the first.

Whether the cluster has the software that the job needs is checked before it is submitted. Ray and Python are
reported by the head, the packages by a small job, `versions-SESSION`, which runs once in a cluster's life and whose
output is read again from then on; one that failed or was evicted is run again.
"""

import hashlib
import json
import shlex
import sys
import tempfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import cast

import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from ray.job_submission import JobStatus, JobSubmissionClient

from ddpm_pipeline import __version__
from ddpm_pipeline.config.base import Settings
from ddpm_pipeline.config.data import PackConfig
from ddpm_pipeline.config.distill_job import DistillConfig
from ddpm_pipeline.config.evaluation import EvaluateConfig, FeaturesConfig, PromoteConfig, TuneConfig
from ddpm_pipeline.config.generation import GenerateConfig
from ddpm_pipeline.config.nights import NightlyConfig
from ddpm_pipeline.config.training import TrainConfig
from ddpm_pipeline.errors import DamageError, UserError
from ddpm_pipeline.features.reference_set import data_root
from ddpm_pipeline.generate.model_source import resolve_model
from ddpm_pipeline.installation import DISTRIBUTION, declared_requirements
from ddpm_pipeline.jobs.cluster_address import ask
from ddpm_pipeline.jobs.progress_bar import MODE_VARIABLE
from ddpm_pipeline.jobs.ray_jobs import follow, job_client
from ddpm_pipeline.jobs.ray_session import SUBMITTED, shared_variables
from ddpm_pipeline.jobs.runner import DONE, PROGRAM, command_of
from ddpm_pipeline.jobs.scripts import names_of, next_name, printed_by, start_script, statuses, wait_for
from ddpm_pipeline.jobs.staging import entrypoint, stage_launcher, stage_program
from ddpm_pipeline.store import open_store
from ddpm_pipeline.telemetry.redaction import redact
from ddpm_pipeline.telemetry.terminal import echo
from ddpm_pipeline.tracking import TrackingError
from ddpm_pipeline.tracking.lineage import SOURCE_VARIABLE, source_tags
from ddpm_pipeline.train.training_plan import plan_training

SETTINGS_FILE = "settings.yaml"
SETTINGS_DIGEST = "settings_sha256"
PREFIX_FLAG = "--prefix"
"""Before the generation that `evaluate` measures."""
NAME_DIGITS = 12
PLACE_DIGITS = 6
SAME_BITS = ("torch", "numpy", "pillow")
"""Packages whose version decides how numbers are rounded or images encoded: must be equal here and on the cluster."""
_MARK = "::versions "
_PROBE_SECONDS = 120.0
_PROBE = f"""
import json, sys
from importlib import metadata
found = {{}}
for name in json.loads(sys.argv[1]):
    try:
        found[name] = metadata.version(name)
    except metadata.PackageNotFoundError:
        found[name] = None
print("{_MARK}" + json.dumps(found), flush=True)
"""


def submit(
    job: str,
    settings: Settings,
    detach: bool = False,
    flags: Sequence[str] = (),
    has_our_software: bool = False,
) -> int:
    """Submit `ddpm JOB` with these settings and flags, and follow it. Returns the job's exit code.

    `has_our_software`: the cluster was started by this program's own Python, so its packages need no job that lists
    them, which takes as long as any job to start.
    Raises UserError when no cluster answers, or refuses our token.
    """
    client = job_client()
    settings = _portable(settings)
    content = yaml.safe_dump({job: settings.model_dump(mode="json")}, sort_keys=False)
    if not has_our_software:
        require_compatible_cluster(client)
    base = _base_name(job, settings, flags)
    digest = _digest("\0".join([content, *flags]))
    name, running = _job_name(client, base, digest)
    if running:
        echo(f"joined   job {name}, which is already running")
    else:
        _start(client, name, job, content, flags, digest)
        echo(f"job      {name}  {client.get_address()}/#/jobs/{name}")
    if detach:
        echo(f"next     ddpm logs -f {name}")
        return DONE
    return follow(client, name)


def _start(
    client: JobSubmissionClient, name: str, job: str, content: str, flags: Sequence[str], digest: str
) -> None:
    """Submit the program and its settings. UserError when the cluster does not take them."""
    with tempfile.TemporaryDirectory(prefix="ddpm-submit-") as folder:
        _stage(Path(folder), content)
        client.submit_job(
            entrypoint=entrypoint(
                *PROGRAM, *command_of(job), "--config", SETTINGS_FILE, *map(shlex.quote, flags)
            ),
            submission_id=name,
            metadata={"job": job, SETTINGS_DIGEST: digest},
            entrypoint_num_cpus=0,
            runtime_env={"working_dir": folder, "env_vars": _variables(name)},
        )


def _portable(settings: Settings) -> Settings:
    """The settings for another machine. Ray keeps what is submitted: no secret may be in it."""
    if isinstance(settings, NightlyConfig) and settings.webhook is not None:
        echo(
            "note     nightly.webhook is not sent: its path may be a secret, and Ray keeps a job's settings; the exit "
            "code reports a failed night",
            error=True,
        )
        settings = settings.model_copy(update={"webhook": None})
    if isinstance(settings, PackConfig) and Path(settings.source).exists() and settings.source != "digits":
        settings = settings.model_copy(update={"source": str(Path(settings.source).resolve())})
    content = settings.model_dump(mode="json")
    if redact(content) != content:
        raise UserError(
            "settings: hold a secret (a password in an address, a key), which Ray would keep and show; leave it to "
            "the environment of the cluster's nodes"
        )
    return settings


def _base_name(job: str, settings: Settings, flags: Sequence[str] = ()) -> str:
    """`train-IDENTITY-PLACE` or `generate-SPEC DIGEST-PLACE`: equal names, equal bits at the same place. Other jobs
    are named by their place alone, where two of them would be in each other's way.

    Where this machine cannot reach what the work is made of, the settings name it instead, and the cluster decides
    whether they are right.
    """
    try:
        identity, place = _identity_and_place(settings, flags)
        return "-".join([job, *([identity[:NAME_DIGITS]] if identity else []), _digest(place)[:PLACE_DIGITS]])
    except (UserError, DamageError, TrackingError) as error:
        echo(f"note     named by its settings, because {error}", error=True)
        return f"{job}-{_digest(settings.model_dump_json())[:NAME_DIGITS]}"


def _identity_and_place(settings: Settings, flags: Sequence[str]) -> tuple[str | None, str]:
    """Digest of what determines the bits, if any, and their destination: equal work at two places is two jobs."""
    match settings:
        case TrainConfig():
            plan = plan_training(settings)
            return plan.identity, plan.store.uri
        case DistillConfig():
            return None, f"{open_store(settings.runs).uri}/{settings.name}"
        case GenerateConfig():
            return resolve_model(settings)[1].digest, open_store(settings.output).uri
        case PackConfig():
            return None, open_store(settings.dest).uri
        case NightlyConfig():
            return None, open_store(settings.generate.output).uri
        case FeaturesConfig():
            return None, open_store(settings.output or f"{data_root(settings.data)}/features").uri
        case PromoteConfig():
            return None, f"models:/{settings.model}@{settings.champion}"
        case TuneConfig():
            return None, f"{open_store(settings.output).uri} {settings.model}"
        case EvaluateConfig():
            return None, open_store(flags[flags.index(PREFIX_FLAG) + 1]).uri
        case _:
            raise TypeError(f"{type(settings).__name__} cannot be submitted")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _job_name(client: JobSubmissionClient, base: str, digest: str) -> tuple[str, bool]:
    """The name to submit under, and whether a job of that name is running.

    A finished job keeps its name for the life of the cluster: the next of the same work is its `-r2`. UserError when
    the running one has different settings (another count, other workers).
    """
    known = {str(info.submission_id): info for info in client.list_jobs()}
    for name in names_of(known, base):
        if not known[name].status.is_terminal():
            if (known[name].metadata or {}).get(SETTINGS_DIGEST) != digest:
                raise UserError(
                    f"job {name} is already running this work with different settings; wait for it "
                    f"(ddpm logs -f {name}) or end it (ddpm stop {name}), then submit again"
                )
            return name, True
    return next_name(known, base), False


def _stage(folder: Path, settings: str) -> None:
    """The program and its settings, and nothing else of their folders."""
    stage_program(folder)
    stage_launcher(folder)
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


def require_compatible_cluster(client: JobSubmissionClient) -> None:
    """Raise UserError, in one line, for the first difference that would fail a job or change its bits."""
    ours = {"Ray": metadata.version("ray"), "Python": ".".join(map(str, sys.version_info[:2]))}
    version_info = ask("/api/version")
    python = ask("/api/v0/cluster_metadata").get("data", {}).get("pythonVersion", "")
    theirs = {"Ray": version_info.get("ray_version", ""), "Python": ".".join(python.split(".")[:2])}
    for name, version in ours.items():
        if theirs[name] and theirs[name] != version:
            raise UserError(
                f"{client.get_address()}: runs {name} {theirs[name]}, here is {version}; submit from the cluster's "
                f"own image, or use {name} {theirs[name]} here"
            )
    packages = _packages(client, version_info.get("session_name", "unknown"))
    for fault in package_faults(packages):
        raise UserError(
            f"{client.get_address()}: {fault}; rebuild the cluster's image from this version's lock"
        )
    theirs = packages.get(DISTRIBUTION)
    if theirs not in (None, __version__):
        echo(
            f"note     the cluster has {DISTRIBUTION} {theirs}; the job runs {__version__}, which is sent along"
        )


def package_faults(theirs: dict[str, str | None]) -> list[str]:
    """What is wrong with a cluster's packages, a line each: missing, too old or new, or rounding differently."""
    faults: list[str] = []
    for need in requirements():
        version = theirs.get(need.name)
        if version is None:
            faults.append(f"{need.name} is not installed on the cluster")
        elif not need.specifier.contains(version, prereleases=True):
            faults.append(f"has {need.name} {version}, this program needs {need.specifier}")
        elif need.name in SAME_BITS and _public(version) != _public(metadata.version(need.name)):
            faults.append(f"has {need.name} {version}, here is {metadata.version(need.name)}")
    return faults


def requirements() -> list[Requirement]:
    """What the program itself requires on this platform, without extras. UserError where it is not installed."""
    lines = declared_requirements()
    if lines is None:
        raise UserError(
            f"{DISTRIBUTION}: is not installed here, its folder is on PYTHONPATH only, so that its requirements are "
            "unknown; pip install it, then submit"
        )
    declared = [Requirement(line) for line in lines]
    return [
        Requirement(f"{need.name}{need.specifier or SpecifierSet()}")
        for need in declared
        if need.marker is None or need.marker.evaluate({"extra": ""})
    ]


def _packages(client: JobSubmissionClient, session: str) -> dict[str, str | None]:
    """The output of a probe that succeeded, or of one that runs or is started now."""
    base = f"versions-{session.removeprefix('session_')}"
    known = statuses(client)
    for name in names_of(known, base):
        if known[name] == JobStatus.SUCCEEDED and (found := printed_by(client, name, _MARK)) is not None:
            return cast("dict[str, str | None]", found)
    active = [name for name in names_of(known, base) if not known[name].is_terminal()]
    name = active[0] if active else next_name(known, base)
    if not active:
        names = [DISTRIBUTION, *(need.name for need in requirements())]
        start_script(client, name, _PROBE, [json.dumps(names)])
    status = wait_for(client, name, _PROBE_SECONDS)
    found = printed_by(client, name, _MARK)
    if status != JobStatus.SUCCEEDED or found is None:
        raise UserError(f"{client.get_address()}: cannot list its packages; see `ddpm logs {name}`")
    return cast("dict[str, str | None]", found)


def _public(version: str) -> str:
    """A version without its build's label, such as +cpu."""
    return version.partition("+")[0]
