"""Sets of made-up features, with known relations to each other."""

import numpy as np

from pipeline.config.evaluation import EvaluateConfig
from pipeline.features.feature_set import FeatureSet

NETWORK = "n" * 64


def vectors(count: int, size: int = 6, seed: int = 0, shift: float = 0.0) -> np.ndarray:
    """Correlated float32 features (count, size), moved by `shift`."""
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(99).normal(size=(size, size))
    return (rng.normal(size=(count, size)) @ mixing + shift).astype(np.float32)


def measured(
    count: int = 200, seed: int = 0, shift: float = 0.0, wrong: int = 0, network: str = NETWORK
) -> FeatureSet:
    """A set whose features are off by `shift` and whose first `wrong` images are taken for another class."""
    rng = np.random.default_rng(1000 + seed)
    labels = np.arange(count) % 4
    told = labels.copy()
    told[:wrong] = (told[:wrong] + 1) % 4
    logits = np.eye(4, dtype=np.float32)[told] * 5
    thumbs = rng.integers(0, 256, (count, 16), dtype=np.uint8)
    prints = rng.integers(0, 2**63, count).astype(np.uint64)
    return FeatureSet(network, vectors(count, seed=seed, shift=shift), logits, labels, thumbs, prints)


def config(**changes: object) -> EvaluateConfig:
    """Settings of a small evaluation."""
    return EvaluateConfig.model_validate({"reference": "made-up", "num_splits": 2} | changes)
