"""Where Ray puts a task or an actor."""

from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy


def on_node(node_id: str) -> NodeAffinitySchedulingStrategy:
    """On this node and on no other; where it is gone, the task or actor fails.

    Not `soft=True`, with which Ray chooses any node at random for what needs no CPU, even while this one lives.
    """
    return NodeAffinitySchedulingStrategy(node_id, soft=False)
