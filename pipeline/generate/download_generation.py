"""Downloading a complete generation to a local folder, which is then a generation itself.

The order is that of the bucket: the spec first, each shard before its record, the manifest last. Intact files are not
fetched again, so the same command continues after any interruption.
"""

import shutil
import tempfile
from functools import partial
from pathlib import Path

from ddpm_pipeline.config.json_document import parse_document
from ddpm_pipeline.data.reading.download_dataset import Download, RemoteObject, image_folder, local_folder
from ddpm_pipeline.data.reading.unpack import ImageFolder
from ddpm_pipeline.errors import DamageError, UserError
from ddpm_pipeline.generate.class_labels import labels_of
from ddpm_pipeline.generate.completeness import require_complete
from ddpm_pipeline.generate.content_credentials import KINDS, ContentCredentials, SignedSample
from ddpm_pipeline.generate.done_records import DoneRecord, check_record
from ddpm_pipeline.generate.layout import (
    CONTACT_KEY,
    MANIFEST_KEY,
    REPORT_KEY,
    SIGNATURE_KEY,
    SPEC_KEY,
    SUMS_KEY,
)
from ddpm_pipeline.generate.manifest import Manifest, ManifestShard, read_entries, read_manifest
from ddpm_pipeline.generate.plan import Shard, shard
from ddpm_pipeline.generate.prefix_spec import find_generation
from ddpm_pipeline.generate.spec import Spec, differences
from ddpm_pipeline.generate.stored_generation import Generation
from ddpm_pipeline.generate.stored_images import stored_images
from ddpm_pipeline.progress import Progress
from ddpm_pipeline.store import FileStore
from ddpm_pipeline.store.download_folder import Folder


def download_generation(
    generation: Generation,
    destination: str,
    unpack: bool,
    progress: Progress,
    credentials: ContentCredentials | None = None,
) -> tuple[Manifest, Download]:
    """Download all objects of a generation to the folder `destination`. `credentials` sign the unpacked images.

    UserError while it is not complete, and for a folder that holds anything else; DamageError names a damaged object.
    """
    store, spec, uri = generation.store, generation.spec, generation.uri
    if credentials is not None and spec.image_format not in KINDS:
        raise UserError(
            f"{uri}: its images are {spec.image_format}, which has no place for a C2PA manifest; download them without"
        )
    root = local_folder(destination, store)
    manifest = require_complete(generation)
    _require_same(root, spec)
    folder = Folder(root)
    what = f"the generation {spec.digest}"
    if credentials is not None:
        what += f", signed with the certificate {credentials.fingerprint}"
    images = image_folder(root, what, manifest.class_names) if unpack else None
    with tempfile.TemporaryDirectory(prefix="ddpm-manifest-") as scratch:
        # This copy of the manifest lists what to fetch, and is put in place at the end.
        snapshot = FileStore(Path(scratch))
        store.download(MANIFEST_KEY, snapshot.path(MANIFEST_KEY))
        if read_manifest(snapshot) != manifest:
            raise UserError(f"{uri}: its manifest was replaced just now; try again")
        total = sum(entry.bytes for entry in read_entries(snapshot))
        download = Download(store, folder, total, progress, images=images)
        download.copy_document(SPEC_KEY)
        again = f"run ddpm verify {uri} --discard-damaged, the same ddpm generate, and this command again"
        download.process_all(
            partial(_fetch_shard, download, spec, credentials), enumerate(read_entries(snapshot)), again
        )
        download.copy_document(CONTACT_KEY)
        download.copy_document(REPORT_KEY)
        download.copy_document(SUMS_KEY)
        download.copy_document(SIGNATURE_KEY)
        with snapshot.open(MANIFEST_KEY) as file, folder.new(MANIFEST_KEY) as out:
            shutil.copyfileobj(file, out)
    local = Generation(FileStore(root), spec)
    for key in local.listing().superseded:  # tails of a smaller count that was downloaded before
        local.store.delete(key)
    return manifest, download


def _require_same(root: Path, spec: Spec) -> None:
    """Raise UserError unless the folder is empty or holds this generation, of no larger count."""
    folder = FileStore(root)
    folder.require_container()
    existing = find_generation(folder)
    if existing is None:
        other = next((info.key for info in folder.list()), None)
        if other is not None:
            raise UserError(f"{root}: already holds {other}; choose an empty folder")
        return
    differing = differences(existing.spec, spec)
    if differing:
        raise UserError(
            f"{root}: already holds another generation ({'; '.join(differing)}); choose another folder"
        )
    if existing.spec.count > spec.count:
        raise UserError(
            f"{root}: already holds {existing.spec.count:,} samples of this generation, more than the {spec.count:,} "
            "to download; choose another folder"
        )


def _fetch_shard(
    download: Download,
    spec: Spec,
    credentials: ContentCredentials | None,
    numbered: tuple[int, ManifestShard],
) -> None:
    number, entry = numbered
    unit = shard(spec, number)
    if (entry.key, entry.first_index, entry.count) != (unit.key, unit.first, unit.count):
        raise DamageError(f"{MANIFEST_KEY}: its entry {number} is {entry.key}, the plan says {unit.key}")
    download.download(RemoteObject(unit.key, entry.bytes, entry.sha256))
    if download.images is not None:
        _unpack(download.folder.path(unit.key), spec, unit, download.images, credentials)
    if not _has_record(download.folder, spec, unit, entry):
        data = download.store.read(unit.done_key)
        _check_record(data, spec, unit, entry, f"{download.store.uri}/{unit.done_key}")
        download.folder.put(unit.done_key, data)


def _has_record(folder: Folder, spec: Spec, unit: Shard, entry: ManifestShard) -> bool:
    file = folder.open(unit.done_key)
    if file is None:
        return False
    with file:
        try:
            _check_record(file.read(), spec, unit, entry, unit.done_key)
        except DamageError:
            return False
    return True


def _check_record(data: bytes, spec: Spec, unit: Shard, entry: ManifestShard, where: str) -> None:
    record = parse_document(DoneRecord, data, where, "a done-record")
    check_record(record, spec, unit, where)
    if (record.bytes, record.sha256) != (entry.bytes, entry.sha256):
        raise DamageError(f"{where}: describes other bytes than the manifest's entry")


def _unpack(
    path: Path, spec: Spec, unit: Shard, images: ImageFolder, credentials: ContentCredentials | None
) -> None:
    """The images of a shard as files, named by index. DamageError when it does not hold the planned ones in order."""
    labels, kind = labels_of(spec, unit.samples) or [-1] * unit.count, spec.image_format
    for image in stored_images(path, spec, unit):
        label, data = labels[image.index - unit.first], image.data
        if credentials is not None:
            sample = SignedSample.of(spec.digest, image.index, data)
            present = images.get(label, image.index, kind)
            if present is not None and credentials.is_signed(present, kind, sample):
                continue  # signed again, it would be other bytes
            data = credentials.sign(data, kind, sample)
        images.put(label, image.index, kind, data)
