"""Membership inference: the AUC is exact, a model that memorized is found, and the gate can refuse it."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from ddpm_pipeline.config.data import PackConfig
from ddpm_pipeline.config.evaluation import EvaluateConfig, GateConfig, MembershipConfig
from ddpm_pipeline.config.model_card import ModelCard, TrainingData
from ddpm_pipeline.data.index import load_index
from ddpm_pipeline.data.packing.pack_dataset import held_out_uri, pack
from ddpm_pipeline.data.reading.sequential import read_sequential
from ddpm_pipeline.diffusion import from_uint8
from ddpm_pipeline.errors import UserError
from ddpm_pipeline.evaluate.gate import SampledModel, judge, verdict
from ddpm_pipeline.evaluate.measure import conditions_of
from ddpm_pipeline.evaluate.membership import (
    MembershipLosses,
    attack_timesteps,
    membership_auc,
    membership_draws,
    membership_losses,
    membership_metrics,
)
from ddpm_pipeline.evaluate.sampling_cost import BatchTimes
from ddpm_pipeline.generate.model_source import find_model
from ddpm_pipeline.nets.model_files import build_model
from tests.evaluate.made import config, measured
from tests.generate.tiny import tiny_card, tiny_model

COUNT = 60


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> MembershipConfig:
    """Digits to train on, and held-out ones."""
    uri = str(tmp_path_factory.mktemp("digits") / "part")
    pack(PackConfig(source="digits", dest=uri, channels=1, held_out=0.1))
    return MembershipConfig(
        members=uri, held_out=held_out_uri(uri), count=COUNT, num_timesteps=4, batch_size=25
    )


def card_of(data: MembershipConfig) -> ModelCard:
    """Of a network without classes that predicts the image and was trained on these digits."""
    return tiny_card(classes=False, size=8, data=TrainingData(digest=load_index(data.members).digest))


class Memory(nn.Module):
    """Answers with the training image that is nearest to what it is shown."""

    def __init__(self, data: MembershipConfig) -> None:
        super().__init__()
        samples = itertools.islice(read_sequential(load_index(data.members)), COUNT)
        pixels = np.stack([sample.pixels for sample in samples]).transpose(0, 3, 1, 2).copy()
        self.known = from_uint8(torch.from_numpy(pixels))

    def forward(self, x: Tensor, t: Tensor, **conditions: object) -> Tensor:
        nearest = torch.cdist(x.flatten(1), self.known.flatten(1)).argmin(1)
        return self.known[nearest]


def by_definition(members: list[float], others: list[float]) -> float:
    pairs = [(a < b) + 0.5 * (a == b) for a in members for b in others]
    return sum(pairs) / len(pairs)


def test_the_auc_is_the_share_of_pairs_in_which_the_training_image_has_the_smaller_loss() -> None:
    chance = np.random.default_rng(0)
    for _ in range(20):
        members, others = chance.integers(0, 6, 9).astype(float), chance.integers(0, 6, 7).astype(float)
        auc = membership_auc(MembershipLosses(members, others))
        assert auc(np.ones(16)) == pytest.approx(by_definition(list(members), list(others)))
        weights = chance.integers(0, 3, 16).astype(float) + np.eye(16)[0] + np.eye(16)[9]
        drawn = [
            list(np.repeat(part, w.astype(int)))
            for part, w in ((members, weights[:9]), (others, weights[9:]))
        ]
        assert auc(weights) == pytest.approx(by_definition(*drawn))


def test_each_resampling_keeps_the_number_of_training_and_of_held_out_images() -> None:
    losses = MembershipLosses(np.zeros(30), np.zeros(20))
    for weights in membership_draws(losses, 5, 1):
        assert (weights[:30].sum(), weights[30:].sum()) == (30, 20)


def test_a_model_that_memorized_is_told_from_one_that_has_seen_nothing(
    data: MembershipConfig, tmp_path: Path
) -> None:
    card = card_of(data)
    memorized = membership_metrics(membership_losses(Memory(data), card, data, 0), 0)
    assert memorized["membership_auc"].value > 0.99
    assert memorized["membership_auc"].n_reference == 2 * COUNT
    model = find_model(str(tiny_model(tmp_path / "model", card)))
    net = build_model(model.card, model.weights, where="tiny")
    untrained = membership_metrics(membership_losses(net, model.card, data, 0), 0)
    low, high = (untrained[f"membership_auc_{end}"].value for end in ("low", "high"))
    assert low < untrained["membership_auc"].value < high
    assert low < 0.5 < high < memorized["membership_auc_low"].value


def test_losses_do_not_depend_on_the_batch(data: MembershipConfig, tmp_path: Path) -> None:
    model = find_model(str(tiny_model(tmp_path / "model", card_of(data))))
    net = build_model(model.card, model.weights, where="tiny")
    whole = membership_losses(net, model.card, data, 3)
    parts = membership_losses(net, model.card, data.model_copy(update={"batch_size": 7}), 3)
    for a, b in zip(whole, parts, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)
    assert not np.array_equal(whole.members, membership_losses(net, model.card, data, 4).members)


def test_the_timesteps_are_spread_over_the_first_half() -> None:
    assert attack_timesteps(1000, 4) == [62, 187, 312, 437]
    assert attack_timesteps(1, 3) == [0, 0, 0]


def test_data_that_prove_nothing_are_refused(data: MembershipConfig) -> None:
    card, net = card_of(data), nn.Identity()
    swapped = data.model_copy(update={"members": data.held_out, "held_out": data.members})
    with pytest.raises(UserError, match=r"^membership\.members: .* is not the training data of the model"):
        membership_losses(net, card, swapped, 0)
    both = data.model_copy(update={"held_out": data.members})
    with pytest.raises(UserError, match=r"^membership\.held_out: .* is the training data of the model"):
        membership_losses(net, card, both, 0)


RULE = {"membership_auc": {"better": "lower", "must": "keep", "tolerance": 0.05}}


def test_the_gate_refuses_a_challenger_that_gives_its_training_images_away() -> None:
    chance = np.random.default_rng(1)
    others = chance.normal(1.0, 0.1, 200)

    def model(gap: float) -> SampledModel:
        losses = MembershipLosses(chance.normal(1.0 - gap, 0.1, 200), others)
        return SampledModel(measured(seed=1), 20, BatchTimes([], []), losses)

    membership = MembershipConfig(members="m", held_out="h")
    evaluate = config().model_copy(update={"membership": membership})
    gate = GateConfig.model_validate({"evaluate": evaluate, "rules": RULE, "resamples": 50})
    real, private, leaky = measured(400, seed=50), model(0.0), model(0.3)
    refused = judge(leaky, private, real, gate)
    assert list(refused) == ["membership_auc"]
    assert refused["membership_auc"].challenger > 0.95
    assert verdict(refused)[0] is False
    assert verdict(judge(private, leaky, real, gate)) == (True, "better in membership_auc; worse in nothing")


def test_a_rule_needs_data_and_settings_without_it_keep_their_digest() -> None:
    with pytest.raises(ValidationError, match=r"rules\.membership_auc needs evaluate\.membership"):
        GateConfig.model_validate({"evaluate": config(), "rules": RULE})
    assert "membership" not in EvaluateConfig(reference="r").model_dump(mode="json")
    plain, reference = config(), measured(10)
    asked = plain.model_copy(update={"membership": MembershipConfig(members="m", held_out="h")})
    assert conditions_of(plain, 1, reference, "d") != conditions_of(asked, 1, reference, "d")
