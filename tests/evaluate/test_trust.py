"""Feature network and reference of a registered model are pinned at first use; a changed one is refused."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

import ddpm_pipeline.jobs.nightly
from ddpm_pipeline.config.data import PackConfig
from ddpm_pipeline.config.evaluation import (
    EvaluateConfig,
    FeatureNetworkConfig,
    FeaturesConfig,
    GateConfig,
    PromoteConfig,
)
from ddpm_pipeline.config.generation import GenerateConfig
from ddpm_pipeline.config.nights import NightlyConfig
from ddpm_pipeline.data.index import load_index
from ddpm_pipeline.data.packing.pack_dataset import pack
from ddpm_pipeline.errors import DamageError, UserError
from ddpm_pipeline.evaluate.promotion import decide
from ddpm_pipeline.features.feature_set import FeatureSet
from ddpm_pipeline.features.networks import open_network
from ddpm_pipeline.features.reference_set import load_reference, reference_key
from ddpm_pipeline.features.train_classifier import train_features
from ddpm_pipeline.generate.driver import with_feature_network
from ddpm_pipeline.generate.model_source import registered_name
from ddpm_pipeline.jobs.features import run_trust
from ddpm_pipeline.store import open_store
from ddpm_pipeline.tracking import ModelVersion, require_trusted, trust, trusted
from tests.generate.tiny import settings
from tests.track.one_model import Registry

VERSION = ModelVersion("digits", 1, "", "", "")


@pytest.fixture(autouse=True)
def registry(monkeypatch: pytest.MonkeyPatch) -> Registry:
    found = Registry()
    monkeypatch.setattr("ddpm_pipeline.tracking.pinned_digests.tracking_client", lambda: found)
    return found


@pytest.fixture
def data(tmp_path: Path) -> str:
    """The digits with their own classifier, which a test may replace."""
    uri = str(tmp_path / "digits")
    pack(PackConfig(source="digits", dest=uri, channels=1, shard_size=900), lambda done, total: None)
    train(uri, 0)
    return uri


def train(uri: str, seed: int) -> None:
    """Train a classifier, replacing an existing one."""
    config = FeaturesConfig(data=uri, steps=2, channels=8, min_accuracy=0, seed=seed)
    assert train_features(config, lambda *_: None)[2]


def config(uri: str) -> PromoteConfig:
    return PromoteConfig(model="digits", gate=GateConfig(evaluate=EvaluateConfig(reference=uri)))


def run_gate(uri: str) -> None:
    """Run the gate without a champion: it passes unless a digest is not trusted."""
    decide(config(uri).gate, VERSION, None, lambda *_: None)


def test_the_first_use_is_recorded_with_a_warning_and_later_ones_are_not(
    registry: Registry, data: str, caplog: pytest.LogCaptureFixture
) -> None:
    run_gate(data)
    assert sorted(key.rpartition(".")[0] for key in registry.tags) == [
        "ddpm.trust.feature-network",
        "ddpm.trust.measured-reference",
    ]
    assert "is the feature network of model digits from now on (first use)" in caplog.text
    before = dict(registry.tags)
    run_gate(data)
    assert registry.tags == before


def test_a_replaced_network_is_refused_until_it_is_trusted(
    data: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run_gate(data)
    train(data, 1)
    changed = r"classifier\.json: its digest is .* ddpm features trust PRESET"
    with pytest.raises(UserError, match=changed):
        run_gate(data)
    night = NightlyConfig(
        generate=settings(Path("digits/1"), f"{data}-nights"), evaluate=EvaluateConfig(reference=data)
    )
    with pytest.raises(UserError, match=changed):
        ddpm_pipeline.jobs.nightly.run(night, lambda *_: None)
    features = FeatureNetworkConfig(uri=f"file://{data}/features/classifier.json")
    generation = GenerateConfig.model_validate(night.generate.model_dump() | {"features": features})
    with pytest.raises(UserError, match=changed):
        with_feature_network(generation, "digits")
    assert with_feature_network(generation, None) == generation  # models in folders have no trusted digests

    assert run_trust(config(data)) == 0
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 2
    assert "classifier.json: " in printed[0]
    assert ", before " in printed[0]
    run_gate(data)
    assert with_feature_network(generation, "digits") == generation


def test_a_replaced_reference_is_refused(data: str) -> None:
    run_gate(data)
    index, network = load_index(data), open_network(FeatureNetworkConfig(), data)
    store, key = open_store(f"{data}/features"), reference_key(index, network)
    whole = FeatureSet.from_bytes(store.read(key), key)
    forged = FeatureSet(**(vars(whole) | {"vectors": whole.vectors * 2}))
    store.write(key, forged.to_bytes())
    with pytest.raises(
        UserError, match=r"by .*classifier\.json: its digest is .* the measured reference by which"
    ):
        run_gate(data)
    store.delete(key)
    assert load_reference(index, FeatureNetworkConfig(), 250).digest == whole.digest
    run_gate(data)


def test_a_network_whose_hash_is_in_the_settings_is_trusted(registry: Registry, data: str) -> None:
    sha256 = open_network(FeatureNetworkConfig(), data).identity
    pinned = config(data).gate.evaluate.model_copy(update={"network": FeatureNetworkConfig(sha256=sha256)})
    gate = config(data).gate.model_copy(update={"evaluate": pinned})
    decide(gate, VERSION, None, lambda *_: None)
    assert not [key for key in registry.tags if key.startswith("ddpm.trust.feature-network")]


def test_a_changed_card_beside_the_same_weights_is_another_network(data: str) -> None:
    store = open_store(f"{data}/features")
    before = open_network(FeatureNetworkConfig(), data)
    card = json.loads(store.read("classifier.json"))
    store.write("classifier.json", json.dumps(card | {"held_out_accuracy": 1.0}).encode())
    after = open_network(FeatureNetworkConfig(), data)
    assert (after.identity, after.digest == before.digest) == (before.identity, False)


def test_of_two_concurrent_first_uses_the_one_not_recorded_is_refused(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Race(SimpleNamespace):
        def set_registered_model_tag(self, name: str, key: str, value: str) -> None:
            registry.set_registered_model_tag(name, key, value)
            registry.set_registered_model_tag(name, key, value.replace("a" * 64, "b" * 64))

    client = Race(get_registered_model=registry.get_registered_model)
    monkeypatch.setattr("ddpm_pipeline.tracking.pinned_digests.tracking_client", lambda: client)
    with pytest.raises(UserError, match="its digest is aaaaaaaaaaaa, and the network by which model digits"):
        require_trusted("digits", "network", "s3://b/x", "a" * 64)


def test_a_tag_without_a_digest_is_named_and_can_be_replaced(registry: Registry) -> None:
    trust("digits", "network", "s3://b/x", "a" * 64)
    (key,) = registry.tags
    registry.tags[key] = "{}"
    with pytest.raises(DamageError, match=r"tag ddpm\.trust\.network\..*: not a digest"):
        trusted("digits", "network", "s3://b/x")


@pytest.mark.parametrize(
    ("printed", "name"),
    [
        ("digits@champion", "digits"),
        ("digits/3", "digits"),
        ("models:/digits/3", "digits"),
        ("/m", None),
        ("./m", None),
    ],
)
def test_the_registered_model_is_the_one_that_is_evaluated(printed: str, name: str | None) -> None:
    assert registered_name(printed) == name
