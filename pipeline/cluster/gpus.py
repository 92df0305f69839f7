"""The check of a cluster's GPUs as tasks on its nodes, before work is placed there.

A node whose torch cannot use its GPU is otherwise found by the work itself: after a minute, and again at each restart
of a group of workers and for each shard of a generation.
"""

import logging
import os
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from ddpm_pipeline.cluster.nodes import has_room, living_nodes
from ddpm_pipeline.cluster.placement import on_node
from ddpm_pipeline.config.device_kind import DeviceKind
from ddpm_pipeline.devices.preflight import (
    ANSWER_SECONDS,
    GpuNeeds,
    GpuReport,
    check_gpus,
    compiler_fault,
)
from ddpm_pipeline.errors import UserError

GROWS_VARIABLE = "DDPM_CLUSTER_GROWS"
"""Set on clusters that add nodes when work waits for them."""
TYPE_LABEL = "ray.io/accelerator-type"
"""Ray's label of a node for the type of its GPUs."""
_GROUP_LABEL = "ray.io/node-group"
_POLL_SECONDS = 0.5
_REPORT_SECONDS = 60.0
_FREE_SECONDS = ANSWER_SECONDS + 20.0
"""Within which a node with a free GPU answers; the rest is for Ray to start the task's process."""
log = logging.getLogger(__name__)


def grows() -> bool:
    """Whether the cluster adds nodes when work waits for them."""
    return bool(os.environ.get(GROWS_VARIABLE))


@dataclass(frozen=True)
class Workers:
    """What each worker of a job takes from a node, and what its work requires there."""

    cpus: float
    gpus: float
    """0 = work on the CPU."""
    gpus_setting: str
    """Full name of the setting, for messages."""
    nccl: bool = False
    """Several of them train together."""
    compile: bool = False
    """They compile the network."""
    labels: Mapping[str, str] = field(default_factory=dict[str, str])
    """Labels of the nodes on which they are placed."""


@dataclass(frozen=True)
class NodeReport:
    """What a node answered."""

    node: str
    """Its address."""
    node_id: str
    """Ray's name for it."""
    report: GpuReport
    gpus: float = 0.0
    """GPUs of the node."""
    type_label: str | None = None
    """Ray's name for their type, such as `A100`, which tells fewer kinds apart than `report.kind`; None if unknown."""

    def is_fit(self, kind: DeviceKind | None) -> bool:
        """Whether the GPU can do the work and is of this kind; None accepts any."""
        return self.report.fault is None and kind in (None, self.report.kind)


def require_fit_workers(
    workers: Workers, stop: threading.Event, patience_seconds: float | None = None
) -> list[DeviceKind]:
    """The kinds of GPU on which the workers may be placed, in order of their names; none for work on the CPU.

    Asks one GPU of each kind of node. Where all are busy, or the cluster has yet to add a node, this waits as the work
    itself would: until `stop` is set, or for `patience_seconds` if they are given; then the list may be empty.
    UserError for the first GPU that cannot do the work.
    """
    if not workers.gpus and not workers.compile:
        return []
    reports = ask_nodes(workers, stop, patience_seconds)
    for found in reports:
        if found.report.fault is not None:
            raise UserError(unfit_message(found, workers.gpus_setting if workers.gpus else "compile"))
    kinds = {str(found.report.kind): found.report.kind for found in reports if found.report.kind is not None}
    return [kinds[name] for name in sorted(kinds)]


def ask_nodes(
    workers: Workers,
    stop: threading.Event,
    patience_seconds: float | None = None,
    *,
    every_node: bool = False,
    kind: DeviceKind | None = None,
) -> list[NodeReport]:
    """What one GPU of each kind of node answered, or of `every_node`, where the workers may be placed.

    Waits as `require_fit_workers` does. Asking one of each kind of node, it ends at the first fault. Asking every node,
    it waits until a GPU is fit, and of this `kind` if one is given, or all have answered; where the cluster grows, any
    answer will do, because it may add a fit node.
    """
    return _Inquiry(workers, stop, patience_seconds, every_node, kind).run()


def check_every_gpu(wait_seconds: float) -> tuple[list[NodeReport], list[str]]:
    """Reports of every GPU, and the addresses of nodes whose GPUs were not all free within `wait_seconds`."""
    nodes = [node for node in living_nodes() if node["Resources"].get("GPU", 0) >= 1]
    tasks = {
        _task(GpuNeeds(every=True), int(node["Resources"]["GPU"]), str(node["NodeID"])): node
        for node in nodes
    }
    if not tasks:
        return [], []
    done, busy = ray.wait(list(tasks), num_returns=len(tasks), timeout=wait_seconds + ANSWER_SECONDS)
    for reference in busy:
        ray.cancel(reference)
    found = [one for reference in tasks if reference in done for one in _answer(reference, tasks[reference])]
    return found, [_address(tasks[reference]) for reference in busy]


def unfit_message(found: NodeReport, setting: str) -> str:
    """One line on a GPU that cannot do the work."""
    report = found.report
    return f"{setting}: node {found.node}, {report.gpu}: {report.fault}; {report.remedy}"


class _Inquiry:
    """One task for each kind of node, and the wait for their answers."""

    def __init__(
        self,
        workers: Workers,
        stop: threading.Event,
        patience_seconds: float | None,
        every_node: bool,
        kind: DeviceKind | None,
    ) -> None:
        self._workers = workers
        self._stop = stop
        self._patience_seconds = patience_seconds
        self._every_node = every_node
        self._kind = kind
        self._needs = GpuNeeds(nccl=workers.nccl, compiler=workers.compile)
        self._began = time.monotonic()
        self._reported = self._began
        self._answered: float | None = None
        """When the first answer came with which the work can begin."""

    def run(self) -> list[NodeReport]:
        """What the nodes answered."""
        pending = self._start()
        reports: dict[str, NodeReport] = {}
        while pending and not self._stop.is_set():
            done, _ = ray.wait(list(pending), num_returns=1, timeout=_POLL_SECONDS)
            for reference in done:
                found = _answer(reference, pending.pop(reference))
                reports.update({one.node_id: one for one in found})
                if self._answered is None and any(self._is_enough(one) for one in found):
                    self._answered = time.monotonic()
            if not self._every_node and any(found.report.fault is not None for found in reports.values()):
                break
            if self._is_over():
                log.warning("no free GPU to check on %s; going on without", _addresses(pending.values()))
                break
            if self._answered is None:
                self._say_that_it_waits()
                if self._needs_another_node(pending):
                    pending[self._task_anywhere()] = {}
        for reference in pending:
            ray.cancel(reference)
        return list(reports.values())

    def _start(self) -> dict[Any, Mapping[str, Any]]:
        workers = self._workers
        kinds: dict[object, Mapping[str, Any]] = {}
        for node in living_nodes(workers.labels):
            if has_room(node, workers.cpus, workers.gpus):
                kinds.setdefault(node["NodeID"] if self._every_node else _kind_of_node(node), node)
        if not kinds:  # placed wherever the cluster adds a node
            return {self._task_anywhere(): {}}
        return {_task(self._needs, workers.gpus, str(node["NodeID"])): node for node in kinds.values()}

    def _task_anywhere(self) -> Any:
        return _task(self._needs, self._workers.gpus, None, self._workers.labels)

    def _is_enough(self, found: NodeReport) -> bool:
        return not self._every_node or grows() or found.is_fit(self._kind)

    def _is_over(self) -> bool:
        if self._answered is not None:
            # Other nodes may be busy for long: the work can begin without them.
            return time.monotonic() - self._answered > _FREE_SECONDS
        patience = self._patience_seconds
        return patience is not None and time.monotonic() - self._began > patience

    def _needs_another_node(self, pending: Mapping[Any, Mapping[str, Any]]) -> bool:
        """Whether to ask wherever a GPU is free or the cluster adds one: the nodes asked by name are all busy."""
        are_busy = time.monotonic() - self._began > _FREE_SECONDS
        return bool(pending) and grows() and are_busy and all(pending.values())

    def _say_that_it_waits(self) -> None:
        if time.monotonic() - self._reported > _REPORT_SECONDS:
            self._reported = time.monotonic()
            what = "a node" if grows() else "a free GPU" if self._workers.gpus else "free resources"
            log.warning("waiting for %s, to check it before work is placed there", what)


def _address(node: Mapping[str, Any]) -> str:
    return str(node["NodeManagerAddress"])


def _addresses(nodes: Iterable[Mapping[str, Any]]) -> str:
    return ", ".join(sorted(_address(node) for node in nodes if node)) or "the cluster"


def _kind_of_node(node: Mapping[str, Any]) -> object:
    """Equal for nodes with the same type of GPU, as Ray names it, in the same group of the cluster's manifest."""
    types = frozenset(name for name in node["Resources"] if name.startswith("accelerator_type:"))
    return types, (node.get("Labels") or {}).get(_GROUP_LABEL)


def _task(needs: GpuNeeds, gpus: float, node_id: str | None, labels: Mapping[str, str] | None = None) -> Any:
    """Start the check on a node, or on any that has the labels; the result is for `_answer`."""
    task: Any = ray.remote(_check if gpus else _check_compiler)
    place: dict[str, Any] = {"label_selector": dict(labels) if labels else None}
    if node_id:
        place = {"scheduling_strategy": on_node(node_id)}
    return task.options(name="preflight", num_cpus=0, num_gpus=gpus, max_retries=0, **place).remote(needs)


def _answer(reference: Any, node: Mapping[str, Any]) -> list[NodeReport]:
    """What a task returned; nothing if its node was lost meanwhile."""
    try:
        node_id, address, reports = ray.get(reference)
    except RayTaskError:
        raise  # a bug: its traceback is wanted
    except RayError as error:
        log.warning(
            "%s was lost while it was checked (%s)",
            _address(node) if node else "a node",
            type(error).__name__,
        )
        return []
    node = node or next((one for one in living_nodes() if one["NodeID"] == node_id), {})  # added since
    gpus, label = node.get("Resources", {}).get("GPU", 0.0), (node.get("Labels") or {}).get(TYPE_LABEL)
    return [NodeReport(address, node_id, report, gpus, label) for report in reports]


def _check(needs: GpuNeeds) -> tuple[str, str, list[GpuReport]]:
    return *_here(), check_gpus(needs)


def _check_compiler(needs: GpuNeeds) -> tuple[str, str, list[GpuReport]]:
    """The same for work on the CPU, for which Inductor writes C++."""
    fault, remedy = compiler_fault("c++") or (None, "")
    return *_here(), [GpuReport(gpu="CPU", fault=fault, remedy=remedy)]


def _here() -> tuple[str, str]:
    """Name and address of the node."""
    return ray.get_runtime_context().get_node_id(), ray.util.get_node_ip_address()
