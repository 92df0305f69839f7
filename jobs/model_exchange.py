"""Models to and from other software, as folders on this machine."""

import shlex
from pathlib import Path

from ddpm_pipeline.config.model_card import ImageShape, ModelCard
from ddpm_pipeline.config.net import kind_of
from ddpm_pipeline.errors import UserError
from ddpm_pipeline.generate.loaded_model import load_model
from ddpm_pipeline.generate.model_source import find_model, registered_name
from ddpm_pipeline.jobs.progress_bar import progress_of
from ddpm_pipeline.jobs.runner import DONE
from ddpm_pipeline.nets.diffusers_weights import export_diffusers, import_diffusers
from ddpm_pipeline.nets.model_files import build_model, save_model
from ddpm_pipeline.nets.unet import UNet
from ddpm_pipeline.telemetry.terminal import echo

FORMATS = ("diffusers",)


def export_model(model: str, folder: Path, form: str) -> int:
    """Write `model` (name@alias, name/version or a folder) as a diffusers pipeline directory.

    Raises UserError naming what diffusers cannot express; nothing is written then.
    """
    if form not in FORMATS:
        raise UserError(f"--format {form}: unknown; known are {', '.join(FORMATS)}")
    _require_empty(folder)
    found = find_model(model)
    net = build_model(found.card, found.weights, "cpu", where=model)
    card = found.card
    if not isinstance(net, UNet):
        raise UserError(
            f"{model}: diffusers has no form for a network of kind {kind_of(card.net)}; only for unet"
        )
    export_diffusers(folder, net, card.schedule, card.objective, card.distillation)
    echo(f"exported {model} to {folder}")
    echo(
        f"next     python -c \"from diffusers import DDPMPipeline; DDPMPipeline.from_pretrained('{folder}')\""
    )
    return DONE


def import_model(source: Path, folder: Path) -> int:
    """Read a diffusers directory and write it as a model folder that `model=` accepts.

    Raises UserError naming the missing file, or the setting that this network does not support.
    """
    _require_empty(folder)
    imported = import_diffusers(source)
    config = imported.net.config
    card = ModelCard(
        net=config,
        schedule=imported.schedule,
        objective=imported.objective,
        image=ImageShape(channels=config.in_channels, size=config.image_size),
        distillation=imported.distillation,
    )
    save_model(folder, imported.net.state_dict(), card)
    echo(f"imported {source} to {folder}")
    echo(f"next     ddpm sample model={folder.resolve()}")
    return DONE


def publish_model(
    model: str, folder: Path, title: str | None, license: str | None, samples: str | None
) -> int:
    """Write `model` as a folder in the layout of a Hugging Face model repository, and print how to upload it.

    Raises UserError before anything is written for samples of another model.
    """
    from ddpm_pipeline.evaluate.model_publication import publish

    _require_empty(folder)
    with progress_of("preview", "images") as progress:
        made = publish(
            load_model(model),
            folder,
            title=title or registered_name(model) or Path(model).resolve().name,
            license=license,
            samples=samples,
            progress=progress,
        )
    echo(f"written  {folder}: README.md, preview.png, weights as safetensors")
    if made.without_diffusers is not None:
        echo(f"note     without a diffusers pipeline: {made.without_diffusers}")
    if license is None:
        echo("note     README.md names no license; --license adds one")
    echo(f"next     read README.md, then: hf upload OWNER/NAME {shlex.quote(str(folder))}")
    return DONE


def _require_empty(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: exists and is not an empty folder; name one that is empty or new")
