"""Sampling stored samples again as a Ray task, on a GPU of the kind that made them."""

import threading
from collections.abc import Iterator, Sequence
from typing import Any

import ray
from ray.exceptions import RayTaskError

from ddpm_pipeline.cluster import Workers
from ddpm_pipeline.config.model_card import ModelCard
from ddpm_pipeline.generate.device_check import UnfitDevice
from ddpm_pipeline.generate.pool_kinds import ask_pool, log_left_out, require_some, selector_of
from ddpm_pipeline.generate.regenerate import Comparison, Samples, compare_here
from ddpm_pipeline.generate.stored_generation import Generation

_SETTING = "--regenerate"


def compare_on_gpu(
    generation: Generation, card: ModelCard, weights: bytes, chosen: Sequence[Samples]
) -> Iterator[Comparison]:
    """Sample on one GPU of the cluster. UnfitDevice if none is fit and of the spec's kind."""
    kind = generation.spec.device_kind
    worker = Workers(cpus=1, gpus=1, gpus_setting=_SETTING, compile=generation.spec.compile)
    nodes = ask_pool(worker, kind, threading.Event())
    require_some(kind, nodes, _SETTING)
    log_left_out(kind, nodes, _SETTING)
    task: Any = ray.remote(_compare_all)
    selector = selector_of(kind, nodes) or None
    results = task.options(
        num_cpus=worker.cpus, num_gpus=worker.gpus, label_selector=selector, num_returns="streaming"
    ).remote(generation, card, weights, list(chosen))
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
