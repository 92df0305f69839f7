"""Nights take a champion only if the holder of a key has signed that the gate promoted these weights."""

from dataclasses import replace
from pathlib import Path

import pytest

from ddpm_pipeline.config.evaluation import EvaluateConfig
from ddpm_pipeline.config.generation import GenerateConfig
from ddpm_pipeline.config.nights import NightlyConfig
from ddpm_pipeline.errors import UserError
from ddpm_pipeline.evaluate import promotion
from ddpm_pipeline.evaluate.signed_decision import SIGNATURE_TAG, require_signed
from ddpm_pipeline.nightly import run_nights
from ddpm_pipeline.signatures import SigningKey
from ddpm_pipeline.tracking import ModelVersion
from tests.evaluate.made import decision
from tests.evaluate.test_promote import Models, connect

WEIGHTS = "cd" * 32


@pytest.fixture
def key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SigningKey:
    made = SigningKey.create(tmp_path / "signing.pem")
    monkeypatch.setenv("DDPM_SIGNING_KEY_FILE", str(tmp_path / "signing.pem"))
    return made


class Weighed(Models):
    """Versions whose weights have a hash."""

    def versions(self, name: str) -> list[ModelVersion]:
        return [replace(version, sha256=WEIGHTS) for version in super().versions(name)]


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch) -> Models:
    found = Weighed(2)
    connect(found, found, monkeypatch)
    return found


def decided(models: Models, number: int, verdict: str = "promoted") -> ModelVersion:
    """Version `number` with the decision of the gate on record."""
    made = decision(number, 2, verdict)
    promotion.record(made, models.resolve(f"digits/{number}"), models.resolve("digits/2"), "champion", 0)
    return models.resolve(f"digits/{number}")


def test_a_promotion_with_the_key_is_accepted(models: Models, key: SigningKey) -> None:
    require_signed(decided(models, 3), key.public)


def test_a_decision_without_a_signature_is_refused(
    models: Models, key: SigningKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="model digits/2: has no signed decision of the gate"):
        require_signed(models.resolve("digits/2"), key.public)
    monkeypatch.delenv("DDPM_SIGNING_KEY_FILE")
    unsigned = decided(models, 3)
    assert SIGNATURE_TAG not in unsigned.tags
    with pytest.raises(UserError, match="model digits/3: has no signed decision of the gate"):
        require_signed(unsigned, key.public)


def test_every_forgery_of_a_decision_is_refused(models: Models, key: SigningKey, tmp_path: Path) -> None:
    signed = decided(models, 3)
    refused = decided(models, 4, "refused")
    text = signed.tags["ddpm.gate.decision"]
    assert "is better" in text
    forgeries = {
        r"ddpm\.gate\.decision is not the one": replace(
            signed, tags={**signed.tags, "ddpm.gate.decision": text.replace("is better", "is worse")}
        ),
        r"model\.safetensors is not the one": replace(signed, sha256="0" * 64),
        "the signed decision is 'digits/3 promoted'": replace(signed, version=1),
        "the signed decision is 'digits/4 refused'": refused,
        "not a DSSE envelope": replace(signed, tags={**signed.tags, SIGNATURE_TAG: "{}"}),
    }
    for what, version in forgeries.items():
        with pytest.raises(UserError, match=what) as caught:
            require_signed(version, key.public)
        assert "\n" not in str(caught.value)
    thief = SigningKey.create(tmp_path / "thief.pem")
    with pytest.raises(UserError, match=r"is signed by .*, not by"):
        require_signed(signed, thief.public)


def test_nights_refuse_a_champion_without_a_signed_decision(
    models: Models, key: SigningKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    def config(model: str, require: str | None) -> NightlyConfig:
        evaluate = EvaluateConfig(reference="r")
        return NightlyConfig(
            generate=GenerateConfig(model=model, output="file:///n", count=1),
            evaluate=evaluate,
            require_signed=require,
        )

    monkeypatch.setattr(run_nights, "resolve", models.resolve)
    decided(models, 3)
    run_nights._require_signed(config("digits/2", None), "digits/2")
    run_nights._require_signed(config("digits/3", key.public.text), "digits/3")
    with pytest.raises(UserError, match="model digits/2: has no signed decision"):
        run_nights._require_signed(config("digits/2", key.public.text), "digits/2")
    with pytest.raises(UserError, match="is in no registry"):
        run_nights._require_signed(config("./folder", key.public.text), "./folder")
