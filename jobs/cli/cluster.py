"""Commands that submit jobs to a cluster and manage them."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import typer

from ddpm_pipeline.jobs.cli.options import (
    CLUSTER,
    SECTION_OF_COMMAND,
    Against,
    AsJson,
    Config,
    Detach,
    DryRun,
    First,
    Last,
    Prefix,
    Words,
    end,
    examples,
)
from ddpm_pipeline.jobs.cluster_address import use_cluster
from ddpm_pipeline.jobs.runner import DONE, SECTIONS, JobArguments, print_settings, settings_of
from ddpm_pipeline.telemetry.terminal import echo

app = typer.Typer()
submit_app = typer.Typer(help="Run a job on the cluster that RAY_JOB_ADDRESS names.", no_args_is_help=True)
app.add_typer(submit_app, name="submit", rich_help_panel=CLUSTER)
Cluster = Annotated[
    str | None,
    typer.Option(
        "--cluster", "-k", help="Address of its dashboard, or its name in ~/.config/ddpm/clusters.yaml."
    ),
]
Job = Annotated[str, typer.Argument(help="Name of the job, as `ddpm submit` printed it.")]


_EXAMPLES = {
    "pack": "ddpm submit pack source=s3://team/photos.zip dest=s3://team/data/photos",
    "train": "ddpm submit train digits steps=500 --detach --cluster work",
    "distill": "ddpm submit distill digits-fast",
    "generate": "ddpm submit generate digits count=10000",
    "features": "ddpm submit features digits",
    "tune-sampler": "ddpm submit tune-sampler digits steps=[10,20]",
    "promote": "ddpm submit promote digits",
}
"""The jobs that take only settings, each with an example."""


def _register(command: str, example: str) -> None:
    @submit_app.command(
        command, epilog=examples(example), help=f"Submit `ddpm {command}` and follow it; Ctrl-C detaches."
    )
    def _(
        words: Words = None,
        config: Config = None,
        dry_run: DryRun = False,
        detach: Detach = False,
        cluster: Cluster = None,
    ) -> None:
        _submit(SECTION_OF_COMMAND.get(command, command), words, config, dry_run, detach, cluster)


for _command, _example in _EXAMPLES.items():
    _register(_command, _example)


@submit_app.command("nightly", epilog=examples("ddpm submit nightly digits --from 2026-03-01"))
def submit_nightly(
    words: Words = None,
    config: Config = None,
    first: First = None,
    last: Last = None,
    dry_run: DryRun = False,
    detach: Detach = False,
    cluster: Cluster = None,
) -> None:
    """Submit `ddpm nightly` and follow it; Ctrl-C detaches."""
    flags = [*(["--from", first] if first else []), *(["--to", last] if last else [])]
    _submit("nightly", words, config, dry_run, detach, cluster, lambda _: flags)


@submit_app.command("evaluate", epilog=examples("ddpm submit evaluate digits"))
def submit_evaluate(
    words: Words = None,
    config: Config = None,
    prefix: Prefix = None,
    against: Against = None,
    dry_run: DryRun = False,
    detach: Detach = False,
    cluster: Cluster = None,
) -> None:
    """Submit `ddpm evaluate` and follow it; Ctrl-C detaches."""

    def flags(call: JobArguments) -> list[str]:
        from ddpm_pipeline.jobs.evaluate import output_of

        compared = ["--against", against] if against else []
        return ["--prefix", prefix or output_of(call), *compared]

    _submit("evaluate", words, config, dry_run, detach, cluster, flags)


@app.command("jobs", rich_help_panel=CLUSTER, epilog=examples("ddpm jobs"))
def list_jobs(json: AsJson = False, cluster: Cluster = None) -> None:
    """The cluster's jobs, newest first."""

    def work() -> int:
        use_cluster(cluster)  # first: Ray reads its way of authentication when it is imported
        from ddpm_pipeline.jobs import ray_jobs

        return ray_jobs.print_jobs(ray_jobs.job_client(), json)

    end(work)


@app.command(rich_help_panel=CLUSTER, epilog=examples("ddpm logs -f train-1a2b3c4d5e"))
def logs(
    job: Job,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Follow it until it ends; Ctrl-C detaches.")
    ] = False,
    cluster: Cluster = None,
) -> None:
    """Output of a submitted job."""

    def work() -> int:
        use_cluster(cluster)  # first: Ray reads its way of authentication when it is imported
        from ddpm_pipeline.jobs import ray_jobs

        client = ray_jobs.job_client()
        ray_jobs.require_job(client, job)
        if follow:
            return ray_jobs.follow(client, job)
        ray_jobs.print_log(client, job)
        return DONE

    end(work)


@app.command(rich_help_panel=CLUSTER, epilog=examples("ddpm stop train-1a2b3c4d5e"))
def stop(
    job: Job,
    now: Annotated[
        bool, typer.Option("--now", help="Use Ray's own stop, which kills after seconds: work may be lost.")
    ] = False,
    cluster: Cluster = None,
) -> None:
    """Ask a submitted job to save and end."""

    def work() -> int:
        use_cluster(cluster)  # first: Ray reads its way of authentication when it is imported
        from ddpm_pipeline.jobs import ray_jobs
        from ddpm_pipeline.jobs.stop import stop_job

        client = ray_jobs.job_client()
        ray_jobs.require_job(client, job)
        return stop_job(client, job, now)

    end(work)


@app.command(rich_help_panel=CLUSTER, epilog=examples("ddpm replay", "ddpm replay /var/spool/ddpm"))
def replay(
    folder: Annotated[Path | None, typer.Argument(help="A spool; default: this machine's.")] = None,
) -> None:
    """Deliver metrics that ended jobs could not send to MLflow; exit code 1 if some remain or were lost."""

    def work() -> int:
        from ddpm_pipeline.jobs.replay import run

        return run(folder)

    end(work)


@app.command("janitor", hidden=True, epilog=examples("ddpm janitor"))  # the former name
@app.command(rich_help_panel=CLUSTER, epilog=examples("ddpm cleanup --idle-minutes 60"))
def cleanup(
    idle_minutes: Annotated[float, typer.Option(help="Only what showed no activity for this long.")] = 30.0,
) -> None:
    """Close runs of dead jobs that are still RUNNING, and remove delivered spools of this machine."""

    def work() -> int:
        from ddpm_pipeline.tracking import close_stale_runs, spool_folder, sweep_spools

        closed = close_stale_runs(idle_minutes=idle_minutes)
        for run in closed:
            echo(f"closed   {run}")
        swept = sweep_spools(spool_folder(), idle_minutes)
        echo(f"{len(closed)} runs closed, {len(swept)} delivered spools removed")
        return DONE

    end(work)


def _submit(
    job: str,
    words: Sequence[str] | None,
    config: Sequence[Path] | None,
    dry_run: bool,
    detach: bool,
    cluster: str | None,
    flags: Callable[[JobArguments], Sequence[str]] = lambda _: (),
) -> None:
    def work() -> int:
        use_cluster(cluster)
        from ddpm_pipeline.jobs.submit import submit as run

        call = JobArguments.of(words or [], config or [], dry_run)
        settings = settings_of(SECTIONS[job], job, call)
        if call.dry_run:
            print_settings({job: settings.model_dump(mode="json")}, call.as_json)
            return DONE
        return run(job, settings, detach, flags(call))

    end(work)
