"""Data sets of a Hugging Face hub, as `hf://datasets/OWNER/NAME[@REVISION][/CONFIG]`, through huggingface_hub.

Its own variables say which hub and who asks: HF_ENDPOINT, HF_TOKEN.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

from ddpm_pipeline.config.data import PackConfig
from ddpm_pipeline.data.packing.dataset_card import (
    CARD,
    MAX_CARD_BYTES,
    Card,
    configurations,
    default_configuration,
    parse_card,
)
from ddpm_pipeline.data.packing.fetch import FileVersion, RemoteFile
from ddpm_pipeline.data.packing.folder_layout import choose_split, split_word
from ddpm_pipeline.errors import DamageError, UserError
from ddpm_pipeline.store import StoreUnreachable

if TYPE_CHECKING:
    from huggingface_hub import HfFileSystem
else:
    HfFileSystem = Any

T = TypeVar("T")
PREFIX = "hf://datasets/"
BLOCK_BYTES = 16 << 20
"""Bytes of a request."""
_MAX_LISTED = 20


class HubDataset:
    """A data set at one commit: its files, and its card."""

    def __init__(self, source: str) -> None:
        """Lists the files. Raises UserError for a name that is none, StoreUnreachable when the hub does not answer."""
        owner, name, *rest = [*source[len(PREFIX) :].split("/"), ""]
        self.source, self.config = source, "/".join(part for part in rest if part) or None
        name, _, revision = name.partition("@")
        if not source.startswith(PREFIX) or not owner or not name:
            raise UserError(
                f"source: {source}: write hf://datasets/OWNER/NAME, and /CONFIG if it has several"
            )
        self.repository = f"{owner}/{name}"
        hub = _library()
        endpoint = os.environ.get("HF_ENDPOINT")
        self._files: HfFileSystem = hub.HfFileSystem(endpoint=endpoint)
        api = hub.HfApi(endpoint=endpoint)
        self.commit = str(
            self._explained(
                lambda: api.dataset_info(self.repository, revision=revision or None, timeout=30)
            ).sha
        )
        self._root = f"datasets/{self.repository}@{self.commit}"
        listed: Any = self._explained(lambda: self._files.find(self._root, detail=True))
        self.files: dict[str, Any] = {
            name.removeprefix(f"{self._root}/"): info for name, info in listed.items()
        }
        self.card = self._card()

    def remote(self, path: str) -> HubFile:
        """One of the files."""
        return HubFile(self, path, self.files[path])

    def open(self, path: str, start: int = 0) -> BinaryIO:
        """The bytes of a file from `start`; huggingface_hub repeats requests that fail."""

        def opened() -> Any:
            file: Any = self._files.open(f"{self._root}/{path}", "rb", block_size=BLOCK_BYTES)
            file.seek(start)
            return file

        return _Explained(self._explained(opened), self._explained)  # pyright: ignore[reportReturnType]

    def _card(self) -> Card:
        if CARD not in self.files:
            return {}
        with self.open(CARD) as file:
            return parse_card(
                file.read(min(MAX_CARD_BYTES, self.files[CARD]["size"])).decode(errors="replace")
            )

    def _explained(self, action: Callable[[], T]) -> T:
        """`action()`, with the errors of huggingface_hub and of its transport translated."""
        try:
            return action()
        except Exception as error:  # noqa: BLE001 - which library it uses for http depends on its version
            status = getattr(getattr(error, "response", None), "status_code", None)
            kind = type(error).__name__
            if kind == "GatedRepoError" or status in (401, 403):
                raise UserError(
                    f"source: {self.source}: the hub refuses access; accept the data set's terms on its page and set "
                    "HF_TOKEN, or check the name"
                ) from None
            if status == 404 or kind in (
                "RevisionNotFoundError",
                "RepositoryNotFoundError",
                "FileNotFoundError",
            ):
                raise UserError(f"source: {self.source}: the hub has no such data set or revision") from None
            if kind == "HFValidationError":
                raise UserError(f"source: {self.source}: not a data set's name; check it") from None
            raise StoreUnreachable(
                f"source: {self.source}: the hub cannot be reached, or stopped answering ({kind}); try again later, or "
                f"fetch it elsewhere (hf download --repo-type dataset {self.repository} --local-dir FOLDER) and give "
                "the folder"
            ) from None


class HubFile(RemoteFile):
    """A file of a data set."""

    def __init__(self, dataset: HubDataset, path: str, info: dict[str, Any]) -> None:
        self.name, self.where = path, f"{PREFIX}{dataset.repository}/{path}"
        self._dataset = dataset
        size, tag = info.get("size"), str(info.get("blob_id") or "")
        if not isinstance(size, int) or size < 0:
            raise DamageError(f"source: {self.where}: the hub says no size")
        self._version = FileVersion(size_bytes=size, tag=tag)
        lfs = info.get("lfs")
        self.sha256 = str(lfs["sha256"]) if lfs else None

    def stat(self) -> FileVersion:
        return self._version

    def open(self, start: int, version: FileVersion) -> BinaryIO:
        return self._dataset.open(self.name, start)


class _Explained:
    """A file whose `read` translates errors."""

    def __init__(self, file: Any, explained: Callable[[Callable[[], bytes]], bytes]) -> None:
        self._file, self._explained = file, explained

    def read(self, size: int = -1) -> bytes:
        return self._explained(lambda: self._file.read(size))

    def __enter__(self) -> _Explained:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def select_files(dataset: HubDataset, config: PackConfig) -> tuple[list[HubFile], str]:
    """The files to fetch for the settings' configuration and split, the card among them, and what was chosen.

    Parquet files if there are any, else all. Raises UserError where there is a choice and none was made.
    """
    split_of = _files_of_configuration(dataset)
    parquet = [path for path in split_of if path.lower().endswith(".parquet")]
    paths = parquet or list(split_of)
    if not paths:
        raise UserError(f"source: {dataset.source} has no files; check the name")
    words = [split_of[path] or split_word(path) for path in paths]
    chosen = [paths[i] for i in choose_split(words, config.split, dataset.source)]
    card = [CARD] if CARD in dataset.files and CARD not in chosen else []
    note = f"{dataset.repository} at commit {dataset.commit}: {len(chosen)} of {len(dataset.files)} files"
    return [dataset.remote(path) for path in (*chosen, *card)], note


def _files_of_configuration(dataset: HubDataset) -> dict[str, str | None]:
    """The paths of the chosen configuration's files, each with the split that the card says."""
    known = configurations(dataset.card)
    wanted = dataset.config
    if known:
        name = wanted or default_configuration(dataset.card)
        if name is None or name not in known:
            said = "has several configurations" if name is None else f"has no configuration {name!r}"
            raise UserError(
                f"source: {dataset.source} {said}; add one of these after a slash: {_listing(known)}"
            )
        found: dict[str, str | None] = {}
        for files in known[name]:
            split = None if files.split is None else split_word(files.split) or files.split
            found |= {path: split for path in dataset.files if files.matches(path)}
        return found
    visible = [path for path in dataset.files if not path.startswith(".")]
    if wanted is not None:
        below = [path for path in visible if path.startswith(f"{wanted}/")]
        if not below:
            raise UserError(
                f"source: {dataset.source} has no folder {wanted!r}; it has: {_listing(_tops(visible))}"
            )
        return dict.fromkeys(below)
    tops = [
        top for top in _tops([path for path in visible if path.endswith(".parquet")]) if not split_word(top)
    ]
    if len(tops) > 1:
        raise UserError(
            f"source: {dataset.source} has several configurations; add one of these after a slash: {_listing(tops)}"
        )
    return dict.fromkeys(visible)


def _tops(paths: Sequence[str]) -> list[str]:
    return sorted({PurePosixPath(path).parts[0] for path in paths if "/" in path})


def _listing(names: Sequence[str] | dict[str, Any]) -> str:
    listed = sorted(names)
    return ", ".join(listed[:_MAX_LISTED]) + (", …" if len(listed) > _MAX_LISTED else "") or "none"


def _library() -> Any:
    try:
        import huggingface_hub
    except ImportError:
        raise UserError(
            "source: hf:// needs huggingface_hub, which is not installed: pip install 'ddpm-pipeline[hf]'"
        ) from None
    return huggingface_hub
