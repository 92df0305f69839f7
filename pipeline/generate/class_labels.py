"""Class labels of samples, as functions of a spec and the samples' indexes."""

import torch
from torch import Tensor

from ddpm_pipeline.diffusion.noise import Stream, uniform
from ddpm_pipeline.generate.spec import Spec


def index_tensor(samples: range) -> Tensor:
    """The indexes of consecutive samples, int64 (B,)."""
    return torch.arange(samples.start, samples.stop, dtype=torch.int64)


def classes_of(spec: Spec, index: Tensor) -> Tensor | None:
    """Class labels int64 (B,) of the samples `index` (B,), functions of (seed, index); None without classes."""
    if spec.classes is None:
        return None
    labels = torch.tensor(spec.classes.labels, dtype=torch.int64)
    if spec.classes.weights is None:
        return labels[index % len(labels)]
    weights = torch.tensor(spec.classes.weights, dtype=torch.float64)
    edges = torch.cumsum(weights / weights.sum(), 0)[:-1]
    drawn = uniform(spec.seed, Stream.SAMPLE_CLASS, index).to(torch.float64)
    return labels[torch.searchsorted(edges, drawn, right=True)]


def labels_of(spec: Spec, samples: range) -> list[int] | None:
    """Class labels of consecutive samples, in order; None without classes."""
    labels = classes_of(spec, index_tensor(samples))
    return None if labels is None else labels.tolist()
