"""`ddpm index`: make the index of tars that are already there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from pipeline.data.index import Index, MemberTable, ShardEntry, assemble_index
from pipeline.data.location import Location
from pipeline.data.scan import index_shard
from pipeline.errors import UserError
from pipeline.store import open_store

Progress = Callable[[int, int], None]


def shards_to_index(uri: str) -> tuple[Location, list[str]]:
    """Where the shards are and their keys, sorted. Raises UserError when there are none, or the store is wrong."""
    location = Location.of(uri)
    store = open_store(location.root)
    store.require_container()
    keys = [info.key for info in location.shard_objects(store)]
    if not keys:
        raise UserError(f"{uri}: no .tar or .tar.gz there; check the prefix or pattern")
    return location, keys


def build_index(
    uri: str,
    *,
    label_field: str | None = None,
    class_names: Sequence[str] | None = None,
    pixels: bool = False,
    num_threads: int = 4,
    progress: Progress | None = None,
) -> Index:
    """Read every shard once and write the index. On a cluster, map `index_shard` and call `assemble_index` instead.

    Raises UserError, before anything is read, for a wrong URI; DamageError naming the shard and place.
    """
    location, keys = shards_to_index(uri)
    store = open_store(location.root)

    def scan(key: str) -> tuple[ShardEntry, MemberTable]:
        return index_shard(store, key, label_field=label_field, pixels=pixels)

    scans: list[tuple[ShardEntry, MemberTable]] = []
    with ThreadPoolExecutor(num_threads) as pool:
        futures = [pool.submit(scan, key) for key in keys]
        try:
            for done, future in enumerate(futures, 1):
                scans.append(future.result())
                if progress is not None:
                    progress(done, len(keys))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return assemble_index(location, scans, class_names)
