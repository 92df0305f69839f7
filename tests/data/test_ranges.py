"""Streaming without a cache: few requests, bounded memory, the same samples."""

import threading
from pathlib import Path

import pytest

from ddpm_pipeline.config.data import DataConfig
from ddpm_pipeline.data.index import Index
from ddpm_pipeline.data.reading import samples
from ddpm_pipeline.data.reading.loader import Loader
from ddpm_pipeline.data.reading.range_reads import GAP_BYTES, MAX_CONCURRENT, RangeAccess, coalesce
from ddpm_pipeline.store import FileStore
from tests.data.making import batches, by_position, read_through, small_set

SHARDS = (100,) * 6


class Counting(FileStore):
    """Notes every request, and the most bytes asked for at one moment."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.requests: list[int] = []
        self.under_way = self.most_under_way = 0
        self._lock = threading.Lock()

    def read_range(self, key: str, start: int, length: int, *, etag: str | None = None) -> bytes:
        with self._lock:
            self.requests.append(length)
            self.under_way += length
            self.most_under_way = max(self.most_under_way, self.under_way)
        try:
            return super().read_range(key, start, length, etag=etag)
        finally:
            with self._lock:
                self.under_way -= length


def streamed(
    index: Index, limit_bytes: int, monkeypatch: pytest.MonkeyPatch, start: int = 0, stop: int = 80
) -> tuple[dict[int, tuple[bytes, int]], Counting]:
    """Batches by position, read by request with this much memory."""
    store = Counting(Path(index.uri.removeprefix("file://")))
    index = read_through(index, store)
    monkeypatch.setattr(samples, "open_shard_access", lambda _, index, __: RangeAccess(index, limit_bytes))
    config = DataConfig(uri=index.uri, window_shards=2, memory_bytes=0)
    loader = Loader(config, index, 5, 7)
    found = by_position([list(loader.batches(start, stop))])
    loader.close()
    return found, store


@pytest.mark.parametrize("limit_bytes", [1, 20_000, 400_000])
def test_what_is_gathered_ahead_is_what_is_read_one_by_one(
    uri: str, limit_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = small_set(uri, SHARDS)
    straight = by_position(batches(index, 3, 95))
    found, store = streamed(index, limit_bytes, monkeypatch, 3, 95)
    assert found == straight
    assert store.most_under_way <= max(limit_bytes // 2, MAX_CONCURRENT * 1000)


def test_requests_fall_as_memory_grows(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    index = small_set(uri, SHARDS)
    counts = [len(streamed(index, limit, monkeypatch)[1].requests) for limit in (1, 100_000, 400_000)]
    assert counts[0] == 80 * 7  # nothing may be held: one for each sample
    assert counts[0] > 2 * counts[1] > 4 * counts[2]
    assert counts[2] <= 80 * 7 / 8


def test_nothing_is_asked_for_beyond_the_last_step(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    index = small_set(uri, SHARDS)
    _, few = streamed(index, 400_000, monkeypatch, 0, 1)
    assert len(few.requests) <= 7


def test_samples_are_read_together_only_where_they_are_near() -> None:
    near = coalesce(3, [0, 1000, 2000], [400, 400, 400], 1 << 20)
    assert [(span.offsets, span.num_bytes) for span in near] == [([0, 1000, 2000], 2400)]
    far = coalesce(3, [0, 400 + GAP_BYTES, 801 + 2 * GAP_BYTES], [400, 400, 400], 1 << 30)
    assert [span.offsets for span in far] == [[0, 400 + GAP_BYTES], [801 + 2 * GAP_BYTES]]
    small = coalesce(3, [0, 1000, 2000, 3000], [400, 400, 400, 400], 1400)
    assert [span.offsets for span in small] == [[0, 1000], [2000, 3000]]
    assert [span.offsets for span in coalesce(3, [0, 10_000], [5000, 5000], 10)] == [[0], [10_000]]
