"""How workers find each other: at the address of the node, by its own interface, with one line where that is wrong."""

import socket
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist

from ddpm_pipeline.errors import UserError
from ddpm_pipeline.train import rendezvous
from ddpm_pipeline.train.rendezvous import interface_of, open_store_at, use_interface

V4, V6, LINK = socket.AF_INET, socket.AF_INET6, getattr(socket, "AF_PACKET", -1)


def carries(*addresses: tuple[int, str]) -> list[Any]:
    return [SimpleNamespace(family=family, address=address) for family, address in addresses]


INTERFACES: dict[str, Sequence[Any]] = {
    "lo": carries((V4, "127.0.0.1"), (V6, "::1"), (LINK, "00:00:00:00:00:00")),
    "docker0": carries((V4, "172.17.0.1")),
    "eth0": carries((LINK, "02:fc:00:00:00:01"), (V4, "10.77.0.3"), (V6, "fe80::fc:1%eth0"), (V6, "fd00::2")),
}


@pytest.mark.parametrize(
    ("address", "name"),
    [
        ("10.77.0.3", "eth0"),
        ("172.17.0.1", "docker0"),
        ("127.0.0.1", "lo"),
        ("127.0.1.1", "lo"),  # what Debian's /etc/hosts gives the host's name
        ("::1", "lo"),
        ("fd00:0::2", "eth0"),
        ("fe80::fc:1", "eth0"),
        ("10.77.0.4", None),
        ("fd00::3", None),
    ],
)
def test_an_address_is_carried_by_one_interface_or_none(address: str, name: str | None) -> None:
    assert interface_of(address, INTERFACES) == name


def test_this_machines_own_addresses_are_found() -> None:
    lookup = {a.address: name for name, all_ in psutil.net_if_addrs().items() for a in all_ if a.family == V4}
    assert {address: interface_of(address) for address in lookup} == lookup


def test_gloo_and_nccl_are_told_the_interface_unless_the_user_chose_one() -> None:
    told: dict[str, str] = {}
    use_interface("127.0.0.1", told)
    assert set(told) == {"GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"}
    assert set(told.values()) == {interface_of("127.0.0.1")}
    own = {"GLOO_SOCKET_IFNAME": "eth7", "NCCL_SOCKET_IFNAME": "=ib0"}
    use_interface("127.0.0.1", own)
    assert own == {"GLOO_SOCKET_IFNAME": "eth7", "NCCL_SOCKET_IFNAME": "=ib0"}


def test_an_address_of_another_machine_is_refused_in_one_line() -> None:
    with pytest.raises(UserError, match=r"^node 192\.0\.2\.77: .*--node-ip-address=ADDRESS[^\n]*$"):
        use_interface("192.0.2.77", {})


def test_the_store_listens_at_the_nodes_address_and_nowhere_else() -> None:
    place, store = open_store_at("127.0.0.1", world=2)
    listening = [c.laddr for c in psutil.Process().net_connections("tcp") if c.laddr.port == place[1]]
    assert {address.ip for address in listening} == {"127.0.0.1"}
    partner = dist.TCPStore(*place, world_size=2, wait_for_workers=False)
    partner.set("key", "value")
    assert store.get("key") == b"value"


def test_a_gpu_that_torch_cannot_use_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(rendezvous.ray.util, "get_node_ip_address", lambda: "10.77.0.3")
    with pytest.raises(UserError, match=r"^train\.workers\.gpus_per_worker: .*node 10\.77\.0\.3[^\n]*$"):
        rendezvous._prepare(gpus=True, matmul="ieee", deterministic=True)  # pyright: ignore[reportPrivateUsage]
