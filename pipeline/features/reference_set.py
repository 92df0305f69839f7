"""The reference: features of a whole data set, extracted once for each digest and network, stored beside the index."""

import logging
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from ddpm_pipeline.config.evaluation import FeatureNetworkConfig
from ddpm_pipeline.data.index import Index
from ddpm_pipeline.data.location import Location
from ddpm_pipeline.data.reading.sequential import read_sequential
from ddpm_pipeline.errors import DamageError
from ddpm_pipeline.features.feature_set import FeatureSet, LabeledImage, ShardExtractor, join
from ddpm_pipeline.features.networks import FeatureNetwork, features_folder, open_network
from ddpm_pipeline.parallel import HERE, MapWorkers
from ddpm_pipeline.progress import Progress, no_progress
from ddpm_pipeline.store import ObjectMissing, Store, open_store

_log = logging.getLogger(__name__)


def reference_key(index: Index, network: FeatureNetwork) -> str:
    """Key, in the features folder, of the reference that a network gives."""
    return f"reference-{index.digest[:16]}-{network.identity[:16]}.npz"


def data_root(uri: str) -> str:
    """The prefix of a data set, also where `uri` is a pattern of shards."""
    return Location.of(uri).root


def load_reference(
    index: Index,
    config: FeatureNetworkConfig,
    batch_size: int,
    workers: MapWorkers = HERE,
    progress: Progress = no_progress,
) -> FeatureSet:
    """The features of a data set: read where they are stored, else extracted now and stored, for each model of GPU."""
    network = open_network(config, data_root(index.uri), workers.gpu)
    store = open_store(features_folder(data_root(index.uri)))
    key = reference_key(index, network)
    stored = _stored(store, key, index, network)
    if stored is not None:
        return stored
    images = partial(_shard_images, index)
    extract = ShardExtractor(config, data_root(index.uri), batch_size, images, workers.gpu)
    total = len(index.shards)
    parts: list[FeatureSet] = []
    for number, data in enumerate(workers.map(extract, range(total))):
        parts.append(FeatureSet.from_bytes(data, index.shards[number].name))
        progress(number + 1, total)
    whole = replace(join(parts), data=index.digest)
    store.write(key, whole.to_bytes())
    return whole


def _shard_images(index: Index, number: int) -> Iterator[LabeledImage]:
    """The images of shard `number`, in stored order."""
    for sample in read_sequential(index, [number]):
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


def _stored(store: Store, key: str, index: Index, network: FeatureNetwork) -> FeatureSet | None:
    """The stored reference, or None; a warning where what is stored cannot be used."""
    try:
        found = FeatureSet.from_bytes(store.read(key), f"{store.uri}/{key}")
    except ObjectMissing:
        return None
    except DamageError as error:
        _log.warning("%s: extracting the features of the reference again", error)
        return None
    # Older references hold no digest of their data.
    contents = (found.network, found.data or index.digest, len(found))
    if contents != (network.identity, index.digest, index.num_samples):
        _log.warning(
            "%s/%s: belongs to another data set or network: extracting the features of the reference again",
            store.uri,
            key,
        )
        return None
    return found
