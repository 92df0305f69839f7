"""The endless global order of training samples, which knows nothing of workers.

Position p lies in epoch p // N. Each epoch permutes the shards, cuts them into windows, and permutes the
samples inside each window; so an epoch is an exact permutation, any position is found without walking
there, and reading touches `window_shards` shards at a time. Step s takes positions [sB, (s+1)B), rank r
of W its even slice of those.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from pipeline.diffusion import noise

Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class ShuffleWindow:
    """Some shards of an epoch, mixed: `starts` are rows before each of `shards`, `order` permutes their
    rows.
    """

    first_position: int
    shards: Int64
    starts: Int64
    order: Int64


class GlobalOrder:
    """Looks positions up. `counts` are the samples of each shard, int64 (num_shards,)."""

    def __init__(self, counts: Int64, seed: int, window_shards: int) -> None:
        self.counts, self.seed = counts, seed
        self.num_samples = int(counts.sum())
        self.window_shards = min(window_shards, len(counts))
        self.num_windows = -(-len(counts) // self.window_shards)
        # Bounded: one epoch's shard order and the windows at a seam are all that a batch needs.
        self._shard_order = lru_cache(maxsize=2)(self._make_shard_order)
        self._window = lru_cache(maxsize=3)(self._make_window)

    def lookup(self, positions: Int64) -> tuple[Int64, Int64]:
        """(shard, row in the shard) of each position, int64 (n,) both."""
        shards, rows = np.empty_like(positions), np.empty_like(positions)
        todo = np.arange(len(positions))
        while len(todo):
            window = self.window_at(int(positions[todo[0]]))
            offsets = positions[todo] - window.first_position
            inside = (offsets >= 0) & (offsets < len(window.order))
            picked = window.order[offsets[inside]]
            slot = np.searchsorted(window.starts, picked, side="right") - 1
            shards[todo[inside]] = window.shards[slot]
            rows[todo[inside]] = picked - window.starts[slot]
            todo = todo[~inside]
        return shards, rows

    def window_at(self, position: int) -> ShuffleWindow:
        """The window that holds a position."""
        epoch, offset = divmod(position, self.num_samples)
        _, edges = self._shard_order(epoch)
        return self._window(epoch, int(np.searchsorted(edges, offset, side="right")) - 1)

    def next_window(self, window: ShuffleWindow) -> ShuffleWindow:
        """The window after another, into the next epoch if need be."""
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
        # epoch and window make one number, injectively: no two windows ever share a permutation.
        name = epoch * self.num_windows + number
        inside = noise.permutation(self.seed, noise.Stream.ORDER_SAMPLES, int(counts.sum()), name).numpy()
        starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
        return ShuffleWindow(epoch * self.num_samples + int(edges[number]), shards, starts, inside)


def rank_slice(step: int, global_batch: int, rank: int, world: int) -> range:
    """Positions of a rank in a step: ranks differ by at most one, and together have each position once."""
    first = step * global_batch
    return range(first + rank * global_batch // world, first + (rank + 1) * global_batch // world)
