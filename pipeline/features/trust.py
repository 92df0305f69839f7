"""Feature networks and measured references are trusted by digest, for each registered model that they judge."""

from pipeline.config.evaluation import FeatureNetworkConfig
from pipeline.data.index import Index
from pipeline.features.feature_set import FeatureSet
from pipeline.features.networks import FeatureNetwork, network_uri
from pipeline.store import open_store
from pipeline.tracking import require_trusted

NETWORK = "feature network"
REFERENCE = "measured reference"


def network_place(config: FeatureNetworkConfig, reference: str) -> str:
    """The name under which a feature network is trusted: where it is, however the settings spell that."""
    folder, _, name = network_uri(config, reference).rpartition("/")
    return f"{open_store(folder).uri}/{name}"


def reference_place(index: Index, config: FeatureNetworkConfig, reference: str) -> str:
    """The name under which a measured reference is trusted: its data set and the network that measured it."""
    return f"{index.uri} by {network_place(config, reference)}"


def require_trusted_network(
    model: str | None, config: FeatureNetworkConfig, reference: str, network: FeatureNetwork
) -> None:
    """UserError for a network that is not the one by which `model` has been judged. One whose hash the settings name
    is trusted by them, and a model that is in no registry (None) has no judge.
    """
    if model is not None and config.sha256 is None:
        require_trusted(model, NETWORK, network_place(config, reference), network.digest)


def require_trusted_reference(
    model: str | None, index: Index, config: FeatureNetworkConfig, reference: str, measured: FeatureSet
) -> None:
    """UserError for a measured reference that is not the one by which `model` has been judged."""
    if model is not None:
        require_trusted(model, REFERENCE, reference_place(index, config, reference), measured.digest)
