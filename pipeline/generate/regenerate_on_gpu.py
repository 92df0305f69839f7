"""Sampling stored samples again as a Ray task, on a GPU of the kind that made them."""

import threading
from collections.abc import Iterator, Sequence
from typing import Any

import ray
from ray.exceptions import RayTaskError

from pipeline.config.model_card import ModelCard
from pipeline.errors import UserError
from pipeline.generate.device_check import UnfitDevice
from pipeline.generate.pool_kinds import ask_pool, require_some, selector_of
from pipeline.generate.regenerate import Comparison, Samples, compare_here
from pipeline.generate.stored_generation import Generation


def compare_on_gpu(
    generation: Generation, card: ModelCard, weights: bytes, chosen: Sequence[Samples]
) -> Iterator[Comparison]:
    """Sample on one GPU of the cluster. UnfitDevice if none is of the spec's kind."""
    kind = generation.spec.device_kind
    gpus = ask_pool(1, threading.Event())
    if kind is not None:
        try:
            require_some(kind, gpus)
        except UserError as error:
            raise UnfitDevice(str(error)) from error
    task: Any = ray.remote(_compare_all)
    selector = selector_of(kind, gpus) or None
    results = task.options(num_cpus=1, num_gpus=1, label_selector=selector, num_returns="streaming").remote(
        generation, card, weights, list(chosen)
    )
    try:
        for reference in results:
            yield ray.get(reference)
    except RayTaskError as error:
        if isinstance(error.cause, UnfitDevice):
            raise error.cause from None
        raise


def _compare_all(
    generation: Generation, card: ModelCard, weights: bytes, chosen: list[Samples]
) -> Iterator[Comparison]:
    yield from compare_here(generation, card, weights, chosen)
