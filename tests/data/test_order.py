"""The global order: exact permutations, the same for any number of workers, found without walking."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddpm_pipeline.data.reading.order import GlobalOrder, rank_slice
from tests.effort import examples


def rows_of(order: GlobalOrder, start: int, stop: int) -> np.ndarray:
    shards, members = order.lookup(np.arange(start, stop))
    return np.concatenate([[0], np.cumsum(order.counts)])[shards] + members


@examples(40)
@given(
    st.lists(st.integers(0, 30), min_size=1, max_size=12).filter(lambda counts: sum(counts) > 0),
    st.integers(0, 2**63 - 1),
    st.integers(1, 14),
    st.integers(0, 1000),
)
def test_every_epoch_is_an_exact_permutation(counts: list[int], seed: int, window: int, epoch: int) -> None:
    order = GlobalOrder(np.array(counts), seed, window)
    n = order.num_samples
    assert sorted(rows_of(order, epoch * n, (epoch + 1) * n)) == list(range(n))


def test_epochs_seeds_and_windows_give_different_orders() -> None:
    counts = np.full(10, 20)
    orders = [
        tuple(rows_of(GlobalOrder(counts, seed, window), epoch * 200, (epoch + 1) * 200))
        for seed in (0, 1)
        for window in (1, 4, 10)
        for epoch in range(4)
    ]
    assert len(set(orders)) == len(orders)


def test_windows_of_equal_size_are_mixed_differently() -> None:
    order = GlobalOrder(np.full(40, 5), 0, 4)
    mixes = set()
    for epoch in range(3):
        for number in range(10):
            mixes.add(tuple(order.window_at(epoch * 200 + number * 20).order))
    assert len(mixes) == 30


def test_a_position_is_the_same_sample_whichever_way_it_is_asked_for() -> None:
    counts = np.array([5, 0, 9, 14, 3, 7])
    walk = rows_of(GlobalOrder(counts, 3, 2), 0, 38 * 3)
    fresh = GlobalOrder(counts, 3, 2)
    for position in np.random.default_rng(0).permutation(38 * 3):
        assert rows_of(fresh, position, position + 1)[0] == walk[position]


def test_only_the_shards_of_a_window_are_read_at_a_time() -> None:
    order = GlobalOrder(np.full(12, 10), 1, 3)
    shards, _ = order.lookup(np.arange(120))
    for window in range(4):
        assert len(set(shards[window * 30 : (window + 1) * 30])) == 3


@examples(100)
@given(st.integers(0, 10**9), st.integers(1, 1000), st.data())
def test_the_slices_of_all_ranks_are_the_batch(step: int, batch: int, data: st.DataObject) -> None:
    world = data.draw(st.integers(1, batch))
    slices = [rank_slice(step, batch, rank, world) for rank in range(world)]
    assert [p for s in slices for p in s] == list(range(step * batch, (step + 1) * batch))
    assert max(map(len, slices)) - min(map(len, slices)) <= 1
    assert min(map(len, slices)) >= 1


@pytest.mark.parametrize("position", [0, 10**8, 10**10])
def test_positions_far_out_are_found(position: int) -> None:
    order = GlobalOrder(np.array([7, 7, 6]), 0, 2)
    shards, members = order.lookup(np.array([position]))
    assert members[0] < order.counts[shards[0]]
