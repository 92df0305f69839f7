"""The endless global order of training samples, independent of the number of workers.

Position p is in epoch p // N. Each epoch permutes the shards, cuts them into windows, and permutes the samples
inside each window. An epoch is thus an exact permutation, any position is found in constant time, and reading
touches `window_shards` shards at a time. Step s takes positions [sB, (s+1)B); rank r of W takes an even slice.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from ddpm_pipeline.diffusion import noise

Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class ShuffleWindow:
    """Shards of an epoch that are shuffled together.

    `starts` are the rows before each of `shards`; `order` permutes their rows.
    """

    first_position: int
    shards: Int64
    starts: Int64
    order: Int64


class GlobalOrder:
    """Maps positions to samples. `counts` are the samples of each shard, int64 (num_shards,)."""

    def __init__(self, counts: Int64, seed: int, window_shards: int) -> None:
        self.counts, self.seed = counts, seed
        self.num_samples = int(counts.sum())
        self.window_shards = min(window_shards, len(counts))
        self.num_windows = -(-len(counts) // self.window_shards)
        # Bounded: a batch needs the shard orders of at most two epochs and the windows at a boundary.
        self._shard_order = lru_cache(maxsize=2)(self._make_shard_order)
        self._window = lru_cache(maxsize=3)(self._make_window)

    def lookup(self, positions: Int64) -> tuple[Int64, Int64]:
        """(shard, row in the shard) of each position, int64 (n,) both."""
        shards, rows = np.empty_like(positions), np.empty_like(positions)
        pending = np.arange(len(positions))
        while len(pending):
            window = self.window_at(int(positions[pending[0]]))
            offsets = positions[pending] - window.first_position
            inside = (offsets >= 0) & (offsets < len(window.order))
            picked = window.order[offsets[inside]]
            slot = np.searchsorted(window.starts, picked, side="right") - 1
            shards[pending[inside]] = window.shards[slot]
            rows[pending[inside]] = picked - window.starts[slot]
            pending = pending[~inside]
        return shards, rows

    def window_at(self, position: int) -> ShuffleWindow:
        """The window that contains a position."""
        epoch, offset = divmod(position, self.num_samples)
        _, edges = self._shard_order(epoch)
        return self._window(epoch, int(np.searchsorted(edges, offset, side="right")) - 1)

    def next_window(self, window: ShuffleWindow) -> ShuffleWindow:
        """The window after another, possibly in the next epoch."""
        return self.window_at(window.first_position + len(window.order))

    def _make_shard_order(self, epoch: int) -> tuple[Int64, Int64]:
        """The epoch's shards in order, and the samples before each window (num_windows + 1,)."""
        order = noise.permutation(self.seed, noise.Stream.ORDER_SHARDS, len(self.counts), epoch).numpy()
        before = np.concatenate([[0], np.cumsum(self.counts[order])])
        edges = before[np.append(np.arange(0, len(order), self.window_shards), len(order))]
        return order, edges

    def _make_window(self, epoch: int, number: int) -> ShuffleWindow:
        order, edges = self._shard_order(epoch)
        shards = order[number * self.window_shards : (number + 1) * self.window_shards]
        counts = self.counts[shards]
        # An injective number for epoch and window: no two windows ever share a permutation.
        name = epoch * self.num_windows + number
        inside = noise.permutation(self.seed, noise.Stream.ORDER_SAMPLES, int(counts.sum()), name).numpy()
        starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
        return ShuffleWindow(epoch * self.num_samples + int(edges[number]), shards, starts, inside)


def rank_slice(step: int, global_batch: int, rank: int, world: int) -> range:
    """Positions of a rank in a step. Ranks differ by at most one position and together cover each exactly once."""
    first = step * global_batch
    return range(first + rank * global_batch // world, first + (rank + 1) * global_batch // world)
