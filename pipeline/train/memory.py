"""What a training needs, computed before it begins: memory, and the micro-batch that fits.

The network runs once on torch's meta device, where operations have shapes and no numbers: that takes a second, no
data and no memory, and depends on nothing but the settings. The micro-batch changes how sums are rounded, so it follows
from settings and hardware alone, never from what happens to be free: a restart on the same machines splits the batch
the same way.
"""

import os
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from ddpm_pipeline.config.net import NetConfig
from ddpm_pipeline.config.training import TrainConfig, WorkerConfig
from ddpm_pipeline.devices import is_out_of_memory
from ddpm_pipeline.errors import UserError
from ddpm_pipeline.nets import build_net, parameter_count
from ddpm_pipeline.nets.build import blocks_of
from ddpm_pipeline.nets.flops import given_conditions, on_meta
from ddpm_pipeline.train.data_parallel import divides_state

FLOAT32_BYTES = 4
Precision = Literal["float32", "bfloat16"]
USABLE_SHARE = 0.8
"""Of a device's memory; the rest is for the runtime, libraries and fragmentation."""
MACHINE_SHARE = 0.5
"""Of a machine's memory; the rest is for the system, caches, loader processes and Ray's object store."""
OVERHEAD = 1.5
"""Peak memory of a pass relative to what it saves for the backward pass: gradients of activations, workspaces."""
_saved: dict[tuple[str, Precision], int] = {}
"""What `activation_bytes` has counted, by the network's digest and precision."""
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


@dataclass(frozen=True)
class Memory:
    """Bytes that one worker holds beside activations, of the first four its part where the workers divide the state."""

    weights: int
    """With those of the teacher, if there is one."""
    gradients: int
    """Twice with DDP: while micro-batches accumulate, its buckets lie beside the gradients of all before the last."""
    optimizer: int
    """Adam's two moments."""
    averages: int
    collected: int = 0
    """Where the workers divide the state, whole weights and gradients of the blocks that are being computed."""

    @property
    def total(self) -> int:
        """All of these."""
        return self.weights + self.gradients + self.optimizer + self.averages + self.collected


def state_memory(config: TrainConfig, world: int | None = None) -> Memory:
    """Memory of the training's state, independent of the batch, in a group of `world` workers; None = of all."""
    world = config.workers.most if world is None else world
    with torch.device("meta"):
        net = build_net(config.net)
    one = parameter_count(net) * FLOAT32_BYTES
    averages = len(config.ema.widths) if config.ema.kind == "power" else 1
    networks = 1 if config.distillation is None else 2
    if not divides_state(config.workers, world):
        return Memory(networks * one, one * (2 if world > 1 else 1), 2 * one, averages * one)
    part = -(-one // world)
    return Memory(networks * part, part, 2 * part, averages * part, _collected(net, config.precision))


def _collected(net: nn.Module, precision: Precision) -> int:
    """Whole weights of stem, head and two blocks, one of which is collected in advance, and the gradient of one.

    Autocast keeps a copy of each weight in its own precision from the forward to the backward pass.
    """
    sizes = [parameter_count(block) * FLOAT32_BYTES for block in blocks_of(net)] or [0]
    total = parameter_count(net) * FLOAT32_BYTES
    copies = total // 2 if precision == "bfloat16" else 0
    return total - sum(sizes) + 3 * max(sizes) + copies


def activation_bytes(net: NetConfig, precision: Precision) -> int:
    """Bytes that the forward pass of one sample saves for the backward pass: every saved tensor once.

    Attention counts as if it saved its matrix, which fused kernels do not: 8% too much for DDPM's CIFAR-10 network.
    """
    key = (net.digest(), precision)
    if key not in _saved:  # a process may train the same network several times
        _saved[key] = _saved_bytes(net, precision)
    return _saved[key]


def _saved_bytes(net: NetConfig, precision: Precision) -> int:
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    network, x, t, labels, dropout = on_meta(net, dtype)
    own = {id(parameter.untyped_storage()) for parameter in network.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if id(storage) not in own:
            kept[id(storage)] = storage  # keeps it alive, or its id could be reused
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        network(x, t, **given_conditions(labels, dropout)).float().square().mean()
    return sum(storage.nbytes() for storage in kept.values())


def fitting_samples(config: TrainConfig, memory_bytes: int, world: int | None = None) -> int:
    """Largest micro-batch that fits the memory of each of `world` workers (None = all) by this estimate; at least 1."""
    room = memory_bytes - state_memory(config, world).total
    return max(1, int(room / (OVERHEAD * activation_bytes(config.net, config.precision))))


def worker_memory_bytes(workers: WorkerConfig, device: torch.device) -> int:
    """Memory that a worker may use here: its share of the GPU, or its cores' share of the machine."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        return int(USABLE_SHARE * total * min(1.0, workers.gpus_per_worker or 1.0))
    share = min(1.0, workers.cpus_per_worker / (os.cpu_count() or 1))
    return int(MACHINE_SHARE * _machine_bytes() * share)


def with_micro_batch(config: TrainConfig, world: int, device: torch.device) -> TrainConfig:
    """The settings with a micro-batch: the given one, or the largest that fits on every worker.

    A collective call if there are several workers. It stays None where a whole share fits.
    """
    if config.workers.micro_batch is not None:
        return config
    # with DDP a group that shrank computes as the whole one did
    divided = world if config.workers.sharding == "fsdp" else None
    fits = fitting_samples(config, worker_memory_bytes(config.workers, device), divided)
    if world > 1:
        least = torch.tensor([fits], dtype=torch.int64, device=device)
        dist.all_reduce(least, op=dist.ReduceOp.MIN)
        fits = int(least)
    if fits >= -(-config.global_batch // world):
        return config
    return config.model_copy(update={"workers": config.workers.model_copy(update={"micro_batch": fits})})


def largest_micro_batch(config: TrainConfig, world: int) -> int:
    """Largest number of samples that any worker processes at a time."""
    share = -(-config.global_batch // world)
    size = config.workers.micro_batch
    return share if size is None else min(size, share)


@contextmanager
def out_of_memory_in_one_line(config: TrainConfig, world: int) -> Generator[None]:
    """Turn a lack of memory in any part of a training into a UserError that names the setting to change.

    Grids and eval/loss are computed in parts of the micro-batch as well, so it is the same setting for all parts.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise out_of_memory(config, world, error) from error


def limit_device_memory(workers: WorkerConfig, device: torch.device) -> None:
    """Keep a worker that has a part of a GPU within that part of its memory: the rest belongs to other processes."""
    if device.type == "cuda" and 0 < workers.gpus_per_worker < 1:
        torch.cuda.set_per_process_memory_fraction(workers.gpus_per_worker, device)


def out_of_memory(config: TrainConfig, world: int, error: BaseException) -> UserError:
    """The error for an estimate that was too low, or a micro-batch that was set too high."""
    samples = largest_micro_batch(config, world)
    remedy = "use a smaller network or a larger device"
    if samples > 1:
        remedy = (
            f"set train.workers.micro_batch={samples // 2}, which changes the weights in their last bits only"
        )
    reason = next(iter(str(error).splitlines()), type(error).__name__)[:200]
    return UserError(
        f"train.workers.micro_batch: {samples} samples at a time do not fit the device's memory beside the training's "
        f"state of {state_memory(config, world).total / 1e9:.3g} GB ({reason}); {remedy}"
    )


def _machine_bytes() -> int:
    """Physical memory, or the container's limit where that is lower."""
    total = int(psutil.virtual_memory().total)
    try:
        limit = _CGROUP_LIMIT.read_text().strip()
    except OSError:
        return total  # no such limit on this system
    return min(total, int(limit)) if limit.isdigit() else total
