"""Which nodes are about to be taken away."""

from collections.abc import Collection
from typing import Any

from ray._private.state import state


def draining_nodes() -> Collection[str]:
    """Ray's ids of the nodes that it drains: a spot machine was given notice, or the autoscaler or a person asked.

    Needs a connected `ray`. Ray places nothing there any more, and does not itself end what runs there.
    """
    known: Any = state  # what Ray's own libraries ask; there is no public call
    return known.get_draining_nodes().keys()
