"""Trust in feature networks and references: a registered model is evaluated by the digests recorded for it only."""

from dataclasses import dataclass

from ddpm_pipeline.config.evaluation import EvaluateConfig, FeatureNetworkConfig
from ddpm_pipeline.data.index import Index, load_index
from ddpm_pipeline.features.feature_set import FeatureSet
from ddpm_pipeline.features.networks import FeatureNetwork, network_uri, open_network
from ddpm_pipeline.features.reference_set import data_root, load_reference
from ddpm_pipeline.parallel import HERE, MapWorkers
from ddpm_pipeline.store import open_store
from ddpm_pipeline.tracking import require_trusted, trust, trusted

NETWORK = "feature network"
REFERENCE = "measured reference"
"""What a digest is of; also part of the names of the registry's tags."""


@dataclass(frozen=True)
class TrustedDigest:
    """A digest that was recorded as trusted."""

    what: str
    uri: str
    digest: str
    previous: str | None
    """The digest recorded before; None for the first."""


def trust_current(model: str, config: EvaluateConfig, workers: MapWorkers = HERE) -> list[TrustedDigest]:
    """Record the digests of the feature network and of the reference as they are now for a registered model.

    The reference is that of the workers' GPU: another model of GPU rounds differently.
    """
    data, index = data_root(config.reference), load_index(config.reference)
    network = open_network(config.network, data)
    reference = load_reference(index, config.network, config.batch_size, workers)
    recorded: list[TrustedDigest] = []
    for what, uri, digest in (
        (NETWORK, trusted_network_uri(config.network, data), network.digest),
        (REFERENCE, trusted_reference_uri(index, config.network, data, workers.gpu), reference.digest),
    ):
        previous = trusted(model, what, uri)
        trust(model, what, uri, digest)
        recorded.append(TrustedDigest(what, uri, digest, None if previous is None else previous.digest))
    return recorded


def trusted_network_uri(config: FeatureNetworkConfig, reference: str) -> str:
    """The URI under which a feature network is trusted: the same however the settings spell it."""
    if config.plugin is not None:
        return network_uri(config, reference)
    folder, _, name = network_uri(config, reference).rpartition("/")
    return f"{open_store(folder).uri}/{name}"


def trusted_reference_uri(
    index: Index, config: FeatureNetworkConfig, reference: str, gpu: str | None = None
) -> str:
    """The name under which a reference is trusted: its data set, its feature network and, if any, the model of GPU."""
    return f"{index.uri} by {trusted_network_uri(config, reference)}" + (f" on {gpu}" if gpu else "")


def require_trusted_network(
    model: str | None, config: FeatureNetworkConfig, reference: str, network: FeatureNetwork
) -> None:
    """UserError unless the network is the one trusted for `model`. A network whose hash is in the settings is always
    trusted, and so is any for a model that is not registered (None).
    """
    if model is not None and config.sha256 is None:
        require_trusted(model, NETWORK, trusted_network_uri(config, reference), network.digest)


def require_trusted_reference(
    model: str | None,
    index: Index,
    config: FeatureNetworkConfig,
    data: str,
    reference: FeatureSet,
    gpu: str | None = None,
) -> None:
    """UserError unless the reference is the one trusted for `model`, if that is a registered model."""
    if model is not None:
        require_trusted(model, REFERENCE, trusted_reference_uri(index, config, data, gpu), reference.digest)
