"""The download job: a generation or a data set from a store to a local folder."""

from pathlib import Path

from ddpm_pipeline.data.location import Location
from ddpm_pipeline.data.reading.download_dataset import Download, download_dataset
from ddpm_pipeline.errors import UserError
from ddpm_pipeline.generate.content_credentials import ContentCredentials
from ddpm_pipeline.generate.download_generation import download_generation
from ddpm_pipeline.generate.layout import SPEC_KEY
from ddpm_pipeline.generate.prefix_spec import find_generation
from ddpm_pipeline.jobs.progress_bar import progress_of
from ddpm_pipeline.jobs.runner import DONE, INTERRUPTED, use_running_stack
from ddpm_pipeline.store import open_store
from ddpm_pipeline.telemetry.terminal import echo, echo_json


def run(
    prefix: str,
    folder: str,
    unpack: bool = False,
    as_json: bool = False,
    c2pa_key: Path | None = None,
    c2pa_certificates: Path | None = None,
) -> int:
    """Download `prefix`; print where it is now and what to do next. Interrupted, it prints how to resume."""
    try:
        return _run(prefix, folder, unpack, as_json, _credentials(unpack, c2pa_key, c2pa_certificates))
    except KeyboardInterrupt:
        echo("stopped: shards that are whole stay; the same command fetches the rest", error=True)
        return INTERRUPTED


def _credentials(unpack: bool, key: Path | None, certificates: Path | None) -> ContentCredentials | None:
    if key is None and certificates is None:
        return None
    if key is None or certificates is None:
        raise UserError("--c2pa-key and --c2pa-certificates belong together; give both, or none")
    if not unpack:
        raise UserError("--c2pa-key signs image files; add --unpack, which writes them")
    return ContentCredentials(key, certificates)


def _run(
    prefix: str, folder: str, unpack: bool, as_json: bool, credentials: ContentCredentials | None
) -> int:
    use_running_stack()
    location = Location.of(prefix)
    store = open_store(location.root)
    store.require_container()
    generation = None if location.pattern is not None else find_generation(store)
    if generation is None and store.stat(location.index_name) is None:
        raise UserError(
            f"{prefix}: holds neither {SPEC_KEY} of a generation nor {location.index_name} of a data set; "
            f"check the prefix, or index its tars: ddpm index {prefix}"
        )
    if generation is None and credentials is not None:
        raise UserError(f"{prefix}: is a data set; --c2pa-key signs the images of a generation only")
    with progress_of("download", "bytes") as progress:
        if generation is not None:
            manifest, made = download_generation(generation, folder, unpack, progress, credentials)
            count, then = manifest.count, f"ddpm verify {made.folder.root.as_uri()}"
        else:
            index, made = download_dataset(prefix, folder, unpack, progress)
            count = index.num_samples
            then = f"ddpm inspect {_shell_argument(made.folder.root, location.pattern)}"
    if as_json:
        echo_json(_facts(made, count))
    else:
        echo(*_lines(made, count), f"next     {then}")
    return DONE


def _shell_argument(root: Path, pattern: str | None) -> str:
    """The location of a data set as a shell argument."""
    return str(root) if pattern is None else f"'{root}/{pattern}'"


def _facts(made: Download, count: int) -> dict[str, object]:
    return {
        "folder": str(made.folder.root),
        "images": count,
        "bytes": made.total_bytes,
        "shards_fetched": made.fetched,
        "shards_kept": made.present,
        "unpacked": None if made.images is None else str(made.images.folder.root),
    }


def _lines(made: Download, count: int) -> list[str]:
    lines = [f"copied   {count:,} images, {made.total_bytes:,} bytes, to {made.folder.root}"]
    if made.present:
        lines.append(f"kept     {made.present:,} shards that were present; {made.fetched:,} fetched")
    if made.images is not None:
        lines.append(f"images   {made.images.folder.root}")
    return lines
