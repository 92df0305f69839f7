"""Who may speak to whom: the network policies, evaluated as the API defines them."""

import ipaddress
from typing import Any

import pytest

from tests.manifests.kustomize import Object
from tests.manifests.objects import pods, rendered

Labels = dict[str, str]
NAMESPACE = "ddpm"


def place(suffix: str) -> tuple[str, Labels]:
    """A pod of the manifests, as (namespace, labels)."""
    return NAMESPACE, next(t["metadata"]["labels"] for where, t in pods("base") if where.endswith(suffix))


def kind_of(role: str) -> str:
    """What a role's Ray pods belong to."""
    return "RayCluster" if role == "interactive" else "RayJob"


HEAD = place("ddpm-train head")
WORKER = place("ddpm-train workers")
OF_ANOTHER_ROLE = place("ddpm-generate workers")
SUBMITTER = place("ddpm-train submitter")
LAUNCHER = place("CronJob/ddpm-nightly")
REDIS = place("StatefulSet/redis")
STRANGER = (NAMESPACE, {"app": "stranger"})
OPERATOR = ("kuberay-system", {"app.kubernetes.io/name": "kuberay-operator"})
NEIGHBOUR = ("kuberay-system", {"app.kubernetes.io/name": "something-else"})
PROMETHEUS = ("monitoring", {"app.kubernetes.io/name": "prometheus"})
MLFLOW = ("mlflow", {"app.kubernetes.io/name": "mlflow"})
DNS = ("kube-system", {"k8s-app": "kube-dns"})
REDIS_PORTS = {"train": 6379, "generate": 6380, "nightly": 6381, "interactive": 6382}
Pod = tuple[str, Labels]


def selects(selector: Object, labels: Labels) -> bool:
    """A label selector; of expressions only `In` is used."""
    expressions = selector.get("matchExpressions", [])
    assert all(e["operator"] == "In" for e in expressions)
    exact = selector.get("matchLabels", {}).items() <= labels.items()
    return exact and all(labels.get(e["key"]) in e["values"] for e in expressions)


def is_peer(peer: Object, pod: Pod | str) -> bool:
    """Whether a rule's peer means this pod, or this address."""
    if isinstance(pod, str):
        block = peer.get("ipBlock")
        address = ipaddress.ip_address(pod)
        return (
            block is not None
            and address in ipaddress.ip_network(block["cidr"])
            and not any(address in ipaddress.ip_network(part) for part in block.get("except", []))
        )
    namespace, labels = pod
    if "ipBlock" in peer:
        return False
    if "namespaceSelector" in peer:
        right_place = selects(peer["namespaceSelector"], {"kubernetes.io/metadata.name": namespace})
    else:
        right_place = namespace == NAMESPACE
    return right_place and selects(peer.get("podSelector", {}), labels)


def permits(direction: str, pod: Pod, other: Pod | str, port: int, protocol: str) -> bool:
    """Whether the policies that select a pod let this traffic through in one direction."""
    if pod[0] != NAMESPACE:
        return True  # other namespaces have policies of their own
    mine = [p["spec"] for p in rendered("base") if p["kind"] == "NetworkPolicy"]
    mine = [
        s for s in mine if direction.capitalize() in s["policyTypes"] and selects(s["podSelector"], pod[1])
    ]
    assert mine, "default-deny selects every pod"
    side = {"ingress": "from", "egress": "to"}[direction]
    rules: list[Any] = [rule for spec in mine for rule in spec.get(direction, [])]
    return any(
        any(is_peer(peer, other) for peer in rule[side])
        and any(
            p["protocol"] == protocol and p["port"] <= port <= p.get("endPort", p["port"])
            for p in rule["ports"]
        )
        for rule in rules
    )


def reaches(source: Pod, target: Pod | str, port: int, protocol: str = "TCP") -> bool:
    out = permits("egress", source, target, port, protocol)
    return out and (isinstance(target, str) or permits("ingress", target, source, port, protocol))


@pytest.mark.parametrize(
    ("source", "target", "port"),
    [
        (HEAD, WORKER, 10002),
        (WORKER, HEAD, 6379),
        (WORKER, WORKER, 45123),
        (SUBMITTER, HEAD, 8265),
        (OPERATOR, HEAD, 8265),
        (PROMETHEUS, WORKER, 8080),
        (HEAD, REDIS, REDIS_PORTS["train"]),
        (OF_ANOTHER_ROLE, REDIS, REDIS_PORTS["generate"]),
        (WORKER, MLFLOW, 5000),
        (HEAD, "10.96.0.1", 443),
        (LAUNCHER, "10.96.0.1", 443),
        (WORKER, "52.218.0.10", 443),
    ],
)
def test_what_the_jobs_need_is_open(source: Pod, target: Pod | str, port: int) -> None:
    assert reaches(source, target, port)


@pytest.mark.parametrize("pod", [HEAD, WORKER, SUBMITTER, LAUNCHER])
def test_names_can_be_looked_up(pod: Pod) -> None:
    assert reaches(pod, DNS, 53, "UDP")
    assert reaches(pod, DNS, 53)


@pytest.mark.parametrize(
    ("source", "target", "port"),
    [
        (STRANGER, HEAD, 8265),
        (STRANGER, HEAD, 6379),
        (STRANGER, REDIS, 6379),
        (NEIGHBOUR, HEAD, 8265),
        (OPERATOR, HEAD, 6379),
        (OPERATOR, REDIS, 6379),
        (PROMETHEUS, HEAD, 8265),
        (SUBMITTER, REDIS, 6379),
        (SUBMITTER, HEAD, 6379),
        (SUBMITTER, MLFLOW, 5000),
        (LAUNCHER, HEAD, 8265),
        (LAUNCHER, MLFLOW, 5000),
        (LAUNCHER, "52.218.0.10", 443),
        (REDIS, HEAD, 6379),
        (REDIS, "52.218.0.10", 443),
        (WORKER, "10.96.0.1", 443),
        (WORKER, "169.254.169.254", 80),
        (WORKER, "169.254.169.254", 443),
        (WORKER, "52.218.0.10", 22),
        (HEAD, WORKER, 22),
        (HEAD, OF_ANOTHER_ROLE, 10002),
        (OF_ANOTHER_ROLE, HEAD, 6379),
        (OF_ANOTHER_ROLE, HEAD, 8265),
    ],
)
def test_everything_else_is_closed(source: Pod, target: Pod | str, port: int) -> None:
    assert not reaches(source, target, port)


def test_a_pod_without_any_label_of_ours_can_do_nothing_but_look_up_names() -> None:
    for target in (HEAD, WORKER, REDIS, MLFLOW, "10.96.0.1", "52.218.0.10"):
        for port in (22, 443, 5000, 6379, 8265, 10001):
            assert not reaches(STRANGER, target, port)


@pytest.mark.parametrize("role", REDIS_PORTS)
def test_the_ray_pods_of_a_role_reach_each_other_and_no_other_roles(role: str) -> None:
    every = {
        r: [place(f"{kind_of(r)}/ddpm-{r} {where}") for where in ("head", "workers")] for r in REDIS_PORTS
    }
    for other, pods_of_other in every.items():
        for source in every[role]:
            for target in pods_of_other:
                assert reaches(source, target, 45123) == (other == role)


@pytest.mark.parametrize("role", REDIS_PORTS)
def test_a_roles_pods_reach_the_redis_of_their_own_and_no_other(role: str) -> None:
    for where in ("head", "workers"):
        pod = place(f"{kind_of(role)}/ddpm-{role} {where}")
        assert [port for port in REDIS_PORTS.values() if reaches(pod, REDIS, port)] == [REDIS_PORTS[role]]
