"""The rendered manifests, the pods inside them, and what makes an object valid."""

import gzip
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate

from tests.manifests.kustomize import Object, render

KUBERAY = Path(__file__).resolve().parents[2] / "infra" / "kuberay"
SCHEMAS = Path(__file__).parent / "schemas"
VARIANTS = {
    "base": "base",
    "dev": "overlays/dev",
    "gpu": "overlays/gpu",
    "gpu-node": "overlays/gpu-node",
    "spot": "overlays/spot",
    "kueue": "overlays/kueue",
}
KUBERNETES = "1.33"


@cache
def rendered(variant: str) -> list[Object]:
    """All objects of a variant."""
    return render(KUBERAY / VARIANTS[variant])


def named(variant: str, kind: str, name: str) -> Object:
    """One object of a variant."""
    return next(o for o in rendered(variant) if (o["kind"], o["metadata"]["name"]) == (kind, name))


def label(found: Object) -> str:
    """How an object is called in the name of a test."""
    return f"{found['kind']}/{found['metadata']['name']}"


def pods(variant: str) -> Iterator[tuple[str, Object]]:
    """Every pod template with the name of its place; an autoscaler's container counts as one of its head's."""
    for found in rendered(variant):
        where = label(found)
        spec = found.get("spec", {})
        if found["kind"] == "CronJob":
            yield where, spec["jobTemplate"]["spec"]["template"]
        elif found["kind"] == "StatefulSet":
            yield where, spec["template"]
        elif found["kind"] in ("RayJob", "RayCluster"):
            cluster = spec if found["kind"] == "RayCluster" else spec["rayClusterSpec"]
            yield f"{where} head", cluster["headGroupSpec"]["template"]
            for group in cluster["workerGroupSpecs"]:
                yield f"{where} {group['groupName']}", group["template"]
            if "submitterPodTemplate" in spec:
                yield f"{where} submitter", spec["submitterPodTemplate"]


def rules_of(job: Object) -> dict[tuple[str, str], int]:
    """Seconds after which a job's deletion rules act, by policy and the status that they wait for."""
    rules = job["spec"]["deletionStrategy"]["deletionRules"]
    found: dict[tuple[str, str], int] = {}
    for rule in rules:
        condition = dict(rule["condition"])
        seconds = condition.pop("ttlSeconds")
        (status,) = condition.values()
        found[rule["policy"], status] = seconds
    assert len(found) == len(rules)
    return found


def validate(found: Object) -> None:
    """Raises when the API server would refuse the object or drop a field of it."""
    metadata = {key: value for key, value in found["metadata"].items() if key != "namespace"}
    _validate(json.dumps({**found, "metadata": metadata}))


@cache  # the variants share most of their objects
def _validate(text: str) -> None:
    found = json.loads(text)
    if found["apiVersion"] == "ray.io/v1":
        jsonschema.Draft202012Validator(_kuberay_schema(found["kind"])).validate(found)
    else:
        kubernetes_validate.validate(found, KUBERNETES, strict=True)


def validate_pod(template: Object) -> None:
    """A pod template by Kubernetes' own schema: KubeRay's copy of it knows fewer bounds."""
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p", **template["metadata"]}}
    _validate(json.dumps({**pod, "spec": template["spec"]}))


@cache
def _kuberay_schema(kind: str) -> Any:
    packed = (SCHEMAS / f"ray.io_{kind.lower()}s.v1.json.gz").read_bytes()
    schema = json.loads(gzip.decompress(packed))
    schema["properties"]["metadata"] = {"type": "object"}
    return _closed(schema)


def _closed(node: Any) -> Any:
    """The schema with every listed set of properties final, and Kubernetes' "integer or string" made plain."""
    if isinstance(node, list):
        return [_closed(part) for part in node]
    if not isinstance(node, dict):
        return node
    closed = {
        key: {name: _closed(part) for name, part in value.items()} if key == "properties" else _closed(value)
        for key, value in node.items()
    }
    if isinstance(node.get("properties"), dict) and "additionalProperties" not in node:
        closed["additionalProperties"] = False
    return closed
