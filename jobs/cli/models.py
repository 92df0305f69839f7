"""Commands that train, compare, promote and convert models."""

from pathlib import Path
from typing import Annotated

import typer

from ddpm_pipeline.jobs.cli.options import (
    MODELS,
    AsJson,
    Config,
    DryRun,
    NewFolder,
    Words,
    end,
    end_job,
    examples,
)

app = typer.Typer()
features_app = typer.Typer(help="Feature networks, with which images are evaluated.", no_args_is_help=True)
app.add_typer(features_app, name="features", rich_help_panel=MODELS)
Local = Annotated[bool, typer.Option("--local", help="In this process, without Ray.")]


@app.command(
    rich_help_panel=MODELS,
    epilog=examples(
        "ddpm train digits",
        "ddpm train digits steps=500 workers.num_workers=1",
        "ddpm train --config photos.yaml --dry-run",
    ),
)
def train(
    words: Words = None,
    config: Config = None,
    dry_run: DryRun = False,
    json: AsJson = False,
    local: Local = False,
) -> None:
    """Train a model on the Ray cluster and register it. Resumes after an interruption."""
    from ddpm_pipeline.jobs.train import run_call

    end_job(lambda call: run_call(call, local=local), words, config, dry_run, json)


@app.command(
    rich_help_panel=MODELS,
    epilog=examples(
        "ddpm distill digits-fast",
        "ddpm distill digits-fast teacher=digits/3 steps=1000",
        "ddpm distill digits-fast data=null pairs=s3://ddpm/samples/digits",
    ),
)
def distill(
    words: Words = None,
    config: Config = None,
    dry_run: DryRun = False,
    json: AsJson = False,
    local: Local = False,
) -> None:
    """Train a model of one to four steps to follow a trained one, and register it. Resumes after an interruption."""
    from ddpm_pipeline.jobs.distill import run_call

    end_job(lambda call: run_call(call, local=local), words, config, dry_run, json)


@app.command(
    rich_help_panel=MODELS, epilog=examples("ddpm promote digits", "ddpm promote digits gate.count=2000")
)
def promote(
    words: Words = None, config: Config = None, dry_run: DryRun = False, json: AsJson = False
) -> None:
    """Compare the challenger with the champion under equal conditions; promote it only if it is better."""
    from ddpm_pipeline.jobs.promote import run_call

    end_job(run_call, words, config, dry_run, json)


@app.command(rich_help_panel=MODELS, epilog=examples("ddpm rollback digits", "ddpm rollback digits --to 3"))
def rollback(
    name: Annotated[str, typer.Argument(help="Registered model.")],
    to: Annotated[int | None, typer.Option("--to", min=1, help="Version to go back to.")] = None,
) -> None:
    """Make the champion's predecessor, or the version you name, champion again. Repeated, it does nothing."""
    from ddpm_pipeline.jobs.promote import rollback as run

    end(lambda: run(name, to=to))


@features_app.command("train", epilog=examples("ddpm features train digits"))
def features_train(
    words: Words = None, config: Config = None, dry_run: DryRun = False, json: AsJson = False
) -> None:
    """Train a small classifier on a labeled data set; its inner layer becomes the feature network."""
    from ddpm_pipeline.jobs.features import run_call

    end_job(run_call, words, config, dry_run, json)


@features_app.command("trust", epilog=examples("ddpm features trust digits"))
def features_trust(
    words: Words = None, config: Config = None, dry_run: DryRun = False, json: AsJson = False
) -> None:
    """Accept the feature network and the measured reference that a model's gate uses, as they are now."""
    from ddpm_pipeline.jobs.features import trust_call

    end_job(trust_call, words, config, dry_run, json)


@app.command("export", rich_help_panel=MODELS, epilog=examples("ddpm export demo@champion ./demo-diffusers"))
def export_model(
    model: Annotated[str, typer.Argument(help="name@alias, name/version, or a model folder.")],
    folder: NewFolder,
    form: Annotated[str, typer.Option("--format", help="Software to write for.")] = "diffusers",
) -> None:
    """Write a model as a folder that other software loads."""
    from ddpm_pipeline.jobs.model_exchange import export_model

    end(lambda: export_model(model, folder, form))


@app.command(
    rich_help_panel=MODELS,
    epilog=examples(
        "ddpm publish digits@champion ./digits-hub --license apache-2.0",
        "ddpm publish digits@champion ./digits-hub --samples s3://ddpm/samples/digits",
    ),
)
def publish(
    model: Annotated[str, typer.Argument(help="name@alias, name/version, or a model folder.")],
    folder: NewFolder,
    samples: Annotated[
        str | None,
        typer.Option(
            help="A complete generation of this model, whose contact sheet and metrics the card shows."
        ),
    ] = None,
    license: Annotated[
        str | None, typer.Option(help="Identifier of the license for the card's head.")
    ] = None,
    title: Annotated[str | None, typer.Option(help="Title of the card; default: the model's name.")] = None,
) -> None:
    """Write a model in the layout of a Hugging Face repository: card, preview, safetensors. Uploads nothing."""
    from ddpm_pipeline.jobs.model_exchange import publish_model

    end(lambda: publish_model(model, folder, title, license, samples))


@app.command("import", rich_help_panel=MODELS, epilog=examples("ddpm import ./ddpm-cifar10-32 ./cifar10"))
def import_model(
    source: Annotated[Path, typer.Argument(help="A diffusers directory: config JSON and safetensors.")],
    folder: NewFolder,
) -> None:
    """Read a diffusers directory into a model folder, which `model=` accepts."""
    from ddpm_pipeline.jobs.model_exchange import import_model

    end(lambda: import_model(source, folder))
