"""Feature networks: training, storage, and refusal of damaged ones."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch

from ddpm_pipeline.config.data import PackConfig
from ddpm_pipeline.config.evaluation import FeatureNetworkConfig, FeaturesConfig
from ddpm_pipeline.data.index import load_index
from ddpm_pipeline.data.packing.pack_dataset import pack
from ddpm_pipeline.errors import DamageError, UserError
from ddpm_pipeline.features.classifier import shift_images, split_rows
from ddpm_pipeline.features.feature_set import FeatureSet, extract_features
from ddpm_pipeline.features.networks import open_network
from ddpm_pipeline.features.reference_set import load_reference
from ddpm_pipeline.features.train_classifier import train_features
from ddpm_pipeline.parallel import MapWorkers
from tests.effort import is_long

HOW_LONG = {} if is_long() else {"steps": 100, "channels": 16}


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> str:
    uri = str(tmp_path_factory.mktemp("digits"))
    pack(PackConfig(source="digits", dest=uri, channels=1, shard_size=300), lambda done, total: None)
    return uri


@pytest.fixture(scope="module")
def trained(digits: str) -> str:
    torch.set_num_threads(1)
    least = 0.98 if is_long() else 0.95
    config = FeaturesConfig(data=digits, min_accuracy=least, **HOW_LONG)
    folder, card, new = train_features(config, lambda *_: None)
    assert new
    assert card.held_out_accuracy >= least
    return folder


def test_the_classifier_of_the_digits_is_accurate_on_held_out_images(trained: str, digits: str) -> None:
    again, card, new = train_features(FeaturesConfig(data=digits, **HOW_LONG), lambda *_: None)
    assert (again, new) == (trained, False)
    assert card.num_train + card.num_held_out == 1797


def test_features_of_a_data_set_are_extracted_once(trained: str, digits: str) -> None:
    index = load_index(digits)
    measured = load_reference(index, FeatureNetworkConfig(), 100)
    assert len(measured) == 1797
    assert measured.vectors.shape == (1797, 64)

    def refuse(work: object, shards: object) -> None:
        raise AssertionError("extracted a second time")

    again = load_reference(index, FeatureNetworkConfig(), 100, MapWorkers(refuse))  # type: ignore[arg-type]
    assert again.vectors.tobytes() == measured.vectors.tobytes()


def test_changed_weights_are_refused(trained: str, digits: str) -> None:
    with pytest.raises(DamageError, match="sha256"):
        open_network(FeatureNetworkConfig(sha256="0" * 64), digits)


def test_a_missing_network_names_the_command_that_makes_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="ddpm features train"):
        open_network(FeatureNetworkConfig(), str(tmp_path))


def test_images_of_another_shape_are_refused(trained: str, digits: str) -> None:
    network = open_network(FeatureNetworkConfig(), digits)
    with pytest.raises(UserError, match="takes images"):
        network(torch.zeros(2, 3, 8, 8, dtype=torch.uint8))


class Means(torch.nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.float().mean((2, 3))


def test_a_torchscript_file_needs_its_hash_and_then_works(tmp_path: Path) -> None:
    file = tmp_path / "means.pt"
    torch.jit.script(Means()).save(str(file))
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    with pytest.raises(UserError, match=r"network\.sha256"):
        open_network(FeatureNetworkConfig(uri=str(file)), "")
    with pytest.raises(DamageError, match="sha256"):
        open_network(FeatureNetworkConfig(uri=str(file), sha256="0" * 64), "")
    network = open_network(FeatureNetworkConfig(uri=str(file), sha256=sha256, rgb=True, size=4), "")
    images = torch.full((2, 1, 8, 8), 100, dtype=torch.uint8)
    assert network(images).vectors.tolist() == [[100.0] * 3] * 2
    unit = open_network(FeatureNetworkConfig(uri=str(file), sha256=sha256, input="unit"), "")
    assert unit(images).vectors.flatten().tolist() == pytest.approx([100 / 255] * 2)
    assert unit.identity != network.identity


def test_a_file_that_is_no_network_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.pt").write_bytes(b"nothing")
    sha256 = hashlib.sha256(b"nothing").hexdigest()
    with pytest.raises(UserError, match="not a TorchScript file"):
        open_network(FeatureNetworkConfig(uri=str(tmp_path / "x.pt"), sha256=sha256), "")
    with pytest.raises(UserError, match="neither"):
        open_network(FeatureNetworkConfig(uri=str(tmp_path / "x.pkl")), "")


def test_feature_sets_are_stored_without_pickle(trained: str, digits: str) -> None:
    network = open_network(FeatureNetworkConfig(), digits)
    images = [(np.full((8, 8, 1), 20 * n, np.uint8), n) for n in range(5)]
    found = extract_features(network, images, 2)
    again = FeatureSet.from_bytes(found.to_bytes(), "here")
    assert again.labels is not None
    assert again.labels.tolist() == [0, 1, 2, 3, 4]
    assert again.vectors.tobytes() == found.vectors.tobytes()
    assert len(set(again.pixel_hashes.tolist())) == 5
    with pytest.raises(DamageError, match="here"):
        FeatureSet.from_bytes(found.to_bytes()[:-200], "here")


def test_the_split_is_a_function_of_the_seed_and_complete() -> None:
    train, held = split_rows(100, 0.2, 7)
    assert sorted(torch.cat([train, held]).tolist()) == list(range(100))
    assert torch.equal(split_rows(100, 0.2, 7)[1], held)
    with pytest.raises(ValueError, match="empty"):
        split_rows(2, 0.1, 0)


def test_a_shift_moves_the_whole_image_and_repeats_its_edge() -> None:
    images = torch.arange(16.0).reshape(1, 1, 4, 4).repeat(200, 1, 1, 1)
    moved = shift_images(images, torch.arange(200), 1, seed=3, step=0)
    corners = {int(image[0, 0, 0]) for image in moved}
    assert corners == {0, 1, 4, 5}
    assert torch.equal(shift_images(images, torch.arange(200), 0, 3, 0), images)
