"""Micro-batches: how many samples a worker's memory holds at a time.

The size changes how sums are rounded, so it follows from settings and hardware alone, never from what happens to be
free: a restart on the same machines cuts the batch the same way.
"""

import os
from pathlib import Path

import psutil
import torch
import torch.distributed as dist

from pipeline.config.training import TrainConfig, WorkerConfig
from pipeline.errors import UserError
from pipeline.train.requirements import activation_bytes, state_memory

USABLE_SHARE = 0.8
"""Of a device's memory; the rest is the runtime's, the libraries', and lost between allocations."""
MACHINE_SHARE = 0.5
"""Of a machine's memory; the rest is for its system, caches, loader processes and Ray's object store."""
OVERHEAD = 1.5
"""Peak memory of a pass over what it keeps for the backward pass: gradients of activations, workspaces."""
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


def fitting_samples(config: TrainConfig, memory_bytes: int) -> int:
    """Largest micro-batch that fits a worker's memory by estimate; at least 1."""
    room = memory_bytes - state_memory(config).total
    return max(1, int(room / (OVERHEAD * activation_bytes(config.net, config.precision))))


def worker_memory_bytes(workers: WorkerConfig, device: torch.device) -> int:
    """Memory that a worker may fill here: its part of the GPU, or its cores' part of the machine."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        return int(USABLE_SHARE * total * min(1.0, workers.gpus_per_worker or 1.0))
    share = min(1.0, workers.cpus_per_worker / (os.cpu_count() or 1))
    return int(MACHINE_SHARE * _machine_bytes() * share)


def with_micro_batch(config: TrainConfig, world: int, device: torch.device) -> TrainConfig:
    """The settings with a micro-batch: the given one, or the largest that fits on every worker.

    A collective call where there are several workers. None stays where a whole share fits.
    """
    if config.workers.micro_batch is not None:
        return config
    fits = fitting_samples(config, worker_memory_bytes(config.workers, device))
    if world > 1:
        least = torch.tensor([fits], dtype=torch.int64, device=device)
        dist.all_reduce(least, op=dist.ReduceOp.MIN)
        fits = int(least)
    if fits >= -(-config.global_batch // world):
        return config
    return config.model_copy(update={"workers": config.workers.model_copy(update={"micro_batch": fits})})


def largest_micro_batch(config: TrainConfig, world: int) -> int:
    """Most samples that any worker takes through the network at a time."""
    share = -(-config.global_batch // world)
    size = config.workers.micro_batch
    return share if size is None else min(size, share)


def out_of_memory(config: TrainConfig, world: int, error: Exception) -> UserError:
    """What a user can do when the estimate was too low, or the given size too high."""
    samples = largest_micro_batch(config, world)
    remedy = "use a smaller network or a larger device"
    if samples > 1:
        remedy = (
            f"set train.workers.micro_batch={samples // 2}, which changes the weights in their last bits only"
        )
    said = str(error).splitlines()[0][:200]
    return UserError(
        f"train.workers.micro_batch: {samples} samples at a time do not fit the device's memory ({said}); {remedy}"
    )


def _machine_bytes() -> int:
    """Physical memory, or the container's limit where that is lower."""
    total = int(psutil.virtual_memory().total)
    try:
        limit = _CGROUP_LIMIT.read_text().strip()
    except OSError:
        return total  # no such limit on this system
    return min(total, int(limit)) if limit.isdigit() else total
