"""Bringing a complete generation to a folder of this machine, which is then a generation itself.

Order as in the bucket: the spec says whose the folder is, each shard comes before its record, the manifest last. A file
that is there and right is not fetched again, so that the same command goes on after any interruption.
"""

import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from pipeline.config.json_document import parse_document
from pipeline.data.formats.shards import read_shard
from pipeline.data.reading.download_dataset import Download, RemoteObject, image_folder, local_folder
from pipeline.data.reading.unpack import ImageFolder
from pipeline.errors import DamageError, UserError
from pipeline.generate.class_labels import labels_of
from pipeline.generate.completeness import check_complete
from pipeline.generate.done_records import DoneRecord, check_record
from pipeline.generate.layout import CONTACT_KEY, MANIFEST_KEY, REPORT_KEY, SPEC_KEY
from pipeline.generate.listing import list_prefix
from pipeline.generate.manifest import Manifest, ManifestShard, read_entries, read_manifest
from pipeline.generate.plan import Shard, shard
from pipeline.generate.proven_count import proven_spec
from pipeline.generate.spec import Spec, differences
from pipeline.store import FileStore, Store, open_store
from pipeline.store.download_folder import Folder

Progress = Callable[[int, int], None]


def download_generation(
    uri: str, spec: Spec, place: str, unpack: bool, progress: Progress
) -> tuple[Manifest, Download]:
    """Bring everything of `spec`, which stands at `uri`.

    UserError while it is not complete, and for a folder that holds anything else; DamageError naming what is damaged.
    """
    store = open_store(uri)
    root = local_folder(place, store)
    manifest = _complete(store, spec)
    _require_same(root, spec)
    folder = Folder(root)
    images = image_folder(root, f"the generation {spec.digest}", manifest.class_names) if unpack else None
    with tempfile.TemporaryDirectory(prefix="ddpm-manifest-") as scratch:
        # The manifest as it is now is the list of what to bring, and is put in place at the end.
        held = FileStore(Path(scratch))
        store.download(MANIFEST_KEY, held.path(MANIFEST_KEY))
        if read_manifest(held) != manifest:
            raise UserError(f"{uri}: was written anew at this moment; try again")
        total = sum(entry.bytes for entry in read_entries(held))
        download = Download(store, folder, total, progress, images=images)
        download.copy_document(SPEC_KEY)
        again = f"run ddpm verify {uri} --discard-damaged, the same ddpm generate, and this command again"
        download.process_all(partial(_bring_shard, download, spec), enumerate(read_entries(held)), again)
        download.copy_document(CONTACT_KEY)
        download.copy_document(REPORT_KEY)
        with held.open(MANIFEST_KEY) as file, folder.new(MANIFEST_KEY) as out:
            shutil.copyfileobj(file, out)
    here = FileStore(root)
    for key in list_prefix(here, spec).superseded:  # tails of a smaller count that was brought before
        here.delete(key)
    return manifest, download


def _complete(store: Store, spec: Spec) -> Manifest:
    found = check_complete(store, spec)
    if found.faults:
        raise UserError(
            f"{store.uri}: is not complete any more ({found.faults[0]}); ddpm verify {store.uri} says what to do"
        )
    if found.manifest is None:
        raise UserError(
            f"{store.uri}: is not complete; the same ddpm generate command (count={spec.count}) makes what is missing"
        )
    return found.manifest


def _require_same(root: Path, spec: Spec) -> None:
    """Raise UserError unless the folder is empty or holds this generation, of no larger count."""
    here = FileStore(root)
    here.require_container()
    there = proven_spec(here)
    if there is None:
        stranger = next((info.key for info in here.list()), None)
        if stranger is not None:
            raise UserError(f"{root}: holds {stranger} already; choose an empty folder")
        return
    differing = differences(there, spec)
    if differing:
        raise UserError(
            f"{root}: already holds another generation ({'; '.join(differing)}); choose another folder"
        )
    if there.count > spec.count:
        raise UserError(
            f"{root}: holds {there.count:,} samples of this generation, {spec.count:,} are to be brought; "
            "choose another folder"
        )


def _bring_shard(download: Download, spec: Spec, numbered: tuple[int, ManifestShard]) -> None:
    number, entry = numbered
    unit = shard(spec, number)
    if (entry.key, entry.first_index, entry.count) != (unit.key, unit.first, unit.count):
        raise DamageError(f"{MANIFEST_KEY}: its entry {number} is {entry.key}, the plan says {unit.key}")
    download.download(RemoteObject(unit.key, entry.bytes, entry.sha256))
    if download.images is not None:
        _unpack(download.folder.path(unit.key), spec, unit, download.images)
    if not _record_there(download.folder, spec, unit, entry):
        data = download.store.read(unit.done_key)
        _check(data, spec, unit, entry, f"{download.store.uri}/{unit.done_key}")
        download.folder.put(unit.done_key, data)


def _record_there(folder: Folder, spec: Spec, unit: Shard, entry: ManifestShard) -> bool:
    file = folder.open(unit.done_key)
    if file is None:
        return False
    with file:
        try:
            _check(file.read(), spec, unit, entry, unit.done_key)
        except DamageError:
            return False
    return True


def _check(data: bytes, spec: Spec, unit: Shard, entry: ManifestShard, where: str) -> None:
    record = parse_document(DoneRecord, data, where, "a done-record")
    check_record(record, spec, unit, where)
    if (record.bytes, record.sha256) != (entry.bytes, entry.sha256):
        raise DamageError(f"{where}: is of other bytes than the manifest's entry")


def _unpack(path: Path, spec: Spec, unit: Shard, images: ImageFolder) -> None:
    """The images of a shard as files, named by index. DamageError when it does not hold the planned ones in order."""
    labels = labels_of(spec, unit.samples) or [-1] * unit.count
    place = 0
    for place, (key, files) in enumerate(read_shard(path, label=unit.key), 1):
        index = unit.first + place - 1
        if place > unit.count or key != f"{index:012d}" or spec.image_format not in files:
            raise DamageError(f"{unit.key}: its sample {place} is {key!r}, not the image {index}")
        images.put(labels[place - 1], index, spec.image_format, files[spec.image_format])
    if place != unit.count:
        raise DamageError(f"{unit.key}: holds {place} samples of {unit.count}")
