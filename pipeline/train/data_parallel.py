"""Workers that train one network together, each on its share of the batch: what each holds, and what they exchange.

    ddp     every worker holds the whole state, and they average gradients
    fsdp    every worker holds a part of each tensor of the state (FSDP2: its first dimension, divided). The weights
            of a block are collected for its forward and backward pass and dropped after it; gradients are averaged
            to parts

Parts are DTensors with names and shapes of the whole, so optimizer, averages and clipping need not know. What must know
is here: wrapping, reading a checkpoint, writing one, and computing with the averages. Their modules are imported where
a state is divided only: they take most of a second.
"""

import sys
from collections.abc import Generator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import GradBucket  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from ddpm_pipeline.config.training import WorkerConfig
from ddpm_pipeline.nets.build import blocks_of

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def divides_state(workers: WorkerConfig, world: int) -> bool:
    """Whether each of `world` workers holds a part of the state."""
    return workers.sharding == "fsdp" and world > 1


def shard(net: nn.Module, workers: WorkerConfig, device: torch.device) -> None:
    """Leave this worker its part of each parameter of `net`, on `device`. A collective call.

    Block by block, so that no device ever holds the whole. The arithmetic stays that of DDP: weights are collected in
    float32 and cast by autocast where they are used. Collected in bfloat16, norms would compute with rounded weights.
    """
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(reduce_dtype=reduce_dtype(workers), cast_forward_inputs=False)
    mesh = DeviceMesh.from_group(dist.group.WORLD, device.type)  # pyright: ignore[reportArgumentType]
    for block in [*blocks_of(net), net]:  # the network itself: stem, head and embeddings
        divided = fully_shard(block, mesh=mesh, mp_policy=policy)
        if device.type == "cpu":
            divided.set_force_sum_reduction_for_comms(True)  # gloo has no average


def wrap(net: nn.Module, workers: WorkerConfig, device: torch.device, world: int) -> nn.Module:
    """The network as the training calls it: for DDP wrapped, otherwise itself.

    static_graph stays off: it saves a search for unused parameters that DDP does not make here, and nothing else.
    """
    if world == 1 or divides_state(workers, world):
        return net
    network = DistributedDataParallel(
        net,
        device_ids=[device.index] if device.type == "cuda" else None,
        init_sync=False,  # every rank computes the same initial weights
        gradient_as_bucket_view=True,  # gradients are averaged in place, without a copy back
    )
    if reduce_dtype(workers) == torch.bfloat16:
        network.register_comm_hook(None, bf16_compress_hook if device.type == "cuda" else _by_gloo)
    return network


def _by_gloo(group: dist.ProcessGroup | None, bucket: GradBucket) -> torch.futures.Future[Tensor]:
    """The same hook under a name that torch does not refuse on a CPU, where gloo can send bfloat16 too.

    Torch compares these annotations with its own types, so this module does not postpone them to strings.
    """
    return bf16_compress_hook(group, bucket)  # pyright: ignore[reportArgumentType]  (None is the default group)


def reduce_dtype(workers: WorkerConfig) -> torch.dtype:
    """Precision in which gradients are averaged over the workers."""
    return torch.bfloat16 if workers.reduce_dtype == "bfloat16" else torch.float32


def without_exchange(network: nn.Module, unless: bool) -> AbstractContextManager[None]:
    """Skip DDP's gradient exchange while gradients accumulate: only the last micro-batch of a step needs it.

    FSDP exchanges them for each micro-batch: until it does, every worker would hold the whole gradient.
    """
    if unless or not isinstance(network, DistributedDataParallel):
        return nullcontext()
    return network.no_sync()


def is_divided(net: nn.Module) -> bool:
    """Whether this worker has a part of the network only, so that every forward pass is a collective call."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # what is not imported has divided nothing
    return fsdp is not None and isinstance(net, fsdp.FSDPModule)


def _is_part(tensor: Tensor) -> TypeGuard["DTensor"]:
    parts = sys.modules.get("torch.distributed.tensor")
    return parts is not None and isinstance(tensor, parts.DTensor)


def part_of(whole: Tensor, like: Tensor) -> Tensor:
    """This worker's part of `whole`, divided like the parameter `like`; `whole` itself where that is not divided.

    No communication: every worker has read the same tensor. Only the part is moved to the device.
    """
    if not _is_part(like):
        return whole
    from torch.distributed.tensor import DTensor

    mesh = like.device_mesh
    parts, rank = whole.chunk(mesh.size()), mesh.get_local_rank()
    part = parts[rank] if rank < len(parts) else whole[:0]
    return DTensor.from_local(
        part.to(like.device), mesh, like.placements, run_check=False, shape=whole.shape, stride=whole.stride()
    )


def put_together(tensor: Tensor) -> Tensor:
    """The whole of a tensor that is divided among the workers, on each of them: a collective call. Others as is."""
    return tensor.full_tensor() if _is_part(tensor) else tensor


def gathered(tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """The whole tensors; empty where `keep` is false. A collective call where any is divided.

    One at a time, and from the device to memory at once, so that no device holds more than one whole tensor.
    """
    whole: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        value = put_together(tensor)
        if keep:
            whole[name] = value.cpu() if _is_part(tensor) else value
    return whole


@contextmanager
def exchanged_weights(net: nn.Module, weights: Mapping[str, Tensor]) -> Generator[None]:
    """Within it a divided network computes with `weights`, divided like its own, which lie there meanwhile.

    No copy is made, and all workers must compute the same with it, in evaluation mode.
    """
    from torch.distributed.fsdp import FSDPModule

    assert isinstance(net, FSDPModule)
    _exchange(net, weights)
    net.eval()
    try:
        yield
    finally:
        net.train()
        net.reshard()  # after a forward pass alone its own weights stay collected; the blocks' do not
        _exchange(net, weights)


@torch.no_grad()
def _exchange(net: nn.Module, weights: Mapping[str, Tensor]) -> None:
    for name, parameter in net.named_parameters():
        one, other = _part(parameter), _part(weights[name])
        kept = one.clone()
        one.copy_(other)
        other.copy_(kept)


def _part(tensor: Tensor) -> Tensor:
    return tensor.to_local() if _is_part(tensor) else tensor
