"""Feature sums in done-records: computed while samples are in memory, added up when a generation is evaluated."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field, ValidationError

from ddpm_pipeline.config.base import Settings
from ddpm_pipeline.config.evaluation import FeatureNetworkConfig
from ddpm_pipeline.errors import DamageError, UserError
from ddpm_pipeline.features.exact_sums import MAX_FEATURES, Sums, sums_of
from ddpm_pipeline.features.networks import FeatureNetwork, TrainedClassifier, network_uri, open_network


class FeatureRecord(Settings):
    """Sums of the features of a shard's samples. Exact, so shards can be added in any order."""

    network: str = Field(max_length=128)
    """Identity of the network."""
    sums: str = Field(max_length=2**21)
    """`Sums` of the feature vectors, as text."""
    right: int | None = Field(ge=0, lt=2**53)
    """Samples that the network assigns to their class; None without classes."""


def network_for_sums(config: FeatureNetworkConfig, reference: str) -> FeatureNetworkConfig | None:
    """The network of an evaluation, pinned by its hash; None if its vectors are too long for done-records.

    UserError or DamageError as `open_network`.
    """
    network = open_network(config, reference)
    if not isinstance(network, TrainedClassifier) or network.card.num_features > MAX_FEATURES:
        return None
    return FeatureNetworkConfig(uri=network_uri(config, reference), sha256=network.card.sha256)


class FeatureSums:
    """Computes the feature record of each batch of a shard."""

    def __init__(self, network: FeatureNetwork) -> None:
        self._network = network

    def batch(self, images: npt.NDArray[np.uint8], labels: npt.NDArray[np.int64] | None) -> "FeatureRecord":
        """The record of a batch of images uint8 (B, H, W, C). UserError for a network whose vectors are too long."""
        pixels = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
        vectors, logits = self._network(pixels)
        if vectors.shape[1] > MAX_FEATURES:
            raise UserError(
                f"features: vectors of {vectors.shape[1]} are too long for done-records (at most {MAX_FEATURES}); "
                "leave `features` out and evaluate afterwards"
            )
        right = None
        if logits is not None and labels is not None:
            right = int((logits.argmax(1).numpy() == labels).sum())
        return FeatureRecord(
            network=self._network.identity, sums=sums_of(vectors.numpy()).to_text(), right=right
        )


def add_records(records: Iterable[FeatureRecord]) -> FeatureRecord:
    """Add up records, holding one at a time. ValueError for none, or for different networks; DamageError for records of
    one network whose sums cannot be added up.
    """
    network, total, right = None, None, 0
    for part in records:
        if network not in (None, part.network):
            raise ValueError("records must be of one feature network")
        sums = Sums.from_text(part.sums)
        try:
            network, total = part.network, sums if total is None else total + sums
        except ValueError as error:
            raise DamageError(
                f"feature sums: cannot be added up ({error}); evaluate without records_only"
            ) from None
        right = None if right is None or part.right is None else right + part.right
    if network is None or total is None:
        raise ValueError("records must not be empty")
    return FeatureRecord(network=network, sums=total.to_text(), right=right)


def parse_record(features: dict[str, Any] | None, where: str) -> FeatureRecord:
    """The feature sums of a done-record. UserError when it has none, DamageError when they cannot be read."""
    if features is None:
        raise UserError(
            f"{where}: has no feature sums; generate with features.uri=…, or evaluate without records_only"
        )
    try:
        return FeatureRecord.model_validate(features)
    except ValidationError as error:
        raise DamageError(f"{where}: not feature sums ({error.errors()[0]['msg']})") from None
