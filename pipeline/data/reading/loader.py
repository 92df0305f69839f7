"""Batches for one training worker, in the global order, starting at any step."""

from __future__ import annotations

import logging
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.utils.data
from torch import Tensor

from ddpm_pipeline.config.data import DataConfig
from ddpm_pipeline.data.index import Index
from ddpm_pipeline.data.reading.order import GlobalOrder, Int64, rank_slice
from ddpm_pipeline.data.reading.samples import SampleSource
from ddpm_pipeline.data.reading.shard_cache import Prefetcher, open_cache
from ddpm_pipeline.errors import DamageError, UserError
from ddpm_pipeline.retry import OUTAGE_POLICY, Retries, RetryPolicy
from ddpm_pipeline.store import StoreUnreachable

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Batch:
    """One worker's part of a global batch. n differs by at most one between workers: weight by n * W / B."""

    step: int
    positions: Tensor
    """int64 (n,): positions in the global order, which also key the random numbers of these samples."""
    images: Tensor
    """uint8 (n, C, H, W), in channels-last memory."""
    labels: Tensor | None
    """int64 (n,), or None for a data set without labels."""
    wait_seconds: float
    """How long the caller waited for this batch."""
    damage: tuple[str, ...] = ()
    """With `on_damage: skip`, one line for each damaged sample that was replaced by another."""
    padding: int = 0
    """Samples at the end that only fill a micro-batch to the size of the others; they count for nothing."""
    rows: Tensor | None = None
    """int64 (n,): numbers of the samples in the data set, where the loader was asked for them."""

    def tensors(self) -> dict[str, Tensor]:
        """Those there are, by name."""
        every = {
            "positions": self.positions,
            "images": self.images,
            "labels": self.labels,
            "rows": self.rows,
        }
        return {name: tensor for name, tensor in every.items() if tensor is not None}

    def map(self, made_of: Callable[[Tensor], Tensor]) -> Batch:
        """The batch with another tensor in place of each."""
        return replace(self, **{name: made_of(tensor) for name, tensor in self.tensors().items()})  # pyright: ignore[reportArgumentType]


class Loader:
    """A worker's view of the data. It has no state but its settings: progress is one integer, the next step.

    `batches(step)` resumes anywhere, at any world size, if seed, global batch and index digest are unchanged.
    """

    def __init__(
        self,
        config: DataConfig,
        index: Index,
        seed: int,
        global_batch: int,
        rank: int = 0,
        world: int = 1,
        with_rows: bool = False,
    ) -> None:
        """`with_rows`: say of each sample which it is of the data set, in `Batch.rows`."""
        if not 0 <= rank < world:
            raise ValueError(f"rank {rank} must be from 0 to {world - 1}")
        if global_batch < world:
            raise UserError(
                f"global batch {global_batch} is less than one sample for each of {world} workers"
            )
        self.config, self.index, self.seed = config, index, seed
        self.global_batch = global_batch
        open_cache(config, index)  # fail now if the cache limit is too small
        self._dataset = _StepSampler(SampleSource(config, index, seed), global_batch, rank, world, with_rows)

    def batches(self, start_step: int, stop_step: int) -> Iterator[Batch]:
        """Batches of steps start_step .. stop_step - 1. Raises DamageError (see `on_damage`), StoreUnreachable."""
        steps = range(start_step, stop_step)
        self._dataset.stop_step = stop_step
        results = (
            self._workers(steps)
            if self.config.num_loader_processes
            else map(self._dataset.__getitem__, steps)
        )
        prefetcher = self._prefetcher()
        if prefetcher is not None and steps:
            prefetcher.advance(start_step * self.global_batch)
        try:
            started = time.perf_counter()
            for step, result in zip(steps, results, strict=True):
                if isinstance(result, Exception):
                    raise result
                if prefetcher is not None:
                    prefetcher.advance((step + 1) * self.global_batch)
                yield replace(result, wait_seconds=time.perf_counter() - started)
                started = time.perf_counter()
        finally:
            del results  # ends the loader processes: a traceback would keep them, and this frame, alive
            if prefetcher is not None:
                prefetcher.close()

    def close(self) -> None:
        """Release descriptors and memory."""
        self._dataset.source.close()

    def _prefetcher(self) -> Prefetcher | None:
        cache = open_cache(self.config, self.index)
        if cache is None:
            return None
        return Prefetcher(cache, GlobalOrder(self.index.counts, self.seed, self.config.window_shards))

    def _workers(self, steps: range) -> Iterator[Batch | Exception]:
        # forkserver: a fork of a process with CUDA, gloo or gRPC threads may hang; the server imports only once.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["ddpm_pipeline.data.reading.loader"])
        return iter(
            torch.utils.data.DataLoader(
                self._dataset,
                batch_size=None,
                sampler=steps,
                num_workers=self.config.num_loader_processes,
                prefetch_factor=self.config.prefetch,
                collate_fn=_identity,
                worker_init_fn=_SetEnvironment(dict(os.environ)),
                multiprocessing_context=context,
            )
        )


def resilient_batches(
    loader: Loader, start_step: int, stop_step: int, policy: RetryPolicy = OUTAGE_POLICY
) -> Iterator[Batch]:
    """`loader.batches`, resumed at the next step while the store does not answer.

    That a batch is late changes nothing in it; the time counts as waiting for data. Raises StoreUnreachable when
    the store stayed away for longer than `policy` allows.
    """
    step = start_step
    retries = Retries(
        policy, lambda error, left: log.warning("step %d: waiting for samples: %s", step, error)
    )
    while step < stop_step:
        try:
            for batch in loader.batches(step, stop_step):
                waited = retries.failing_seconds
                retries.reset()
                step += 1
                yield replace(batch, wait_seconds=batch.wait_seconds + waited) if waited else batch
        except StoreUnreachable as error:
            if not retries.pause(error):
                raise


class _StepSampler(torch.utils.data.Dataset["Batch | Exception"]):
    """Maps a step to this rank's batch. Stateless, so any loader process can make any batch."""

    def __init__(
        self, source: SampleSource, global_batch: int, rank: int, world: int, with_rows: bool
    ) -> None:
        self.source, self.global_batch, self.rank, self.world = source, global_batch, rank, world
        self.with_rows = with_rows
        self.stop_step = 0
        """Exclusive end of reading ahead."""

    def __getitem__(self, step: int) -> Batch | Exception:
        positions = self._positions(step)
        worker = torch.utils.data.get_worker_info()
        own_steps = range(step, self.stop_step, 1 if worker is None else worker.num_workers)
        try:
            found = self.source.get(positions, map(self._positions, own_steps[1:]))
        except (UserError, DamageError) as error:
            return error  # not raised: a loader process would wrap it in its traceback
        rows = found.rows if self.with_rows else None
        names = torch.from_numpy(positions)
        return Batch(step, names, found.images, found.labels, 0.0, found.damage, rows=rows)

    def _positions(self, step: int) -> Int64:
        own = rank_slice(step, self.global_batch, self.rank, self.world)
        return np.arange(own.start, own.stop, dtype=np.int64)


class _SetEnvironment:
    """Copies this process's environment to a loader process: a fork server keeps that of its own start."""

    def __init__(self, variables: dict[str, str]) -> None:
        self._variables = variables

    def __call__(self, worker: int) -> None:
        os.environ.update(self._variables)


def _identity(batch: Any) -> Any:
    return batch
