"""Measured data sets: once for each digest and feature network, kept beside the index."""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from pipeline.config.evaluation import FeatureNetworkConfig
from pipeline.data.index import Index
from pipeline.data.location import Location
from pipeline.data.reading.sequential import read_sequential
from pipeline.errors import DamageError
from pipeline.features.feature_set import FeatureSet, Picture, extract_features, join
from pipeline.features.networks import FeatureNetwork, features_folder, open_network
from pipeline.progress import Progress, no_progress
from pipeline.store import ObjectMissing, Store, open_store

_log = logging.getLogger(__name__)
ShardWork = Callable[[int], bytes]
"""Number of a shard to its measured images, as `FeatureSet.to_bytes`."""


class Pool(Protocol):
    """Does work shard by shard, in this process or on a cluster; results in the shards' order."""

    def __call__(self, work: ShardWork, shards: Sequence[int]) -> Iterator[bytes]: ...


def in_process(work: ShardWork, shards: Sequence[int]) -> Iterator[bytes]:
    """The pool that is this process."""
    return map(work, shards)


def reference_key(index: Index, network: FeatureNetwork) -> str:
    """Key, below the features folder, of a data set as a network sees it."""
    return f"reference-{index.digest[:16]}-{network.identity[:16]}.npz"


def data_root(uri: str) -> str:
    """The prefix that holds a data set, also for one that is named by a pattern."""
    return Location.of(uri).root


def load_reference(
    index: Index,
    config: FeatureNetworkConfig,
    batch_size: int,
    pool: Pool = in_process,
    progress: Progress = no_progress,
) -> FeatureSet:
    """The measured data set: read if it was measured before, else measured now and kept.

    The batches of a shard are cut within it, so the result does not depend on who measures what.
    """
    network = open_network(config, data_root(index.uri))
    store = open_store(features_folder(data_root(index.uri)))
    key = reference_key(index, network)
    kept = _kept(store, key, index, network)
    if kept is not None:
        return kept
    work = DatasetShard(index, config, batch_size)
    total = len(index.shards)
    parts: list[FeatureSet] = []
    for number, data in enumerate(pool(work, range(total))):
        parts.append(FeatureSet.from_bytes(data, index.shards[number].name))
        progress(number + 1, total)
    whole = replace(join(parts), data=index.digest)
    store.write(key, whole.to_bytes())
    return whole


class DatasetShard:
    """Measures one shard of a data set; travels to workers as settings, opens the network once in each."""

    def __init__(self, index: Index, config: FeatureNetworkConfig, batch_size: int) -> None:
        self.index, self.config, self.batch_size = index, config, batch_size
        self._network: FeatureNetwork | None = None

    def __call__(self, number: int) -> bytes:
        """Measured images of shard `number`, in stored order."""
        if self._network is None:
            self._network = open_network(self.config, data_root(self.index.uri))
        return extract_features(self._network, self._pictures(number), self.batch_size).to_bytes()

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_network": None}

    def _pictures(self, number: int) -> Iterator[Picture]:
        for sample in read_sequential(self.index, [number]):
            yield sample.pixels, sample.label if sample.label >= 0 else None


def load_images(index: Index, progress: Progress = no_progress) -> tuple[Tensor, Tensor]:
    """A whole, small data set: images uint8 (N, C, H, W) and labels int64 (N,), in stored order."""
    pixels: list[np.ndarray[tuple[int, ...], np.dtype[np.uint8]]] = []
    labels: list[int] = []
    for sample in read_sequential(index):
        pixels.append(sample.pixels.transpose(2, 0, 1))
        labels.append(sample.label)
        progress(len(pixels), index.num_samples)
    return torch.from_numpy(np.ascontiguousarray(np.stack(pixels))), torch.tensor(labels)


def _kept(store: Store, key: str, index: Index, network: FeatureNetwork) -> FeatureSet | None:
    """The data set as it was measured before, or None, with a line where what is kept is not that."""
    try:
        found = FeatureSet.from_bytes(store.read(key), f"{store.uri}/{key}")
    except ObjectMissing:
        return None
    except DamageError as error:
        _log.warning("%s: the reference is measured anew", error)
        return None
    told = (found.network, found.data or index.digest, len(found))  # older ones hold no digest of their data
    if told != (network.identity, index.digest, index.num_samples):
        _log.warning(
            "%s/%s: is of another data set or network: the reference is measured anew", store.uri, key
        )
        return None
    return found
