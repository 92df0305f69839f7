"""The simulation of the pool agrees with what can be worked out by hand."""

import dataclasses

import pytest

from benchmarks.pool_simulation import PoolModel, simulate

CALM = PoolModel(
    shard_seconds=10,
    shard_spread=0,
    dispatch_seconds=0,
    start_seconds=0,
    deaths_per_hour=0,
    straggler_share=0,
)


def test_perfect_workers_are_perfectly_efficient() -> None:
    outcome = simulate(CALM, workers=8, shards=80)
    assert outcome.makespan_seconds == pytest.approx(100)
    assert outcome.efficiency == pytest.approx(1)


def test_each_cause_of_loss_costs_what_it_must() -> None:
    def efficiency(**change: float) -> float:
        return simulate(dataclasses.replace(CALM, **change), workers=4, shards=40).efficiency

    assert efficiency(overhead_seconds=10) == pytest.approx(0.5)
    assert efficiency(start_seconds=100) == pytest.approx(0.5)
    # One driver that takes 5 s a shard feeds 4 workers of 10 s a shard half the time.
    assert efficiency(dispatch_seconds=5) == pytest.approx(0.5, abs=0.03)


def test_a_worker_that_dies_costs_time_but_no_shard() -> None:
    mortal = dataclasses.replace(CALM, deaths_per_hour=20, start_seconds=8)
    outcome = simulate(mortal, workers=16, shards=320)
    assert outcome.deaths > 5
    assert 0.5 < outcome.efficiency < 0.98


def test_a_pool_of_512_workers_with_failures_and_stragglers_stays_efficient() -> None:
    model = PoolModel(shard_seconds=60, overhead_seconds=0.3)
    assert simulate(model, workers=512, shards=512 * 50).efficiency > 0.9
