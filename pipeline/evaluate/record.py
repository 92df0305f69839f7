"""Feature sums in done-records: made while the samples are in memory, added up when the generation is judged."""

import functools
import operator
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from pydantic import ValidationError

from pipeline.config.base import Settings
from pipeline.config.evaluate import FeatureNetworkConfig
from pipeline.errors import DamageError, UserError
from pipeline.evaluate.networks import (
    CARD_KEY,
    FeatureNetwork,
    TrainedClassifier,
    features_folder,
    open_network,
)
from pipeline.evaluate.sums import Sums, sums_of

MOST_FEATURES = 256
"""Longest feature vector whose sums fit a done-record: 256 take half a megabyte."""


class FeatureRecord(Settings):
    """What a shard's samples add up to under a feature network. Exact, so shards add up in any order."""

    network: str
    """Identity of the network."""
    sums: str
    """`Sums` of the feature vectors, as text."""
    right: int | None
    """Samples that the network labels as asked; None without classes."""


def network_for_sums(config: FeatureNetworkConfig, reference: str) -> FeatureNetworkConfig | None:
    """The network of an evaluation, pinned by its hash, if its sums fit done-records; None for one too long.

    UserError or DamageError as `open_network`.
    """
    network = open_network(config, reference)
    if not isinstance(network, TrainedClassifier) or network.card.num_features > MOST_FEATURES:
        return None
    uri = config.uri or f"{features_folder(reference)}/{CARD_KEY}"
    return FeatureNetworkConfig(uri=uri, sha256=network.card.sha256)


class FeatureTally:
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
    """Several records as one. ValueError for none, or for unequal networks."""
    parts = list(records)
    if not parts or len({part.network for part in parts}) > 1:
        raise ValueError("records must be of one feature network, at least one")
    total = functools.reduce(operator.add, (Sums.from_text(part.sums) for part in parts))
    rights = [part.right for part in parts]
    right = None if any(r is None for r in rights) else sum(r for r in rights if r is not None)
    return FeatureRecord(network=parts[0].network, sums=total.to_text(), right=right)


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
