"""The small classifier of `ddpm features train`: a feature network for data that Inception was not trained on."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpm_pipeline.config.evaluation import FeaturesConfig
from ddpm_pipeline.diffusion.image_scaling import from_uint8
from ddpm_pipeline.diffusion.noise import Stream, permutation, randint
from ddpm_pipeline.progress import Progress

_SMALLEST_EDGE = 4
_GROUPS = 8


class Classifier(nn.Module):
    """Images float (B, C, H, W) in [-1, 1] to features (B, F) and logits (B, K).

    Two convolutions per resolution, which is halved until the edge is at most 4 pixels. The map is then flattened,
    not averaged, so that features depend on position.
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
        """Features after their non-linearity, and their logits."""
        features = F.silu(self.features(self.body(images)))
        return features, self.head(self.dropout(features))


def split_rows(num_samples: int, held_out: float, seed: int) -> tuple[Tensor, Tensor]:
    """Rows to train on and rows held out, int64, a function of the seed. ValueError if either would be empty."""
    order = permutation(seed, Stream.ORDER_SAMPLES, num_samples)
    held = round(num_samples * held_out)
    if not 0 < held < num_samples:
        raise ValueError(f"held_out {held_out} of {num_samples} samples leaves one side empty")
    return order[held:], order[:held]


def train_classifier(
    config: FeaturesConfig, images: Tensor, labels: Tensor, num_classes: int, progress: Progress
) -> Classifier:
    """Train on images uint8 (N, C, H, W) and labels int64 (N,). Deterministic."""
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
            batch = shift_images(from_uint8(images[rows]), rows, config.max_shift, config.seed, step)
            for group in optimizer.param_groups:
                group["lr"] = config.lr * _lr_factor(step, config.steps)
            loss = F.cross_entropy(net(batch)[1], labels[rows], label_smoothing=0.05)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            progress(step + 1, config.steps)
    return net.eval().requires_grad_(False)


@torch.inference_mode()
def accuracy(net: Classifier, images: Tensor, labels: Tensor, batch_size: int = 250) -> float:
    """Share of images uint8 (N, C, H, W) whose largest logit is that of their label."""
    num_correct = 0
    for part, expected in zip(images.split(batch_size), labels.split(batch_size), strict=True):
        num_correct += int((net(from_uint8(part))[1].argmax(1) == expected).sum())
    return num_correct / len(images)


def shift_images(images: Tensor, rows: Tensor, max_shift: int, seed: int, step: int) -> Tensor:
    """Shift each image by up to `max_shift` pixels each way, drawn by (seed, row, step); the edge is repeated."""
    if max_shift == 0:
        return images
    padded = F.pad(images, [max_shift] * 4, mode="replicate")
    down = randint(seed, Stream.CROP, rows, 2 * max_shift + 1, 2 * step)
    right = randint(seed, Stream.CROP, rows, 2 * max_shift + 1, 2 * step + 1)
    height, width = images.shape[2:]
    ys = down[:, None] + torch.arange(height)
    xs = right[:, None] + torch.arange(width)
    image = torch.arange(len(images))[:, None, None]
    return padded[image, :, ys[:, :, None], xs[:, None, :]].permute(0, 3, 1, 2)


def _rows(config: FeaturesConfig, count: int, step: int) -> Tensor:
    """The samples of a step: epochs, each in its own order, cut into batches."""
    positions = torch.arange(step * config.batch_size, (step + 1) * config.batch_size)
    epochs = positions // count
    orders = {int(e): permutation(config.seed, Stream.ORDER_SHARDS, count, int(e)) for e in epochs.unique()}
    return torch.stack([orders[int(e)][int(p) % count] for e, p in zip(epochs, positions, strict=True)])


def _lr_factor(step: int, steps: int) -> float:
    """Linear warm-up over a tenth of the steps, then cosine decay to zero."""
    warmup = max(1, steps // 10)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
