"""Bits per dimension on held-out data."""

import math
from pathlib import Path

import pytest

from ddpm_pipeline.config.data import PackConfig
from ddpm_pipeline.config.evaluation import LikelihoodConfig
from ddpm_pipeline.config.generation import SampleConfig
from ddpm_pipeline.config.model_card import ModelCard, TrainingData
from ddpm_pipeline.data.index import Index, load_index
from ddpm_pipeline.data.packing.pack_dataset import held_out_uri, pack
from ddpm_pipeline.data.reading.sequential import read_sequential
from ddpm_pipeline.errors import UserError
from ddpm_pipeline.evaluate.bits_per_dim import held_out_bits
from ddpm_pipeline.generate.model_source import find_model
from ddpm_pipeline.nets import UNet
from ddpm_pipeline.nets.model_files import build_model
from tests.generate.tiny import tiny_card, tiny_model


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    uri = str(tmp_path_factory.mktemp("digits"))
    pack(PackConfig(source="digits", dest=uri, channels=1), lambda done, total: None)
    return load_index(uri)


def loaded(folder: Path, card: ModelCard) -> tuple[UNet, ModelCard]:
    model = find_model(SampleConfig(model=str(tiny_model(folder, card))).model)
    return build_model(model.card, model.weights, where="tiny"), model.card


def test_the_bound_is_finite_and_does_not_depend_on_the_batch(index: Index, tmp_path: Path) -> None:
    net, card = loaded(tmp_path, tiny_card(classes=False, size=8))
    whole = held_out_bits(net, card, index, LikelihoodConfig(data=index.uri, count=6), 0)
    parts = held_out_bits(net, card, index, LikelihoodConfig(data=index.uri, count=6, batch_size=4), 0)
    assert whole.n_reference == 6
    assert 0 < whole.value < math.inf  # large: these weights were drawn at random
    assert parts.value == pytest.approx(whole.value, rel=1e-5)


def test_the_training_data_is_refused(index: Index, tmp_path: Path) -> None:
    net, card = loaded(tmp_path, tiny_card(classes=False, size=8, data=TrainingData(digest=index.digest)))
    with pytest.raises(UserError, match="is the training data of the model"):
        held_out_bits(net, card, index, LikelihoodConfig(data=index.uri), 0)


def test_the_held_out_part_of_a_pack_is_not_in_the_training_data(tmp_path: Path) -> None:
    config = PackConfig(source="digits", dest=str(tmp_path / "part"), channels=1, held_out=0.1)
    report = pack(config)
    assert report.held_out is not None
    train, held = load_index(config.dest), load_index(held_out_uri(config.dest))
    assert train.num_samples + held.num_samples == 1797
    assert 120 < held.num_samples < 240
    assert not {tuple(s.pixels.flat) for s in read_sequential(train)} & {
        tuple(s.pixels.flat) for s in read_sequential(held)
    }
    net, card = loaded(tmp_path / "model", tiny_card(False, 8, TrainingData(digest=train.digest)))
    assert held_out_bits(net, card, held, LikelihoodConfig(data=held.uri, count=4), 0).n_reference == 4


def test_images_of_another_shape_are_refused(index: Index, tmp_path: Path) -> None:
    net, card = loaded(tmp_path, tiny_card(classes=False, size=4))
    with pytest.raises(UserError, match="has no images of the model's shape"):
        held_out_bits(net, card, index, LikelihoodConfig(data=index.uri), 0)
