"""Feature sums in done-records: made while the samples are in memory, added up when the generation is judged."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field, ValidationError

from pipeline.config.base import Settings
from pipeline.config.evaluation import FeatureNetworkConfig
from pipeline.errors import DamageError, UserError
from pipeline.features.exact_sums import MOST_FEATURES, Sums, sums_of
from pipeline.features.networks import FeatureNetwork, TrainedClassifier, network_uri, open_network


class FeatureRecord(Settings):
    """What a shard's samples add up to under a feature network. Exact, so shards add up in any order."""

    network: str = Field(max_length=128)
    """Identity of the network."""
    sums: str = Field(max_length=2**21)
    """`Sums` of the feature vectors, as text."""
    right: int | None = Field(ge=0, lt=2**53)
    """Samples that the network labels as asked; None without classes."""


def network_for_sums(config: FeatureNetworkConfig, reference: str) -> FeatureNetworkConfig | None:
    """The network of an evaluation, pinned by its hash, if its sums fit done-records; None for one too long.

    UserError or DamageError as `open_network`.
    """
    network = open_network(config, reference)
    if not isinstance(network, TrainedClassifier) or network.card.num_features > MOST_FEATURES:
        return None
    return FeatureNetworkConfig(uri=network_uri(config, reference), sha256=network.card.sha256)


class FeatureSums:
    """Adds up a shard's batches."""

    def __init__(self, network: FeatureNetwork) -> None:
        self._network = network

    def batch(self, images: npt.NDArray[np.uint8], labels: npt.NDArray[np.int64] | None) -> "FeatureRecord":
        """The record of a batch of images uint8 (B, H, W, C). UserError for a network whose vectors are too long."""
        pixels = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
        vectors, logits = self._network(pixels)
        if vectors.shape[1] > MOST_FEATURES:
            raise UserError(
                f"features: vectors of {vectors.shape[1]} are too long for done-records (at most {MOST_FEATURES}); "
                "leave features out and evaluate afterwards"
            )
        judged = logits is not None and labels is not None
        right = int((logits.argmax(1).numpy() == labels).sum()) if judged and logits is not None else None
        return FeatureRecord(
            network=self._network.identity, sums=sums_of(vectors.numpy()).to_text(), right=right
        )


def add_records(records: Iterable[FeatureRecord]) -> FeatureRecord:
    """Several records as one, none kept longer than it takes to add it. ValueError for none, or unequal networks;
    DamageError for records of one network whose sums cannot be added up.
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
        raise ValueError("records must hold at least one")
    return FeatureRecord(network=network, sums=total.to_text(), right=right)


def parse_record(features: dict[str, Any] | None, where: str) -> FeatureRecord:
    """The feature part of a done-record. UserError when there is none, DamageError when it is something else."""
    if features is None:
        raise UserError(
            f"{where}: holds no feature sums; generate with features.uri=…, or evaluate without records_only"
        )
    try:
        return FeatureRecord.model_validate(features)
    except ValidationError as error:
        raise DamageError(f"{where}: not feature sums ({error.errors()[0]['msg']})") from None
