"""What one image file says about its origin: `ddpm inspect FILE`."""

import dataclasses

from ddpm_pipeline.data.formats.provenance import read_mark
from ddpm_pipeline.errors import DamageError, UserError
from ddpm_pipeline.jobs.runner import DONE, FAILED
from ddpm_pipeline.store import ObjectMissing, open_store
from ddpm_pipeline.telemetry.terminal import echo, echo_json

_SUFFIXES = (".png", ".webp")


def is_image(uri: str) -> bool:
    """Whether a name is that of a file that may have a mark."""
    return uri.lower().endswith(_SUFFIXES)


def inspect_image(uri: str, as_json: bool = False) -> int:
    """Print what the mark of a PNG or WebP says; exit code 1 if it does not say that a model made the image.

    UserError for a file that is not there. DamageError for one that is no such image.
    """
    folder, _, name = uri.rpartition("/")
    store = open_store(folder or ("/" if uri.startswith("/") else "."))
    try:
        mark = read_mark(store.read(name))
    except ObjectMissing:
        raise UserError(f"{uri}: there is no such file; name a .png or .webp file") from None
    except DamageError as error:
        raise DamageError(f"{uri}: {error}") from error
    is_synthetic = mark is not None and mark.is_synthetic
    if as_json:
        facts = {} if mark is None else dataclasses.asdict(mark)
        echo_json({"synthetic": is_synthetic} | facts)
        return DONE if is_synthetic else FAILED
    if mark is None:
        echo(f"origin   not stated: {uri} has no XMP")
        return FAILED
    stated = mark.digital_source_type or "not stated: its XMP has no digital source type"
    echo(f"origin   {'synthetic: ' if is_synthetic else ''}{stated}")
    if mark.spec_digest is not None:
        echo(f"spec     {mark.spec_digest}")
        echo(f"index    {'several samples' if mark.index is None else mark.index}")
        echo("note     a mark can be copied or removed; proof is `ddpm verify PREFIX` of its generation")
    return DONE if is_synthetic else FAILED
