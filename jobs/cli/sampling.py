"""Commands that make, check and evaluate samples."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from ddpm_pipeline.jobs.cli.options import (
    SAMPLES,
    Against,
    AsJson,
    Config,
    DryRun,
    Prefix,
    Words,
    end,
    end_job,
    examples,
    read_local_path,
)
from ddpm_pipeline.jobs.runner import JobArguments, run_job

app = typer.Typer()


@app.command(
    rich_help_panel=SAMPLES,
    epilog=examples(
        "ddpm generate digits count=10000",
        "ddpm generate digits model=digits/3 output=s3://ddpm/samples/of-version-3",
    ),
)
def generate(
    words: Words = None, config: Config = None, dry_run: DryRun = False, json: AsJson = False
) -> None:
    """Fill an output prefix with samples of a registered model. Makes only what is missing."""
    from ddpm_pipeline.config.generation import GenerateConfig
    from ddpm_pipeline.jobs.generate import estimate, run

    def work(call: JobArguments) -> int:
        made = partial(run, as_json=call.as_json)
        return run_job("generate", GenerateConfig, made, call, unit="images", estimate=estimate)

    end_job(work, words, config, dry_run, json)


@app.command(
    rich_help_panel=SAMPLES,
    epilog=examples(
        "ddpm verify s3://ddpm/samples/digits --regenerate 16",
        "ddpm verify s3://ddpm/samples/of-a-folder --regenerate 16 --model ./cifar10",
        "ddpm verify s3://ddpm/samples/digits --key signing.pem.pub",
        "ddpm verify s3://ddpm/samples/digits --num-workers 64",
    ),
)
def verify(
    prefix: Annotated[str, typer.Argument(help="Output prefix of a generation.")],
    regenerate: Annotated[int, typer.Option(help="Sample this many again and compare bytes.")] = 0,
    model: Annotated[
        str | None,
        typer.Option(help="Folder of the network, for --regenerate of a generation that used one."),
    ] = None,
    discard_damaged: Annotated[
        bool,
        typer.Option(
            help="Delete the records of damaged shards: the same generate command makes them again."
        ),
    ] = False,
    key: Annotated[
        str | None,
        typer.Option(help="Public key, a file or its line: what it has not signed is a problem."),
    ] = None,
    signed_for: Annotated[
        str | None, typer.Option(help="Of a copy: the prefix at which the original was signed.")
    ] = None,
    num_workers: Annotated[
        int, typer.Option(min=0, help="Check so many shards at a time as Ray tasks; 0 = in this process.")
    ] = 0,
    json: AsJson = False,
) -> None:
    """Recount, rehash and decode every object of a generation."""
    from ddpm_pipeline.jobs.verify import run

    end(lambda: run(prefix, regenerate, model, json, discard_damaged, key, signed_for, num_workers))


@app.command(
    rich_help_panel=SAMPLES,
    epilog=examples(
        "ddpm download s3://ddpm/samples/digits ./digits --unpack",
        "ddpm download s3://ddpm/data/digits ./digits-data",
        "ddpm download s3://ddpm/samples/digits ./digits --unpack --c2pa-key key.pem --c2pa-certificates chain.pem",
    ),
)
def download(
    prefix: Annotated[str, typer.Argument(help="A complete generation, or a data set with an index.")],
    folder: Annotated[
        Path,
        typer.Argument(
            help="Folder on this machine; created if missing.", metavar="FOLDER", parser=read_local_path
        ),
    ],
    unpack: Annotated[
        bool, typer.Option("--unpack", help="Also write the images as files, into FOLDER-images.")
    ] = False,
    c2pa_key: Annotated[
        Path | None, typer.Option(help="Private key, PEM: sign each unpacked image of a generation by C2PA.")
    ] = None,
    c2pa_certificates: Annotated[
        Path | None, typer.Option(help="The key's certificate and its issuers, PEM.")
    ] = None,
    json: AsJson = False,
) -> None:
    """Download a generation or a data set to a folder and check every shard. Fetches only what is missing."""
    from ddpm_pipeline.jobs.download import run

    end(lambda: run(prefix, str(folder), unpack, json, c2pa_key, c2pa_certificates))


@app.command(
    rich_help_panel=SAMPLES,
    epilog=examples(
        "ddpm gallery s3://ddpm/samples/digits --data s3://ddpm/data/digits",
        "ddpm gallery s3://ddpm/samples/student --beside s3://ddpm/samples/teacher --out ./compared",
    ),
)
def gallery(
    prefix: Annotated[str, typer.Argument(help="Output prefix of a generation, finished or in progress.")],
    out: Annotated[
        str | None, typer.Option(help="Folder or store prefix to write; default: ./NAME-gallery.")
    ] = None,
    beside: Annotated[
        str | None, typer.Option(help="Another generation from the same noise, to show beside it.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="What the model was trained on, to show the nearest images of it."),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Folder of the network, of a generation that used one.")
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="Show this many images, the first by index.")] = 50_000,
    json: AsJson = False,
) -> None:
    """Write static pages to look at a generation: images by class, and the command that draws each again."""
    from ddpm_pipeline.jobs.gallery import run

    end(lambda: run(prefix, out, beside, data, model, count, json))


@app.command(
    rich_help_panel=SAMPLES,
    epilog=examples(
        "ddpm evaluate digits",
        "ddpm evaluate digits --prefix s3://ddpm/samples/of-version-3 --against s3://ddpm/samples/digits",
    ),
)
def evaluate(
    words: Words = None,
    config: Config = None,
    prefix: Prefix = None,
    against: Against = None,
    dry_run: DryRun = False,
    json: AsJson = False,
) -> None:
    """Measure a complete generation against its reference data: distances, accuracy, near-copies."""
    from ddpm_pipeline.jobs.evaluate import run_call

    end_job(lambda call: run_call(call, prefix, against), words, config, dry_run, json)


@app.command(
    rich_help_panel=SAMPLES,
    epilog=examples("ddpm sample model=demo@champion count=30 output=look"),
)
def sample(words: Words = None, config: Config = None, dry_run: DryRun = False, json: AsJson = False) -> None:
    """Draw a few images into a local folder, without a cluster."""
    from ddpm_pipeline.config.generation import SampleConfig
    from ddpm_pipeline.jobs.generate import sample as run

    def work(call: JobArguments) -> int:
        return run_job("sample", SampleConfig, run, call, unit="steps")

    end_job(work, words, config, dry_run, json)


@app.command(
    "tune-sampler",
    rich_help_panel=SAMPLES,
    epilog=examples("ddpm tune-sampler digits steps=[10,20] kinds=[ddim,dpm++2m]"),
)
def tune_sampler(
    words: Words = None, config: Config = None, dry_run: DryRun = False, json: AsJson = False
) -> None:
    """Measure samplers, steps and guidance for a model: table, plot, and a recommended preset."""
    from ddpm_pipeline.jobs.tune import run_call

    end_job(run_call, words, config, dry_run, json)
