"""How the workers of a group find each other: torch's key-value store, at the node's own address.

Ray Train's own setup opens that store, which has no authentication, on every interface of rank 0's node, and lets gloo
use the address that the host name resolves to: on most Debian machines loopback, which other nodes cannot reach.

Ray Train's controller reads this module too, and computes nothing: torch is imported by what runs on workers.
"""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Mapping, MutableMapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import psutil
import ray
import ray.train
from ray.exceptions import GetTimeoutError
from ray.train.backend import Backend, BackendConfig

from ddpm_pipeline.config.device_kind import DeviceKind, Matmul
from ddpm_pipeline.errors import UserError
from ddpm_pipeline.train.train_task import UnreachableError

if TYPE_CHECKING:
    from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

INTERFACE_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
JOIN_SECONDS = 180
"""Timeout for the workers of a group, all started, to join each other."""
LEAVE_SECONDS = 30
"""Timeout for them to leave each other."""
_stores: list[TCPStore] = []
"""Rank 0's store, from `_listen` until `_join` hands it to torch."""


@dataclass
class Rendezvous(BackendConfig):
    """Ray Train's settings for joining the workers of a group, in place of its TorchConfig."""

    timeout_s: int
    """A rank waits so long for the others in a collective call."""
    backend: str | None = None
    """Set by TorchTrainer: nccl on GPUs, gloo on CPUs."""
    matmul: Matmul = "ieee"
    deterministic: bool = True
    """As the training's settings say: NCCL reads its part of it when the workers join."""

    @property
    def backend_cls(self) -> type[_Backend]:
        """The class that joins them."""
        return _Backend

    @property
    def train_func_context(self) -> Any:
        """What Ray's own setup enters around the body of a worker: the current device is the worker's."""
        from ray.train.torch.config import TorchConfigContextManager

        return TorchConfigContextManager


class _Backend(Backend):
    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
        """Called in the controller once all workers run. A single worker needs no store, so nothing listens."""
        assert isinstance(backend_config, Rendezvous)
        gpus = worker_group.get_resources_per_worker().get("GPU", 0) > 0
        kinds: list[DeviceKind | None] = worker_group.execute(
            _prepare, gpus=gpus, matmul=backend_config.matmul, deterministic=backend_config.deterministic
        )
        refuse_mixed_kinds(kinds)
        world = len(worker_group)
        if world == 1:
            return
        place = worker_group.execute_single(0, _listen, world=world)
        joins = [
            worker_group.execute_single_async(
                rank,
                _join,
                world_rank=rank,
                world=world,
                place=place,
                backend=backend_config.backend,
                collective_seconds=backend_config.timeout_s,
            )
            for rank in range(world)
        ]
        ray.get(joins)

    def on_shutdown(self, worker_group: Any, backend_config: BackendConfig) -> None:
        """Called in the controller before it ends the workers."""
        with suppress(GetTimeoutError):  # a worker that hangs is ended all the same
            ray.get(worker_group.execute_async(_leave), timeout=LEAVE_SECONDS)


def interface_of(address: str, interfaces: Mapping[str, Sequence[Any]] | None = None) -> str | None:
    """Name of the interface that carries `address`, or None where this machine has no such address.

    `interfaces`: as psutil.net_if_addrs() lists them. Every address of 127.0.0.0/8 is the loopback interface's.
    """
    wanted = ipaddress.ip_address(address)
    for name, carried in (psutil.net_if_addrs() if interfaces is None else interfaces).items():
        for entry in carried:
            if entry.family not in (socket.AF_INET, socket.AF_INET6):
                continue
            own = ipaddress.ip_address(entry.address.partition("%")[0])
            if own == wanted or (own.is_loopback and wanted.is_loopback and own.version == wanted.version):
                return name
    return None


def use_interface(address: str, environ: MutableMapping[str, str] = os.environ) -> None:
    """Make gloo and NCCL use the interface of this node's `address`, unless their variables are set.

    UserError where this machine has no such address.
    """
    name = interface_of(address)
    if name is None:
        raise UserError(
            f"node {address}: no network interface of the machine has the address that Ray gives it; start Ray there "
            "with --node-ip-address=ADDRESS, one at which the other nodes reach it"
        )
    for variable in INTERFACE_VARIABLES:
        environ.setdefault(variable, name)


def refuse_mixed_kinds(kinds: Sequence[DeviceKind | None]) -> None:
    """UserError unless the workers, by rank, have one kind of GPU.

    Kinds round differently, and each worker computes its own weights from the shared gradient: they would drift apart.
    """
    for rank, kind in enumerate(kinds):
        if kind != kinds[0]:
            raise UserError(
                f"train.workers: rank 0 has {kinds[0]}, rank {rank} has {kind}; their weights would drift apart, so "
                "all workers of a training need one kind of GPU: lend it nodes of one kind"
            )


def _prepare(gpus: bool, matmul: Matmul, deterministic: bool) -> DeviceKind | None:
    """On every worker, before they join and before its first CUDA call. Returns the kind of its GPU."""
    import torch
    from ray.train.torch import get_device

    from ddpm_pipeline.devices import read_device_kind, set_up_arithmetic

    set_up_arithmetic(matmul, deterministic=deterministic)
    address = ray.util.get_node_ip_address()
    if gpus and not torch.cuda.is_available():
        raise UserError(
            f"train.workers.gpus_per_worker: Ray gave a GPU of node {address}, but torch {torch.__version__} there "
            "can use none; install its CUDA build and a driver that fits"
        )
    use_interface(address)
    context = ray.train.get_context()
    os.environ["RANK"], os.environ["WORLD_SIZE"] = (
        str(context.get_world_rank()),
        str(context.get_world_size()),
    )
    os.environ["LOCAL_RANK"] = str(context.get_local_rank())
    os.environ.setdefault(
        "TORCH_NCCL_ASYNC_ERROR_HANDLING", "1"
    )  # end with a lost partner, do not wait for it
    return read_device_kind(torch.device(get_device())) if gpus else None


def _listen(world: int) -> tuple[str, int]:
    """On rank 0: open the store at the node's address only; returns its host and port."""
    place, store = open_store_at(ray.util.get_node_ip_address(), world)
    _stores[:] = [store]
    return place


def open_store_at(address: str, world: int) -> tuple[tuple[str, int], TCPStore]:
    """A store for `world` processes that listens at `address`, and nowhere else, on a free port."""
    from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.bind((address, 0))
        listener.listen(max(128, world))
        place = (address, int(listener.getsockname()[1]))
        store = TCPStore(
            *place,
            world_size=world,
            is_master=True,
            timeout=timedelta(seconds=JOIN_SECONDS),
            wait_for_workers=False,
            master_listen_fd=listener.detach(),  # the store's from now on
        )
    return place, store


def _join(world_rank: int, world: int, place: tuple[str, int], backend: str, collective_seconds: int) -> None:
    """On every worker: become rank `world_rank` of the group whose store is at `place`.

    A rank waits for the others in a collective call for `collective_seconds`, then it fails.
    """
    import torch.distributed as dist
    from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

    limit = timedelta(seconds=JOIN_SECONDS)
    try:
        if world_rank == 0:
            store = _stores.pop()
        else:
            store = TCPStore(*place, world_size=world, timeout=limit, wait_for_workers=False)
        dist.init_process_group(
            backend,
            store=store,
            rank=world_rank,
            world_size=world,
            timeout=timedelta(seconds=collective_seconds),
        )
    except (dist.DistError, RuntimeError) as error:
        here = f"{ray.util.get_node_ip_address()}, {os.environ[INTERFACE_VARIABLES[0]]}"
        reason = " ".join(str(error).split())[:300]
        raise UnreachableError(
            f"rank {world_rank} ({here}) could not join rank 0 at {place[0]}: {reason}"
        ) from None


def _leave() -> None:
    """On every worker, before its process is ended."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
