"""The gallery of a generation: `ddpm gallery s3://bucket/samples/digits`."""

from pathlib import Path

from ddpm_pipeline.generate.gallery.make_gallery import Gallery, make_gallery
from ddpm_pipeline.generate.gallery.pages import INDEX_KEY
from ddpm_pipeline.jobs.progress_bar import progress_of
from ddpm_pipeline.jobs.runner import DONE, use_running_stack
from ddpm_pipeline.store import file_path
from ddpm_pipeline.telemetry.terminal import echo, echo_json


def run(
    prefix: str,
    out: str | None,
    beside: str | None,
    data: str | None,
    model: str | None,
    limit: int,
    as_json: bool,
) -> int:
    """Make the gallery and print where it is. Run again, it shows what has been generated since."""
    use_running_stack()
    place = out or f"{prefix.rstrip('/').rsplit('/', 1)[-1]}-gallery"
    with progress_of("gallery", "images") as progress:
        gallery = make_gallery(
            prefix, place, beside=beside, data=data, model=model, limit=limit, progress=progress
        )
    if as_json:
        echo_json(vars(gallery) | {"index": _address(gallery)})
        return DONE
    echo(
        f"gallery  {gallery.num_images:,} images on {gallery.num_pages:,} pages; the generation is {gallery.state}",
        f"sheets   {gallery.sheets_written:,} written, {gallery.sheets_kept:,} there already",
        f"next     open {_address(gallery)}",
    )
    return DONE


def _address(gallery: Gallery) -> str:
    """What a browser opens: a path for a folder."""
    address = f"{gallery.uri}/{INDEX_KEY}"
    return str(Path(file_path(address))) if address.startswith("file:") else address
