"""Features without weights, and a metric of them."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from ddpm_pipeline.config.plugins import NoSettings
from ddpm_pipeline.features.feature_set import FeatureSet
from ddpm_pipeline.features.networks import FeatureNetwork, Features
from tiny_dit.doors import FeatureSettings


@dataclass(frozen=True)
class Means:
    """The mean level of each cell of an image."""

    cells: int
    identity: str = "means"
    digest: str = "means"
    label: str = "means of cells"

    def __call__(self, images: Tensor) -> Features:
        """Images uint8 (B, C, H, W)."""
        return Features(F.adaptive_avg_pool2d(images.float(), self.cells).flatten(1), None)


def open_means(settings: FeatureSettings, reference: str, gpu: str | None) -> FeatureNetwork:
    """The entry point's code."""
    return Means(settings.cells)


def brightness(samples: FeatureSet, reference: FeatureSet, settings: NoSettings) -> float:
    """How much brighter samples are than the reference, in levels."""
    return float(samples.vectors.mean() - reference.vectors.mean())
