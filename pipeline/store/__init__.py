"""Objects under a URI: `s3://bucket/prefix` and `file:///directory` behind one small interface."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote, urlsplit

from ddpm_pipeline.errors import UserError
from ddpm_pipeline.retry import RetryPolicy, retry_during_outage
from ddpm_pipeline.store.file_store import FileStore, atomic_file
from ddpm_pipeline.store.interface import (
    ABSENT,
    ObjectChanged,
    ObjectInfo,
    ObjectMissing,
    Store,
    StoreUnreachable,
)

__all__ = [
    "ABSENT",
    "FileStore",
    "ObjectChanged",
    "ObjectInfo",
    "ObjectMissing",
    "RetryPolicy",
    "Store",
    "StoreUnreachable",
    "atomic_file",
    "file_path",
    "open_store",
    "retry_during_outage",
]


def open_store(uri: str) -> Store:
    """The store at `s3://bucket[/prefix]`, `file:///directory` or a local directory's path.

    Nothing is contacted; `require_container` does that. Raises UserError for any other address.
    """
    if not uri:
        raise UserError("store URI is empty; give s3://bucket/prefix or file:///directory")
    try:
        parts = urlsplit(uri)
    except ValueError as error:
        raise UserError(f"{uri}: {error}; write s3://bucket/prefix or file:///directory") from None
    if parts.scheme == "s3":
        if not parts.netloc:
            raise UserError(f"{uri}: no bucket in it; write s3://bucket/prefix")
        from ddpm_pipeline.store.s3_store import (
            S3Store,
        )  # boto3 takes a quarter of a second to import: only who needs it

        return S3Store(parts.netloc, uri[len("s3://") + len(parts.netloc) :])
    if parts.scheme == "file":
        return FileStore(file_path(uri))
    if "://" in uri:
        raise UserError(f"{uri}: unknown scheme {parts.scheme!r}; use s3:// or file://")
    return FileStore(Path(uri))


def file_path(uri: str) -> Path:
    """The path that `file:///path` names. `#` and `?` are part of it, as in a shell, not a fragment or a query; what is
    written as `%23` is read as `#`. Raises UserError for another machine or a relative path.
    """
    host, slash, path = uri.partition("://")[2].partition("/")
    if host not in ("", "localhost") or not slash:
        raise UserError(f"{uri}: not an absolute path; write file:///directory")
    return Path(unquote(f"/{path}"))
