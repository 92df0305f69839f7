"""Reading without a cache from shards too large for memory: the samples of many batches at once, by few requests."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from pipeline.data.index import Index
from pipeline.errors import DamageError
from pipeline.store import ObjectChanged

REQUESTS_AT_ONCE = 8
GAP_BYTES = 256 << 10
"""Bytes nobody asked for that are cheaper to read than another request is to make."""


class Span(NamedTuple):
    """Neighbouring samples of a shard, read by one request."""

    shard: int
    offsets: list[int]
    sizes: list[int]

    @property
    def num_bytes(self) -> int:
        """From the first sample's beginning to the last one's end."""
        return self.offsets[-1] + self.sizes[-1] - self.offsets[0]


class RangeAccess:
    """Samples by ranged requests (see access.Access), brought together ahead of their use by `gather`.

    Holds at most `limit_bytes`: half for samples that wait to be read, half for requests under way.
    """

    def __init__(self, index: Index, limit_bytes: int) -> None:
        self.index = index
        self.prefetch_bytes = limit_bytes // 2
        """How many bytes of samples to gather at a time."""
        self._most_span_bytes = limit_bytes // 2 // REQUESTS_AT_ONCE
        self._prefetched: dict[tuple[int, int], bytes] = {}
        self._pool = ThreadPoolExecutor(REQUESTS_AT_ONCE)

    def prefetch(self, wanted: Iterable[tuple[int, Sequence[int], Sequence[int]]]) -> None:
        """Bring samples, given as (shard, ascending offsets, sizes), in place of those that are held.

        What cannot be brought is left to `read`, which says why. Raises ObjectChanged, StoreUnreachable.
        """
        self._prefetched.clear()
        spans = [span for each in wanted for span in coalesce(*each, self._most_span_bytes)]
        for found in self._pool.map(self._fetch, spans):
            self._prefetched.update(found)

    def read(self, shard: int, offset: int, size: int) -> bytes:
        entry = self.index.shards[shard]
        return self.index.store.read_range(entry.name, offset, size, etag=self.index.tag(entry))

    def read_each(self, shard: int, offsets: list[int], sizes: list[int]) -> Iterable[bytes]:
        places = zip(offsets, sizes, strict=True)
        return [
            self._prefetched.pop((shard, offset), b"") or self.read(shard, offset, size)
            for offset, size in places
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


def coalesce(shard: int, offsets: Sequence[int], sizes: Sequence[int], most_bytes: int) -> list[Span]:
    """Samples at ascending offsets, together where they lie near each other and are at most `most_bytes` in all."""
    spans: list[Span] = []
    end = 0
    for offset, size in zip(offsets, sizes, strict=True):
        near = (
            bool(spans) and offset - end <= GAP_BYTES and offset + size - spans[-1].offsets[0] <= most_bytes
        )
        if not near:
            spans.append(Span(shard, [], []))
        spans[-1].offsets.append(offset)
        spans[-1].sizes.append(size)
        end = offset + size
    return spans
