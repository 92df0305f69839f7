"""What is meant for one node runs there: a job's coordinator beside its driver, the question to a node on that node."""

from collections.abc import Iterator

import pytest

from ddpm_pipeline.cluster import on_node
from ddpm_pipeline.infra.local import LocalStack
from tests.ray_nodes import add_node, remove_node

pytestmark = [pytest.mark.stack, pytest.mark.long, pytest.mark.timeout(300)]


@pytest.fixture
def nodes(stack: LocalStack) -> Iterator[None]:
    """Two nodes beside the head."""
    added = [add_node(stack), add_node(stack)]
    yield
    for node in added:
        remove_node(stack, node)


def test_what_needs_no_cpu_runs_on_the_node_that_it_is_for(stack: LocalStack, nodes: None) -> None:
    import ray

    from ddpm_pipeline.jobs.ray_session import ray_cluster

    class Somewhere:
        def node(self) -> str:
            return ray.get_runtime_context().get_node_id()

    with ray_cluster():
        wanted = [node["NodeID"] for node in ray.nodes() if node["Alive"]] * 2
        actors = [
            ray.remote(Somewhere).options(num_cpus=0, scheduling_strategy=on_node(node)).remote()
            for node in wanted
        ]
        assert len(set(wanted)) == 3
        assert ray.get([actor.node.remote() for actor in actors]) == wanted
