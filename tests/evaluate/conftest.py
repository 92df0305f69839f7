"""A third of the digits, packed, with a feature network that was trained for a few steps only."""

import pytest
import torch

from ddpm_pipeline.config.data import PackConfig
from ddpm_pipeline.config.evaluation import FeaturesConfig
from ddpm_pipeline.data.packing.pack_dataset import pack
from ddpm_pipeline.features.train_classifier import train_features


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> str:
    uri = str(tmp_path_factory.mktemp("digits"))
    config = PackConfig(source="digits", dest=uri, channels=1, shard_size=300, held_out=0.7)
    pack(config, lambda done, total: None)
    torch.set_num_threads(1)
    train_features(FeaturesConfig(data=uri, steps=20, channels=8, min_accuracy=0), lambda *_: None)
    return uri
