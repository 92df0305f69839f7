"""Opens the source named by `source=`: resolves paths, patterns and URIs, and detects the kind of source."""

from __future__ import annotations

import glob
from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import cast

from pydantic_core import from_json

from ddpm_pipeline.config.bounds import checked_name
from ddpm_pipeline.config.data import PackConfig
from ddpm_pipeline.config.plugins import (
    SOURCES,
    PluginIdentity,
    Registered,
    find_plugin,
    is_own,
    require_plugin,
    require_plugins,
)
from ddpm_pipeline.data.formats.images import IMAGE_SUFFIXES
from ddpm_pipeline.data.location import expand, is_glob, require_matches
from ddpm_pipeline.data.packing.archives import TARS, TarFiles, require_temp_space, unpacked_bytes
from ddpm_pipeline.data.packing.array_source import open_arrays, open_npz
from ddpm_pipeline.data.packing.celeba import is_celeba_table
from ddpm_pipeline.data.packing.parquet import ParquetSource, has_image_column
from ddpm_pipeline.data.packing.remote_source import describe_remote, is_in_s3, is_remote
from ddpm_pipeline.data.packing.source_files import (
    CombinedFiles,
    Files,
    FolderFiles,
    SelectedFiles,
    ZipFiles,
    is_hidden,
)
from ddpm_pipeline.data.packing.source_plugin import OpenSource
from ddpm_pipeline.data.packing.sources import FilesSource, Source
from ddpm_pipeline.data.packing.store_files import StoreFiles
from ddpm_pipeline.errors import UserError
from ddpm_pipeline.store import file_path

KINDS = "give a folder, zip, tar, parquet or npz, a pattern of them, an s3://, https:// or hf:// address, or `digits`"
_REMOTE = {
    "gs": "download it first: gcloud storage cp -r {} FOLDER",
    "pipe": "write what the command prints to a file and name that",
}
_UNSUPPORTED = {".rar": "unpack it", ".7z": "unpack it",
                ".arrow": "write it as parquet: load_from_disk(…).to_parquet(…)",
                ".mdb": "export its images into a folder", ".gz": "unpack it", ".zst": "unpack it"}  # fmt: skip


def open_source(config: PackConfig) -> Source:
    """The source that `config.source` names. Raises UserError for an unknown kind, and without images.

    What lies elsewhere must have been fetched (`fetch_source`), but for image files in S3. A source is pickled as its
    settings and opened again once per process.
    """
    if is_own(SOURCES, config.source):
        source = _opener(find_plugin(SOURCES, config.source))(config, config)
    elif config.plugin is not None:
        source = _open_plugin(config, config.plugin)
    elif is_in_s3(config.source):
        files = StoreFiles(config.source)
        source = open_arrays(config, files) or FilesSource(files, config)
    else:
        source = _open_paths(config, source_paths(config.source))
    for name in source.class_names or ():
        try:
            checked_name(name)  # otherwise no model trained on it could store it
        except ValueError as error:
            raise UserError(f"source: {config.source}: class name {name[:80]!r} {error}") from None
    source.config = config
    return source


def require_source(config: PackConfig) -> str:
    """What is known of a source without opening it. Raises UserError for a missing one."""
    require_plugins(config)
    if config.plugin is None and not is_own(SOURCES, config.source):
        if is_remote(config.source):
            return describe_remote(config)
        source_paths(config.source)
    return "exists"


def _open_plugin(config: PackConfig, plugin: PluginIdentity) -> Source:
    found = require_plugin(config, "source")
    source = cast(object, _opener(found)(config, config.options))
    if not isinstance(source, Source):
        raise UserError(f"source: {config.source}: {plugin} opened a {type(source).__name__}, not a Source")
    source.notes = (*source.notes, f"source: {plugin} ({plugin.object})")
    source.self_contained = (
        False  # what it reads is not known here, so it is read again to see whether it changed
    )
    return source


def _opener(found: Registered) -> OpenSource:
    return found.plugin.load()


def source_paths(source: str) -> list[Path]:
    """The files or folders that a source names, sorted."""
    scheme = source.partition(":")[0].lower()
    if source.lower().startswith("file:"):
        source = str(file_path(source))
    elif scheme in _REMOTE and ":" in source and not Path(source).exists():
        remedy = _REMOTE[scheme].format(source)
        raise UserError(f"source: {source}: this scheme is not read; {remedy}")
    path = Path(source).expanduser()
    if path.exists():
        return [path]
    if not set(source) & set("*?[{"):
        raise UserError(f"source: {source} does not exist; {KINDS}")
    found = {name: _matches(name) for name in expand(str(path))}
    require_matches(f"source: {source}", [name for name, paths in found.items() if not paths])
    return sorted({path for paths in found.values() for path in paths})


def _matches(name: str) -> list[Path]:
    if is_glob(name):
        return [Path(match) for match in glob.glob(name, recursive=True)]
    return [Path(name)] if Path(name).exists() else []


def _open_paths(config: PackConfig, paths: list[Path]) -> Source:
    if len(paths) == 1 and paths[0].is_dir():
        return _open_folder(config, paths[0])
    if all(path.suffix.lower() == ".parquet" for path in paths):
        return ParquetSource(paths, config, config.source, Counter())
    if len(paths) == 1:
        if paths[0].suffix.lower() == ".npz":
            return open_npz(config, paths[0])
        (archive,) = _open_archives(config.source, paths)
        return open_arrays(config, archive) or FilesSource(archive, config, _packed_class_names(paths[0]))
    folder = next((path for path in paths if path.is_dir()), None)
    if folder is not None:
        raise UserError(
            f"source: {config.source} names several paths, one of them the folder {folder}; {KINDS}"
        )
    names = [path.name for path in _require_distinct_names(paths)]
    files = CombinedFiles(config.source, list(zip(names, _open_archives(config.source, paths), strict=True)))
    return FilesSource(files, config, _packed_class_names(paths[0]))


def _open_folder(config: PackConfig, folder: Path) -> Source:
    """A folder of images, archives or parquet files, or a packed data set."""
    if (folder / "pack-plan.json").exists() and not (folder / "index.json").exists():
        raise UserError(f"source: {folder} is a pack that was interrupted; run that pack again first")
    files = FolderFiles(folder)
    paths = {name.path: folder / name.path for name in files.names}
    parquet = [path for path in paths.values() if path.suffix.lower() == ".parquet"]
    archives = [path for path in paths.values() if path.name.lower().endswith((*TARS, ".zip"))]
    tables = ".members.npy"  # of a packed set's index
    images = any(path.lower().endswith(IMAGE_SUFFIXES) and not path.endswith(tables) for path in paths)
    embedded = [path for path in parquet if not path.name.startswith("metadata") and has_image_column(path)]
    kinds = {"images": images, "archives": bool(archives), "parquet with images": bool(embedded)}
    found = [kind for kind, present in kinds.items() if present]
    if len(found) > 1:
        raise UserError(
            f"source: {folder} holds {' and '.join(found)}; name one of them by its folder or a pattern "
            f"such as {folder}/**/*.{'parquet' if embedded else 'tar'}, or move the others away"
        )
    if images or not (archives or parquet):
        return (None if images else open_arrays(config, files)) or FilesSource(files, config)
    rest = Counter(p.suffix.lower() or p.name for p in paths.values() if p not in {*archives, *parquet})
    if archives:
        return _open_folder_of_archives(config, files, archives, rest + Counter({".parquet": len(parquet)}))
    ours = embedded or parquet
    rest[".parquet"] += len(parquet) - len(ours)
    return ParquetSource(sorted(ours), config, str(folder), +rest + files.left_out)


def _open_folder_of_archives(
    config: PackConfig, files: FolderFiles, archives: Sequence[Path], rest: Counter[str]
) -> Source:
    """Archives in a folder, as one source. CelebA's tables may lie beside its zip."""
    folder = files.folder
    paths = sorted(archives)
    names = [str(path.relative_to(folder)) for path in paths]
    members = list(zip(names, _open_archives(str(folder), paths), strict=True))
    tables = SelectedFiles(files, [i for i, name in enumerate(files.names) if is_celeba_table(name)])
    rest -= Counter(PurePosixPath(name.path).suffix for name in tables.names)
    whole = CombinedFiles(str(folder), [*members, ("", tables)])
    if (arrays := open_arrays(config, whole)) is not None:
        return arrays
    source = FilesSource(whole, config, _packed_class_names(folder))
    packed = (folder / "index.json").exists() and (folder / "pack-report.json").exists()
    source.left_out += Counter() if packed else +rest
    return source


def _open_archives(where: str, paths: Sequence[Path]) -> list[Files]:
    """Open archives. Raises DiskFull before the first of them is decompressed."""
    tars = [path for path in paths if path.name.lower().endswith(TARS)]
    require_temp_space(where, sum(map(unpacked_bytes, tars)))
    return [_open_archive(path) for path in paths]


def _open_archive(path: Path) -> Files:
    if path.suffix.lower() == ".zip":
        return ZipFiles(path)
    if path.name.lower().endswith(TARS):
        return TarFiles(path)
    remedy = _UNSUPPORTED.get(path.suffix.lower())
    raise UserError(
        f"source: {path} is of an unknown kind; " + (f"{remedy}, or {KINDS}" if remedy else KINDS)
    )


def _require_distinct_names(paths: Sequence[Path]) -> Sequence[Path]:
    """The paths. Raises UserError unless their file names, which distinguish their images, differ."""
    seen: dict[str, Path] = {}
    for path in paths:
        if (other := seen.setdefault(path.name, path)) != path:
            raise UserError(
                f"source: {other} and {path} have the same name; rename one, or pack their folder"
            )
    return paths


def _packed_class_names(path: Path) -> tuple[str, ...] | None:
    """Class names from the index of a packed data set; None for shards that are not part of one."""
    folder = path if path.is_dir() else path.parent
    for place in (folder, folder.parent) if folder.name == "shards" else (folder,):
        file = place / "index.json"
        if not file.is_file() or any(map(is_hidden, file.parts[-1:])):
            continue
        try:
            names = from_json(file.read_bytes())["class_names"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        return tuple(map(str, names)) if names else None
    return None
