"""Writes what a linter of manifests can judge:  python -m tests.manifests.lint FOLDER

Linters know no RayJob. So every pod template becomes a pod of its own, beside all objects that are Kubernetes' own.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import yaml

from tests.manifests.kustomize import Object
from tests.manifests.objects import VARIANTS, pods, rendered


def judged(variant: str) -> Iterator[Object]:
    """Objects and pods of a variant, in kinds that every linter knows."""
    namespace = next(found for found in rendered(variant) if found["kind"] == "Namespace")["metadata"]["name"]
    yield from (found for found in rendered(variant) if not found["apiVersion"].startswith("ray.io/"))
    for where, template in pods(variant):
        if where.startswith("Ray"):
            name = where.lower().replace("/", "-").replace(" ", "-")
            metadata = {**template["metadata"], "name": name, "namespace": namespace}
            yield {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]}


def main(folder: Path) -> None:
    """A file for each variant."""
    folder.mkdir(parents=True, exist_ok=True)
    for variant in VARIANTS:
        (folder / f"{variant}.yaml").write_text(yaml.safe_dump_all(judged(variant), sort_keys=False))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
