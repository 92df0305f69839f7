"""Which way of reading shards the settings and the store allow."""

from __future__ import annotations

from pathlib import Path

from pipeline.config.data import DataConfig
from pipeline.data.index import Index
from pipeline.data.reading.range_reads import RangeAccess
from pipeline.data.reading.shard_access import Access, FileAccess, MemoryAccess
from pipeline.data.reading.shard_cache import CacheAccess, ShardCache, require_cache_space
from pipeline.errors import UserError
from pipeline.store import FileStore


def open_shard_access(config: DataConfig, index: Index, limit_bytes: int) -> Access:
    """The fastest way the settings allow. Raises UserError when there is none for these shards."""
    compressed = next((shard.name for shard in index.shards if shard.compressed), None)
    if isinstance(index.store, FileStore) and compressed is None:
        return FileAccess(index, 2 * config.window_shards)
    cache = open_cache(config, index)
    if cache is not None:
        return CacheAccess(cache, 2 * config.window_shards)
    largest = max(shard.plain_bytes for shard in index.shards)
    needed = min(2 * config.window_shards * largest, sum(shard.plain_bytes for shard in index.shards))
    if needed <= limit_bytes:
        return MemoryAccess(index, limit_bytes, config.on_damage == "skip")
    if compressed is not None:
        raise UserError(
            f"data.cache_dir: {compressed} is compressed, and two windows of shards ({needed} bytes) are more than "
            f"memory_bytes allows each process ({limit_bytes}); name a cache directory"
        )
    return RangeAccess(index, limit_bytes)


def open_cache(config: DataConfig, index: Index) -> ShardCache | None:
    """The shard cache, if one is wanted and of use. Raises UserError when it is too small."""
    in_place = isinstance(index.store, FileStore) and not any(shard.compressed for shard in index.shards)
    if config.cache_dir is None or in_place:
        return None
    require_cache_space(index, config.window_shards, config.cache_bytes)
    directory = Path(config.cache_dir).expanduser()
    return ShardCache(index, directory, config.cache_bytes, config.on_damage == "skip")
