"""A node of the cluster that lacks a package is found before any work is placed on it."""

import pytest

from ddpm_pipeline.cluster import require_plugins_on_nodes
from ddpm_pipeline.config.diffusion import SamplerConfig
from ddpm_pipeline.errors import UserError
from ddpm_pipeline.infra.local import LocalStack
from tests.plugins.conftest import Install

pytestmark = pytest.mark.stack


def test_a_node_without_the_package_is_named_in_one_line(stack: LocalStack, install: Install) -> None:
    from ddpm_pipeline.jobs.ray_session import ray_cluster

    ours, theirs = SamplerConfig(kind="ddim"), SamplerConfig(kind="second-order")
    with ray_cluster():
        require_plugins_on_nodes(1, 0, {}, ours)  # nothing to ask
        with pytest.raises(
            UserError, match=r"kind: 'second-order' is of tiny-dit 1\.0\.0, which is not installed here"
        ) as told:
            require_plugins_on_nodes(1, 0, {}, ours, theirs)
    assert "(on node 127.0.0.1)" in str(told.value)
    assert "\n" not in str(told.value)
