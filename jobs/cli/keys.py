"""Commands about keys and signatures."""

from pathlib import Path
from typing import Annotated

import typer

from ddpm_pipeline.jobs.cli.options import SAMPLES, AsJson, end, examples, read_local_path

app = typer.Typer()
keys_app = typer.Typer(
    help="Keys that sign generations and decisions of the gate (Ed25519).", no_args_is_help=True
)
app.add_typer(keys_app, name="keys", rich_help_panel=SAMPLES)


@keys_app.command("create", epilog=examples("ddpm keys create ~/.config/ddpm/signing.pem"))
def keys_create(
    file: Annotated[
        Path,
        typer.Argument(
            help="New file for the private key; the public one is FILE.pub.",
            metavar="FILE",
            parser=read_local_path,
        ),
    ],
) -> None:
    """Make a key pair; the private key's file has mode 0600."""
    from ddpm_pipeline.jobs.signing import create

    end(lambda: create(file))


@keys_app.command("show", epilog=examples("ddpm keys show", "ddpm keys show signing.pem.pub"))
def keys_show(
    file: Annotated[
        Path | None, typer.Argument(help="A private or public key; default: the configured one.")
    ] = None,
    json: AsJson = False,
) -> None:
    """Print a key's public part and its id."""
    from ddpm_pipeline.jobs.signing import show

    end(lambda: show(file, json))


@app.command(rich_help_panel=SAMPLES, epilog=examples("ddpm sign s3://ddpm/samples/digits"))
def sign(prefix: Annotated[str, typer.Argument(help="Output prefix of a complete generation.")]) -> None:
    """Verify a generation that was made without a key, and sign it."""
    from ddpm_pipeline.jobs.signing import sign as run

    end(lambda: run(prefix))
