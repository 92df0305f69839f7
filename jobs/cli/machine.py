"""Commands about this machine: the local stack, the demo, and diagnosis."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from ddpm_pipeline.jobs.cli.options import MACHINE, AsJson, NewFolder, Store, end, examples, read_local_path
from ddpm_pipeline.jobs.runner import DONE, LOCAL
from ddpm_pipeline.telemetry.terminal import echo

app = typer.Typer()
config_app = typer.Typer(help="Settings files.", no_args_is_help=True)
app.add_typer(config_app, name="config", rich_help_panel=MACHINE)


@app.command(rich_help_panel=MACHINE, epilog=examples("ddpm demo", "ddpm demo --store file"))
def demo(store: Store = None) -> None:
    """Run everything once: stack, data, training, generation, verification, evaluation."""
    from ddpm_pipeline.jobs.demo import demo as run

    end(lambda: run(store))


@app.command(
    rich_help_panel=MACHINE,
    epilog=examples("ddpm up", "ddpm up --store file", 'ddpm up --schedule "digits --at 02:00"'),
)
def up(
    store: Store = None,
    schedule: Annotated[
        str | None,
        typer.Option(
            metavar="WORDS", help="Run `ddpm schedule WORDS` as a service of the stack; `off` ends it."
        ),
    ] = None,
) -> None:
    """Start the local stack (S3, MLflow, Ray) on loopback, unless it is running."""
    from ddpm_pipeline.infra.local import LocalStack, sign_in

    def work() -> int:
        words = None if schedule is None else [] if schedule == "off" else shlex.split(schedule)
        LocalStack(LOCAL, store=store, schedule=words).up(report=_print_line)
        echo(*sign_in(LOCAL))
        echo("next     ddpm pack digits   (or, all at once: ddpm demo)")
        return DONE

    end(work)


@app.command(
    rich_help_panel=MACHINE, epilog=examples("ddpm status", "ddpm status s3://ddpm/samples/digits --json")
)
def status(
    prefix: Annotated[str | None, typer.Argument(help="Output prefix; without it, the local stack.")] = None,
    json: AsJson = False,
) -> None:
    """Print services, jobs, nights, disk and versions at a glance; or the progress of the generation at PREFIX."""
    from ddpm_pipeline.jobs.status import generation_status, stack_status

    end(lambda: stack_status(json) if prefix is None else generation_status(prefix, json))


@app.command(rich_help_panel=MACHINE, epilog=examples("ddpm dashboard", "ddpm dashboard --open"))
def dashboard(
    open_: Annotated[
        bool, typer.Option("--open", help="Also open the pages in this machine's browser.")
    ] = False,
    cluster: Annotated[
        str | None,
        typer.Option("--cluster", "-k", help="Address of its dashboard, or its name in clusters.yaml."),
    ] = None,
    json: AsJson = False,
) -> None:
    """Print the addresses of Ray's dashboard and MLflow, and where their token and password are."""
    from ddpm_pipeline.jobs.dashboard import dashboard as run

    end(lambda: run(cluster, open_, json))


@app.command(rich_help_panel=MACHINE, epilog=examples("ddpm doctor", "ddpm doctor --write --json"))
def doctor(
    json: AsJson = False,
    write: Annotated[bool, typer.Option("--write", help="Also try writing to the data root.")] = False,
) -> None:
    """Check credentials, buckets, MLflow, Ray, GPUs, versions, clock and disk, and print what to fix."""
    from ddpm_pipeline.jobs.doctor import doctor as run

    end(lambda: run(json, write))


@app.command(rich_help_panel=MACHINE, epilog=examples("ddpm down"))
def down() -> None:
    """Stop what `ddpm up` started, and nothing else. Data stays."""
    from ddpm_pipeline.infra.local import LocalStack

    def work() -> int:
        echo(f"stopped: {', '.join(LocalStack(LOCAL).down()) or 'nothing was running'}")
        echo("next     ddpm up   (with the same data), or ddpm clean   (removes it)")
        return DONE

    end(work)


@app.command(rich_help_panel=MACHINE, epilog=examples("ddpm clean"))
def clean() -> None:
    """Stop the local stack and remove its data, logs and keys."""
    from ddpm_pipeline.infra.local import LocalStack

    def work() -> int:
        LocalStack(LOCAL).remove()
        others = sorted(path.name for path in LOCAL.iterdir()) if LOCAL.is_dir() else []
        echo(f"removed: the stack's data, logs and keys in {LOCAL}")
        if others:
            echo(f"note     {LOCAL} stays: it also holds {', '.join(others[:5])}")
        return DONE

    end(work)


@app.command(rich_help_panel=MACHINE, epilog=examples("ddpm schema .ddpm", "ddpm schema docs/schema"))
def schema(
    folder: Annotated[
        Path,
        typer.Argument(
            help="Folder for the schema; created if missing.", metavar="FOLDER", parser=read_local_path
        ),
    ] = Path("."),
) -> None:
    """Write the JSON schema with which editors complete and check settings files."""
    from ddpm_pipeline.jobs.config_docs import write_schema

    end(lambda: write_schema(folder))


@config_app.command(
    "diff", epilog=examples("ddpm config diff digits demo", "ddpm config diff digits photos.yaml")
)
def config_diff(
    a: Annotated[str, typer.Argument(help="A preset, or a .yaml file.", show_default=False)],
    b: Annotated[str, typer.Argument(help="Another one.", show_default=False)],
    json: AsJson = False,
) -> None:
    """Print the settings in which two presets or files differ, bases and defaults included; exit code 1 if any."""
    from ddpm_pipeline.jobs.config_diff import diff

    end(lambda: diff(a, b, json))


@app.command(rich_help_panel=MACHINE, epilog=examples("ddpm files ./deploy"))
def files(folder: NewFolder) -> None:
    """Write the files to deploy with: Kubernetes manifests, Docker files, dashboards, S3 policies, systemd units."""
    from ddpm_pipeline.jobs.deployment_files import write_files

    end(lambda: write_files(folder))


def _print_line(line: str) -> None:
    echo(line)
