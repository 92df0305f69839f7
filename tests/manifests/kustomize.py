"""The part of kustomize that infra/kuberay uses, so that its tests need no program.

Anything else in a kustomization is refused. Where kubectl is installed a test compares the two.
"""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

Object = dict[str, Any]
KNOWN = {"apiVersion", "kind", "namespace", "labels", "resources", "images", "patches", "components"}


def render(folder: Path) -> list[Object]:
    """The objects of a kustomization."""
    told = yaml.safe_load((folder / "kustomization.yaml").read_text())
    unknown = set(told) - KNOWN
    if unknown:
        raise ValueError(f"{folder}: {sorted(unknown)} is not known to this renderer")
    objects = [found for entry in told["resources"] for found in _resource(folder / entry)]
    for entry in told.get("components", []):
        component = yaml.safe_load((folder / entry / "kustomization.yaml").read_text())
        if set(component) != {"apiVersion", "kind", "patches"}:
            raise ValueError(f"{folder / entry}: a component that does more than patch is not known here")
        _patch(objects, component["patches"], folder / entry)
    _patch(objects, told.get("patches", []), folder)
    for found in objects:
        _set_labels(found, told.get("labels", []))
        if "namespace" in told:
            _set_namespace(found, told["namespace"])
        for image in told.get("images", []):
            _set_image(found, image)
    return objects


def _patch(objects: list[Object], patches: list[dict[str, Any]], folder: Path) -> None:
    for one in patches:
        operations = yaml.safe_load(one["patch"] if "patch" in one else (folder / one["path"]).read_text())
        targets = [found for found in objects if _is_target(found, one["target"])]
        if not targets:
            raise ValueError(f"{folder}: no object for patch {one['target']}")
        for found in targets:
            for operation in operations:
                _apply(found, copy.deepcopy(operation))


def _resource(path: Path) -> Iterator[Object]:
    if path.is_dir():
        yield from render(path)
    else:
        # A round through text: YAML aliases would be one object, and a patch to it would reach them all.
        yield from (yaml.safe_load(_without_aliases(found)) for found in yaml.safe_load_all(path.read_text()))


def _without_aliases(found: Object) -> str:
    class Dumper(yaml.SafeDumper):
        def ignore_aliases(self, data: Any) -> bool:
            return True

    return yaml.dump(found, Dumper=Dumper)


def _is_target(found: Object, target: dict[str, str]) -> bool:
    if set(target) - {"kind", "name"}:
        raise ValueError(f"patch target {target}: only kind and name are known to this renderer")
    return found["kind"] == target["kind"] and found["metadata"]["name"] == target.get(
        "name", found["metadata"]["name"]
    )


def _apply(found: Object, operation: dict[str, Any]) -> None:
    """One JSON patch operation (RFC 6902): add, remove or replace."""
    *way, last = [part.replace("~1", "/").replace("~0", "~") for part in operation["path"].split("/")[1:]]
    place: Any = found
    for part in way:
        place = place[int(part)] if isinstance(place, list) else place[part]
    key: Any = int(last) if isinstance(place, list) else last
    if operation["op"] == "replace":
        place[key]  # must be there already
        place[key] = operation["value"]
    elif operation["op"] == "remove":
        del place[key]
    elif operation["op"] == "add" and isinstance(place, dict):
        place[key] = operation["value"]
    else:
        raise ValueError(f"patch operation {operation}: not known to this renderer")


def _set_labels(found: Object, rules: list[dict[str, Any]]) -> None:
    for rule in rules:
        found["metadata"].setdefault("labels", {}).update(rule["pairs"])


def _set_namespace(found: Object, namespace: str) -> None:
    if found["kind"] == "Namespace":
        found["metadata"]["name"] = namespace
        return
    found["metadata"]["namespace"] = namespace
    for subject in found.get("subjects", []):
        subject["namespace"] = namespace


def _set_image(node: Any, image: dict[str, str]) -> None:
    if isinstance(node, list):
        for part in node:
            _set_image(part, image)
    elif isinstance(node, dict):
        for key, value in node.items():
            if key in ("containers", "initContainers"):
                for container in value:
                    name, _, tag = container["image"].partition(":")
                    if name == image["name"]:
                        tag = image.get("newTag", tag)
                        container["image"] = f"{image.get('newName', name)}:{tag}"
            _set_image(value, image)
