"""Reading shards too large for memory without a cache: samples of many batches by few ranged requests."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from ddpm_pipeline.data.index import Index
from ddpm_pipeline.errors import DamageError
from ddpm_pipeline.store import ObjectChanged

MAX_CONCURRENT = 8
GAP_BYTES = 256 << 10
"""Unneeded bytes between samples that are cheaper to read than to split the request."""


class Span(NamedTuple):
    """Adjacent samples of a shard, read by one request."""

    shard: int
    offsets: list[int]
    sizes: list[int]

    @property
    def num_bytes(self) -> int:
        """From the start of the first sample to the end of the last."""
        return self.offsets[-1] + self.sizes[-1] - self.offsets[0]


class RangeAccess:
    """Samples by ranged requests (see ShardAccess), fetched ahead of use by `prefetch`.

    Uses at most `limit_bytes`: half for prefetched samples, half for requests in flight.
    """

    def __init__(self, index: Index, limit_bytes: int) -> None:
        self.index = index
        self.prefetch_bytes = limit_bytes // 2
        """Bytes of samples to prefetch at a time."""
        self._max_span_bytes = limit_bytes // 2 // MAX_CONCURRENT
        self._prefetched: dict[tuple[int, int], bytes] = {}
        self._pool = ThreadPoolExecutor(MAX_CONCURRENT)

    def prefetch(self, wanted: Iterable[tuple[int, Sequence[int], Sequence[int]]]) -> None:
        """Fetch samples, given as (shard, ascending offsets, sizes); replaces those prefetched before.

        What cannot be fetched is left to `read`, which raises the error. Raises ObjectChanged, StoreUnreachable.
        """
        self._prefetched.clear()
        spans = [span for group in wanted for span in coalesce(*group, self._max_span_bytes)]
        for found in self._pool.map(self._fetch, spans):
            self._prefetched.update(found)

    def read(self, shard: int, offset: int, size: int) -> bytes:
        entry = self.index.shards[shard]
        return self.index.store.read_range(entry.name, offset, size, etag=self.index.tag(entry))

    def read_each(self, shard: int, offsets: list[int], sizes: list[int]) -> Iterable[bytes]:
        ranges = zip(offsets, sizes, strict=True)
        return [
            self._prefetched.pop((shard, offset), b"") or self.read(shard, offset, size)
            for offset, size in ranges
        ]

    def renew(self, shard: int) -> bool:
        return False

    def close(self) -> None:
        self._prefetched.clear()
        self._pool.shutdown()

    def _fetch(self, span: Span) -> dict[tuple[int, int], bytes]:
        first = span.offsets[0]
        try:
            data = self.read(span.shard, first, span.num_bytes)
        except ObjectChanged:
            raise
        except DamageError:
            return {}
        ends = map(int.__add__, span.offsets, span.sizes)
        return {
            (span.shard, offset): data[offset - first : end - first]
            for offset, end in zip(span.offsets, ends, strict=True)
        }


def coalesce(shard: int, offsets: Sequence[int], sizes: Sequence[int], max_bytes: int) -> list[Span]:
    """Merge samples at ascending offsets into spans of at most `max_bytes`, where they are close to each other."""
    spans: list[Span] = []
    end = 0
    for offset, size in zip(offsets, sizes, strict=True):
        near = bool(spans) and offset - end <= GAP_BYTES and offset + size - spans[-1].offsets[0] <= max_bytes
        if not near:
            spans.append(Span(shard, [], []))
        spans[-1].offsets.append(offset)
        spans[-1].sizes.append(size)
        end = offset + size
    return spans
