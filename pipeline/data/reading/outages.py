"""Batches for a training that outlives an outage of the store."""

import logging
import math
import time
from collections.abc import Iterator
from dataclasses import replace

from pipeline.data.reading.loader import Batch, Loader
from pipeline.retry import OUTAGE_SECONDS, PAUSE_SECONDS
from pipeline.store import StoreUnreachable

log = logging.getLogger(__name__)


def resilient_batches(
    loader: Loader, start_step: int, stop_step: int, seconds: float = OUTAGE_SECONDS
) -> Iterator[Batch]:
    """`loader.batches`, taken up again at the next step while the store does not answer.

    That a batch is late changes nothing in it; the time counts as waiting for data. Raises StoreUnreachable when
    the store stayed away for `seconds`.
    """
    step, away_since = start_step, math.inf
    while step < stop_step:
        try:
            for batch in loader.batches(step, stop_step):
                waited = max(0.0, time.monotonic() - away_since)
                away_since = math.inf
                step += 1
                yield replace(batch, wait_seconds=batch.wait_seconds + waited) if waited else batch
        except StoreUnreachable as error:
            away_since = min(away_since, time.monotonic())
            if time.monotonic() - away_since > seconds:
                raise
            log.warning("step %d waits for its samples: %s", step, error)
            time.sleep(PAUSE_SECONDS)
