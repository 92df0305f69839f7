"""The GPUs of a pool: the kind on which a generation is made, and the nodes on which its workers are placed."""

import logging
import threading
from collections import defaultdict
from collections.abc import Collection, Sequence

from ddpm_pipeline.cluster import (
    TYPE_LABEL,
    NodeReport,
    Workers,
    ask_nodes,
    require_fit_workers,
    unfit_message,
)
from ddpm_pipeline.config.device_kind import DeviceKind
from ddpm_pipeline.config.generation import GenerateConfig
from ddpm_pipeline.generate.device_check import UnfitDevice, other_kind
from ddpm_pipeline.generate.stored_generation import Generation

NODE_LABEL = "ray.io/node-id"
log = logging.getLogger(__name__)


def workers_of(config: GenerateConfig) -> Workers:
    """What each worker takes from its node."""
    return Workers(
        config.cpus_per_worker,
        config.gpus_per_worker,
        gpus_setting="gpus_per_worker",
        compile=config.compile,
        labels=config.node_labels,
    )


def ask_pool(workers: Workers, kind: DeviceKind | None, stop: threading.Event) -> list[NodeReport]:
    """What a GPU of each node answered where the workers may be placed; nothing for work on the CPU.

    Waits until one is fit for a generation of this kind (None: not begun yet) or all have answered, also for a node
    that the cluster has yet to add. The list is empty if `stop` is set meanwhile. UserError for work on the CPU if a
    kind of node cannot do it.
    """
    if workers.gpus:
        return ask_nodes(workers, stop, every_node=True, kind=kind)
    require_fit_workers(workers, stop)
    return []


def most_common_kind(pool: Sequence[NodeReport], setting: str) -> DeviceKind:
    """The kind of most fit GPUs; of equally many, the first by name. UnfitDevice, about `setting`, if none is fit."""
    counts: defaultdict[DeviceKind, float] = defaultdict(float)
    for found in pool:
        if found.report.kind is not None and found.is_fit(None):
            counts[found.report.kind] += found.gpus
    if counts:
        return min(counts, key=lambda kind: (-counts[kind], str(kind)))
    if not pool:
        raise UnfitDevice(f"{setting}: the nodes that were asked for a GPU are gone; try again")
    raise UnfitDevice(unfit_message(pool[0], setting))


def require_some(kind: DeviceKind | None, pool: Sequence[NodeReport], setting: str) -> None:
    """UnfitDevice if no GPU of the pool is fit and of this kind (None: of any).

    It names both kinds, or the first fault and its remedy where no GPU is fit.
    """
    common = most_common_kind(pool, setting)
    if kind is not None and not any(found.is_fit(kind) for found in pool):
        raise UnfitDevice(other_kind(kind, common))


def log_left_out(kind: DeviceKind | None, pool: Sequence[NodeReport], setting: str) -> None:
    """Warn of each node on which no work is placed, and say why."""
    for found in pool:
        if found.report.fault is not None:
            log.warning("%s; no work is placed there", unfit_message(found, setting))
        elif not found.is_fit(kind):
            log.warning(
                "node %s: its GPU is %s, but the generation is of %s; no work is placed there",
                found.node,
                found.report.kind,
                kind,
            )


def selector_of(
    kind: DeviceKind | None, pool: Sequence[NodeReport], unfit_nodes: Collection[str] = ()
) -> dict[str, str]:
    """Ray's label selector for nodes whose GPUs are fit and of this kind, and for nodes that have yet to be asked.

    Other nodes are left out by their id, as are `unfit_nodes`, and other types of GPU by their label.
    """
    fit = [found for found in pool if found.is_fit(kind) and found.node_id not in unfit_nodes]
    left_out = ({found.node_id for found in pool} | set(unfit_nodes)) - {found.node_id for found in fit}
    selector: dict[str, str] = {}
    if left_out:
        selector[NODE_LABEL] = f"!in({', '.join(sorted(left_out))})"
    labels = {found.type_label for found in fit}
    if kind is not None and labels and None not in labels:
        selector[TYPE_LABEL] = f"in({', '.join(sorted(label for label in labels if label))})"
    return selector


def with_kind(generation: Generation, kind: DeviceKind | None) -> Generation:
    """The same generation on that kind of GPU; on a CPU, `generation`."""
    if generation.spec.device == "cpu" or kind is None:
        return generation
    return Generation(generation.store, generation.spec.model_copy(update={"device_kind": kind}))
