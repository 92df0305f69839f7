"""The small classifier behind `ddpm features train`: a feature network for domains Inception never saw."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.config.evaluation import FeaturesConfig
from pipeline.diffusion.image_scaling import from_uint8
from pipeline.diffusion.noise import Stream, permutation, randint
from pipeline.progress import Progress

_SMALLEST_EDGE = 4
_GROUPS = 8


class Classifier(nn.Module):
    """Images float (B, C, H, W) in [-1, 1] to features (B, F) and logits (B, K).

    Two convolutions a resolution, halved until the edge is at most 4 pixels; the map is then flattened, not
    averaged, so that features know where things are.
    """

    def __init__(
        self, channels: int, size: int, num_classes: int, width: int, features: int, dropout: float
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        edge, before, now = size, channels, width
        while True:
            for _ in range(2):
                layers += [nn.Conv2d(before, now, 3, padding=1), nn.GroupNorm(_GROUPS, now), nn.SiLU()]
                before = now
            if edge <= _SMALLEST_EDGE:
                break
            layers.append(nn.AvgPool2d(2, ceil_mode=True))
            edge, now = -(-edge // 2), min(2 * now, 8 * width)
        self.body = nn.Sequential(*layers, nn.Flatten())
        self.features = nn.Linear(before * edge * edge, features)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(features, num_classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features after their non-linearity, and the logits made of them."""
        features = F.silu(self.features(self.body(images)))
        return features, self.head(self.dropout(features))


def split_rows(num_samples: int, held_out: float, seed: int) -> tuple[Tensor, Tensor]:
    """Rows to train on and rows held out, int64, each in a named order. ValueError if either would be empty."""
    order = permutation(seed, Stream.ORDER_SAMPLES, num_samples)
    held = round(num_samples * held_out)
    if not 0 < held < num_samples:
        raise ValueError(f"held_out {held_out} of {num_samples} samples leaves one side empty")
    return order[held:], order[:held]


def train_classifier(
    config: FeaturesConfig, images: Tensor, labels: Tensor, num_classes: int, progress: Progress
) -> Classifier:
    """Train on images uint8 (N, C, H, W), labels int64 (N,), all of them. A function of its arguments."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)  # initial weights and dropout
        net = Classifier(
            images.shape[1],
            images.shape[2],
            num_classes,
            config.channels,
            config.num_features,
            config.dropout,
        )
        optimizer = torch.optim.AdamW(net.parameters(), lr=config.lr, weight_decay=config.weight_decay)
        net.train()
        for step in range(config.steps):
            rows = _rows(config, len(images), step)
            batch = shifted(from_uint8(images[rows]), rows, config.max_shift, config.seed, step)
            for group in optimizer.param_groups:
                group["lr"] = config.lr * _rise_and_fall(step, config.steps)
            loss = F.cross_entropy(net(batch)[1], labels[rows], label_smoothing=0.05)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            progress(step + 1, config.steps)
    return net.eval().requires_grad_(False)


@torch.inference_mode()
def accuracy(net: Classifier, images: Tensor, labels: Tensor, batch_size: int = 250) -> float:
    """Share of images uint8 (N, C, H, W) whose largest logit is that of their label."""
    right = 0
    for part, own in zip(images.split(batch_size), labels.split(batch_size), strict=True):
        right += int((net(from_uint8(part))[1].argmax(1) == own).sum())
    return right / len(images)


def shifted(images: Tensor, rows: Tensor, most: int, seed: int, step: int) -> Tensor:
    """Each image moved by -most..most pixels each way, drawn by (seed, row, step); the edge is repeated."""
    if most == 0:
        return images
    padded = F.pad(images, (most, most, most, most), mode="replicate")
    down = randint(seed, Stream.CROP, rows, 2 * most + 1, 2 * step)
    right = randint(seed, Stream.CROP, rows, 2 * most + 1, 2 * step + 1)
    height, width = images.shape[2:]
    ys = down[:, None] + torch.arange(height)
    xs = right[:, None] + torch.arange(width)
    image = torch.arange(len(images))[:, None, None]
    return padded[image, :, ys[:, :, None], xs[:, None, :]].permute(0, 3, 1, 2)


def _rows(config: FeaturesConfig, count: int, step: int) -> Tensor:
    """The samples of a step: epochs, each in an order of its own, cut into batches."""
    wanted = torch.arange(step * config.batch_size, (step + 1) * config.batch_size)
    epochs = wanted // count
    orders = {int(e): permutation(config.seed, Stream.ORDER_SHARDS, count, int(e)) for e in epochs.unique()}
    return torch.stack([orders[int(e)][int(w) % count] for e, w in zip(epochs, wanted, strict=True)])


def _rise_and_fall(step: int, steps: int) -> float:
    rise = max(1, steps // 10)
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))
