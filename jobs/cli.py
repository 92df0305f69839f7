"""`ddpm`: the command line over the jobs and the local stack."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from infra.local.state import StoreKind
from jobs.shell import (
    DONE,
    FAILED,
    LOCAL,
    REFUSED,
    Call,
    guarded,
    print_settings,
    run_job,
    settings_of,
    use_running_stack,
)
from pipeline.config.base import Settings

app = typer.Typer(
    name="ddpm",
    help="Train diffusion models on a Ray cluster, and fill buckets with verified samples.",
    epilog="First steps:  ddpm up  ·  ddpm pack digits  ·  ddpm train digits  ·  ddpm generate digits",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
submit_app = typer.Typer(help="Run a job on the cluster that RAY_JOB_ADDRESS names.", no_args_is_help=True)
app.add_typer(submit_app, name="submit")

Words = Annotated[
    list[str] | None,
    typer.Argument(metavar="[PRESET] [KEY=VALUE]...", help="A preset, then settings that differ from it."),
]
Config = Annotated[list[Path] | None, typer.Option("--config", "-c", help="YAML file; may be repeated.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the resolved settings and stop.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print as JSON.")]
Detach = Annotated[bool, typer.Option("--detach", "-d", help="Do not wait for the job.")]
Store = Annotated[
    StoreKind | None, typer.Option(help="Object store of the stack; default: as before, first s3.")
]


@app.command(
    epilog="Example:  ddpm pack digits   ·   ddpm pack source=photos.zip dest=s3://b/photos image_size=64"
)
def pack(words: Words = None, config: Config = None, dry_run: DryRun = False, json: AsJson = False) -> None:
    """Pack images (a folder, a zip, or the built-in digits) into shards."""
    from jobs.pack import run_call

    _end(lambda: run_call(Call.of(words or [], config or [], dry_run, json)))


@app.command(epilog="Example:  ddpm train digits steps=500 workers.num_workers=1")
def train(
    words: Words = None,
    config: Config = None,
    dry_run: DryRun = False,
    json: AsJson = False,
    local: Annotated[bool, typer.Option("--local", help="In this process, without Ray.")] = False,
) -> None:
    """Train a model on the Ray cluster and register it. Goes on where it was interrupted."""
    from jobs.train import run_call

    _end(lambda: run_call(Call.of(words or [], config or [], dry_run, json), alone=local))


@app.command(
    epilog="Example:  ddpm generate digits model=digits/3 count=5000 output=s3://ddpm/samples/five-thousand"
)
def generate(
    words: Words = None, config: Config = None, dry_run: DryRun = False, json: AsJson = False
) -> None:
    """Fill an output prefix with samples of a registered model. Redoes only what is missing."""
    from jobs.generate import run
    from pipeline.config.generate import GenerateConfig

    def work() -> int:
        call = Call.of(words or [], config or [], dry_run, json)
        return run_job("generate", GenerateConfig, run, call, unit="images")

    _end(work)


@submit_app.command("train", epilog="Example:  ddpm submit train digits")
def submit_train(
    words: Words = None, config: Config = None, dry_run: DryRun = False, detach: Detach = False
) -> None:
    """Submit a training and follow it; Ctrl-C detaches."""
    from pipeline.config.train import TrainConfig

    _submit("train", TrainConfig, lambda: Call.of(words or [], config or [], dry_run), detach)


@submit_app.command("generate", epilog="Example:  ddpm submit generate digits count=10000")
def submit_generate(
    words: Words = None, config: Config = None, dry_run: DryRun = False, detach: Detach = False
) -> None:
    """Submit a generation and follow it; Ctrl-C detaches."""
    from pipeline.config.generate import GenerateConfig

    _submit("generate", GenerateConfig, lambda: Call.of(words or [], config or [], dry_run), detach)


@app.command()
def verify(
    prefix: Annotated[str, typer.Argument(help="Output prefix of a generation.")],
    regenerate: Annotated[int, typer.Option(help="Sample this many again and compare bytes.")] = 0,
    json: AsJson = False,
) -> None:
    """Recount, rehash and decode everything a generation says it made."""
    from jobs.verify import main as run

    flags = ["--json"] if json else []
    _end(lambda: run([prefix, "--regenerate", str(regenerate), *flags]))


@app.command()
def up(store: Store = None) -> None:
    """Start the local stack (S3, MLflow, Ray) on loopback, or find it running."""
    from infra.local import LocalStack

    def work() -> int:
        LocalStack(LOCAL, store=store).up(say=_say)
        print("next     ddpm pack digits   (or, all at once: ddpm demo)")
        return DONE

    _end(work)


@app.command()
def status(
    prefix: Annotated[str | None, typer.Argument(help="Output prefix; without it, the local stack.")] = None,
    json: AsJson = False,
) -> None:
    """What runs: the local stack, or how far the generation at PREFIX is."""
    from jobs.status import generation_status, stack_status

    _end(lambda: stack_status(json) if prefix is None else generation_status(prefix, json))


@app.command(epilog="Example:  ddpm doctor --write")
def doctor(
    json: AsJson = False,
    write: Annotated[bool, typer.Option("--write", help="Also try writing to the data root.")] = False,
) -> None:
    """Check credentials, buckets, MLflow, Ray, GPUs, versions, clock and disk, and say what to fix."""
    from jobs.doctor import doctor as run

    _end(lambda: run(json, write))


@app.command()
def down() -> None:
    """Stop what `ddpm up` started, and nothing else. Data stays."""
    from infra.local import LocalStack

    def work() -> int:
        print(f"stopped: {', '.join(LocalStack(LOCAL).down()) or 'nothing was running'}")
        return DONE

    _end(work)


@app.command()
def clean() -> None:
    """Stop the local stack and remove its data, logs and keys."""
    from infra.local import LocalStack

    def work() -> int:
        LocalStack(LOCAL).remove()
        print(f"removed: {LOCAL}")
        return DONE

    _end(work)


@app.command()
def demo(store: Store = None) -> None:
    """From nothing to a verified bucket: stack, data, training, generation, verification."""
    from jobs.demo import demo as run

    _end(lambda: run(store))


@app.command()
def logs(
    job: Annotated[str, typer.Argument(help="Name of the job, as `ddpm submit` printed it.")],
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Until it ends; Ctrl-C detaches.")] = False,
) -> None:
    """Output of a submitted job."""

    def work() -> int:
        from jobs import submit

        client = submit.job_client()
        submit.require_job(client, job)
        if follow:
            return submit.follow(client, job)
        print(client.get_job_logs(job), end="")
        return DONE

    _end(work)


@app.command("jobs")
def list_jobs() -> None:
    """The cluster's jobs, newest first."""

    def work() -> int:
        from jobs import submit

        for line in submit.job_table(submit.job_client()):
            print(line)
        return DONE

    _end(work)


@app.command()
def stop(job: Annotated[str, typer.Argument(help="Name of the job.")]) -> None:
    """Ask a submitted job to save and end."""

    def work() -> int:
        from jobs import submit

        client = submit.job_client()
        submit.require_job(client, job)
        client.stop_job(job)
        print(f"asked {job} to end; the same command starts it again where it was")
        return DONE

    _end(work)


features_app = typer.Typer(help="Feature networks, by which images are judged.", no_args_is_help=True)
app.add_typer(features_app, name="features")


@features_app.command("train", epilog="Example:  ddpm features train digits")
def features_train(
    words: Words = None, config: Config = None, dry_run: DryRun = False, json: AsJson = False
) -> None:
    """Train a small classifier on a labelled data set; its inner layer becomes the feature network."""
    from jobs.features import run_call

    _end(lambda: run_call(Call.of(words or [], config or [], dry_run, json)))


@app.command(
    epilog="Example:  ddpm evaluate digits   ·   ddpm evaluate digits --prefix s3://ddpm/samples/five"
)
def evaluate(
    words: Words = None,
    config: Config = None,
    prefix: Annotated[str | None, typer.Option(help="Generation; without it, the preset's.")] = None,
    dry_run: DryRun = False,
    json: AsJson = False,
) -> None:
    """Measure a complete generation against its reference data: distances, accuracy, near-copies."""
    from jobs.evaluate import run_call

    _end(lambda: run_call(Call.of(words or [], config or [], dry_run, json), prefix))


@app.command()
def replay(
    folder: Annotated[Path | None, typer.Argument(help="A spool; default: this machine's.")] = None,
) -> None:
    """Deliver metrics to MLflow that ended jobs could not."""

    def work() -> int:
        from pipeline.track import replay_all
        from pipeline.train.diary import spool_folder

        left = replay_all(folder or spool_folder())
        for place, points in left.items():
            print(f"{place}: {'delivered' if points == 0 else f'{points} points still wait'}")
        print(f"{len(left)} spools looked at")
        return FAILED if any(left.values()) else DONE

    _end(work)


@app.command()
def janitor(
    idle_minutes: Annotated[float, typer.Option(help="Without a sign of life for this long.")] = 30.0,
) -> None:
    """Close runs that say RUNNING although their job is dead."""

    def work() -> int:
        from pipeline.track import close_stale_runs

        closed = close_stale_runs(idle_minutes=idle_minutes)
        for run in closed:
            print(f"closed   {run}")
        print(f"{len(closed)} runs closed")
        return DONE

    _end(work)


@app.command("tune-sampler", epilog="Example:  ddpm tune-sampler digits steps=[10,20] kinds=[ddim,dpm++2m]")
def tune_sampler(
    words: Words = None, config: Config = None, dry_run: DryRun = False, json: AsJson = False
) -> None:
    """Measure samplers, steps and guidance for a model: table, plot, and a recommended preset."""
    from jobs.tune import run_call

    _end(lambda: run_call(Call.of(words or [], config or [], dry_run, json)))


@app.command(epilog="Example:  ddpm promote digits   ·   ddpm promote digits gate.count=2000")
def promote(
    words: Words = None, config: Config = None, dry_run: DryRun = False, json: AsJson = False
) -> None:
    """Compare the challenger with the champion on equal terms; it takes over only if it is better."""
    from jobs.promote import run_call

    _end(lambda: run_call(Call.of(words or [], config or [], dry_run, json)))


@app.command()
def rollback(name: Annotated[str, typer.Argument(help="Registered model.")]) -> None:
    """Make the champion's predecessor champion again."""
    from jobs.promote import rollback as run

    _end(lambda: run(name))


@app.command(
    epilog="Example:  ddpm nightly digits   ·   ddpm nightly digits --from 2026-03-01 --to 2026-03-03"
)
def nightly(
    words: Words = None,
    config: Config = None,
    first: Annotated[str | None, typer.Option("--from", help="First night, YYYY-MM-DD.")] = None,
    last: Annotated[str | None, typer.Option("--to", help="Last night, YYYY-MM-DD.")] = None,
    dry_run: DryRun = False,
    json: AsJson = False,
) -> None:
    """Let the champion fill the nights that are due, measure them, file them. Does nothing when all is done."""
    from jobs.nightly import run_call

    _end(lambda: run_call(Call.of(words or [], config or [], dry_run, json), first, last))


@app.command(epilog="Example:  ddpm schedule digits --at 02:00 --now")
def schedule(
    words: Words = None,
    config: Config = None,
    at: Annotated[str, typer.Option(help="Time of day, HH:MM in UTC.")] = "02:00",
    now: Annotated[bool, typer.Option("--now", help="Run once at the start, too.")] = False,
) -> None:
    """Run the nightly job every night, in the foreground, until it is ended."""
    from jobs.schedule import schedule as run

    _end(lambda: run(Call.of(words or [], config or []), at, now))


@app.command(epilog="Example:  ddpm index 's3://bucket/set/train-{000..099}.tar'")
def index(
    uri: Annotated[str, typer.Argument(help="Prefix or brace pattern of .tar or .tar.gz shards.")],
    label_field: Annotated[
        str | None, typer.Option(help="Field of a sample's json that holds its class.")
    ] = None,
    pixels: Annotated[
        bool, typer.Option("--pixels", help="Decode every image, for channel statistics.")
    ] = False,
) -> None:
    """Make the index of WebDataset tars that are already there."""
    from jobs.dataset import index as run

    _end(lambda: run(uri, label_field, pixels))


@app.command(epilog="Example:  ddpm inspect s3://ddpm/data/digits --sheet digits.png")
def inspect(
    uri: Annotated[str, typer.Argument(help="Prefix or brace pattern of shards.")],
    sheet: Annotated[Path, typer.Option(help="Where to put a contact sheet.")] = Path("inspection.png"),
    label_field: Annotated[
        str | None, typer.Option(help="Field of a sample's json that holds its class.")
    ] = None,
    json: AsJson = False,
) -> None:
    """Say what a data set holds, and what is damaged in it."""
    from jobs.dataset import look

    _end(lambda: look(uri, sheet, label_field, json))


@app.command(epilog="Example:  ddpm sample model=demo@champion count=30 output=look")
def sample(words: Words = None, config: Config = None, dry_run: DryRun = False, json: AsJson = False) -> None:
    """Draw a few images into a local folder, without a cluster."""
    from jobs.sample import run
    from pipeline.config.generate import SampleConfig

    def work() -> int:
        call = Call.of(words or [], config or [], dry_run, json)
        return run_job("sample", SampleConfig, run, call, unit="steps")

    _end(work)


@app.command("export", epilog="Example:  ddpm export demo@champion ./demo-diffusers")
def export_model(
    model: Annotated[str, typer.Argument(help="name@alias, name/version, or a model folder.")],
    folder: Annotated[Path, typer.Argument(help="Folder to write; new or empty.")],
    form: Annotated[str, typer.Option("--format", help="Software to write for.")] = "diffusers",
) -> None:
    """Write a model as a folder that other software loads."""
    from jobs.exchange import export

    _end(lambda: export(model, folder, form))


@app.command("import", epilog="Example:  ddpm import ./ddpm-cifar10-32 ./cifar10")
def import_model(
    source: Annotated[Path, typer.Argument(help="A diffusers directory: config JSON and safetensors.")],
    folder: Annotated[Path, typer.Argument(help="Model folder to write; new or empty.")],
) -> None:
    """Read a diffusers directory into a model folder, which `model=` accepts."""
    from jobs.exchange import take_in

    _end(lambda: take_in(source, folder))


@app.command(epilog="Example:  ddpm figures ./pictures --image photo.png")
def figures(
    folder: Annotated[Path, typer.Argument(help="Folder for the pictures; made if need be.")],
    image: Annotated[Path | None, typer.Option(help="RGB image for the forward process.")] = None,
) -> None:
    """Draw the forward and reverse process, the schedules, and the samplers' order."""
    from jobs.figures import run

    _end(lambda: run(image, folder))


def main() -> None:
    """The `ddpm` program."""
    if guarded(_with_stack) != DONE:
        raise SystemExit(REFUSED)
    app()


def _with_stack() -> int:
    use_running_stack()
    return DONE


def _submit(job: str, model: type[Settings], called: Callable[[], Call], detach: bool) -> None:
    def work() -> int:
        from jobs.submit import submit as run

        call = called()
        settings = settings_of(model, job, call)
        if call.dry_run:
            print_settings({job: settings.model_dump(mode="json")}, call.as_json)
            return DONE
        return run(job, settings, detach)

    _end(work)


def _end(work: Callable[[], int]) -> NoReturn:
    """Run a command's work and leave with its exit code; what a user can put right is one line."""
    raise typer.Exit(guarded(work))


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    main()
