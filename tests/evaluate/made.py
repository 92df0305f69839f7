"""Synthetic feature sets with known relations to each other."""

import numpy as np

from ddpm_pipeline.config.evaluation import EvaluateConfig, GateConfig
from ddpm_pipeline.evaluate.gate import Decision
from ddpm_pipeline.features.feature_set import FeatureSet

NETWORK = "n" * 64


def vectors(count: int, size: int = 6, seed: int = 0, shift: float = 0.0) -> np.ndarray:
    """Correlated float32 features (count, size), shifted by `shift`."""
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(99).normal(size=(size, size))
    return (rng.normal(size=(count, size)) @ mixing + shift).astype(np.float32)


def measured(
    count: int = 200, seed: int = 0, shift: float = 0.0, wrong: int = 0, network: str = NETWORK
) -> FeatureSet:
    """A set whose features are shifted by `shift` and whose first `wrong` images get a wrong class."""
    rng = np.random.default_rng(1000 + seed)
    labels = np.arange(count) % 4
    predicted = labels.copy()
    predicted[:wrong] = (predicted[:wrong] + 1) % 4
    logits = np.eye(4, dtype=np.float32)[predicted] * 5
    thumbnails = rng.integers(0, 256, (count, 16), dtype=np.uint8)
    hashes = rng.integers(0, 2**63, count).astype(np.uint64)
    return FeatureSet(network, vectors(count, seed=seed, shift=shift), logits, labels, thumbnails, hashes)


def decision(challenger: int, champion: int | None, verdict: str = "promoted") -> Decision:
    """What the gate decided on version `challenger` of digits; it judged nothing."""
    return Decision.model_validate(
        {
            "verdict": verdict,
            "reason": "it is better",
            "challenger": f"digits/{challenger}",
            "champion": None if champion is None else f"digits/{champion}",
            "count": 1,
            "reference_digest": "",
            "reference_count": 1,
            "network": "",
            "settings": GateConfig(evaluate=EvaluateConfig(reference="r")),
            "judgements": {},
            "decided_at": 0,
        }
    )


def config(**changes: object) -> EvaluateConfig:
    """Settings of a small evaluation."""
    return EvaluateConfig.model_validate({"reference": "made-up", "num_splits": 2} | changes)
