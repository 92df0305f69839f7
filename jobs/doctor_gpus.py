"""What `ddpm doctor` finds out about GPUs: this machine's, and those of the Ray cluster, by computing on each."""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from ddpm_pipeline.errors import UserError
from ddpm_pipeline.jobs.cluster_address import DRIVER_VARIABLE, dashboard_address
from ddpm_pipeline.jobs.doctor_findings import Finding, refused

if TYPE_CHECKING:
    from ddpm_pipeline.devices.preflight import GpuReport

FREE_SECONDS = 15.0
"""For the GPUs of a node to be free."""


def check_gpus(devices: Path = Path("/dev")) -> Finding:
    """Whether torch can compute on the GPUs that the machine shows."""
    import torch

    from ddpm_pipeline.devices.preflight import GpuNeeds, check_gpus

    shown = len(list(devices.glob("nvidia[0-9]*")))
    if not shown and not torch.cuda.is_available():
        return Finding("gpus", True, "none; the CPU does the work")
    return _finding("gpus", f"{shown or 'no'} in /dev", check_gpus(GpuNeeds(every=True)))


def check_cluster_gpus(environ: Mapping[str, str] = os.environ) -> list[Finding]:
    """A finding for each node of the cluster that declares GPUs, from a task that computes on every one of them.

    Only a driver can ask, so RAY_ADDRESS must name the cluster.
    """
    name = "cluster gpus"
    if not environ.get(DRIVER_VARIABLE) or "://" in environ[DRIVER_VARIABLE]:
        if dashboard_address(environ) is None:
            return []
        remedy = f"run ddpm doctor on a node of the cluster, with {DRIVER_VARIABLE}=HOST:PORT, to check them"
        return [Finding(name, True, "not checked from here", remedy)]
    from ddpm_pipeline.jobs.ray_session import ray_cluster

    try:
        with ray_cluster():
            from ddpm_pipeline.cluster import check_every_gpu

            found, busy = check_every_gpu(FREE_SECONDS)
    except UserError as error:
        return [refused(name, error)]
    findings = [
        _finding(name, f"node {node}", [one.report for one in of_node])
        for node, of_node in groupby(found, lambda one: one.node)
    ]
    findings += [Finding(name, True, f"node {node}: busy, so not checked") for node in busy]
    return findings or [Finding(name, True, "no node declares any")]


def _finding(name: str, place: str, reports: "Sequence[GpuReport]") -> Finding:
    """One line on all GPUs of a place; of several faults the first."""
    faulty = [report for report in reports if report.fault is not None]
    if faulty:
        more = f" (and {len(faulty) - 1} more)" if len(faulty) > 1 else ""
        return Finding(name, False, f"{place}, {faulty[0].gpu}: {faulty[0].fault}{more}", faulty[0].remedy)
    kinds = Counter(str(report.kind) for report in reports)
    text = ", ".join(f"{count} x {kind}" for kind, count in sorted(kinds.items()))
    return Finding(name, True, f"{place}: {text}")
