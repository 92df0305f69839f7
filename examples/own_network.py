# %% [markdown]
# # A network of your own
#
# Anything that maps noisy images (B, C, H, W) and timesteps (B,) to a prediction (B, C, H, W) trains with
# `training_loss` and samples with `sample`: here a U-Net of 30 lines. To train it with `ddpm train`, give it a name:
# docs/extending.md.

# %%
import math

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from ddpm_pipeline.config.diffusion import ObjectiveConfig, SamplerConfig
from ddpm_pipeline.diffusion import NoiseSchedule, Stream, sample, to_uint8, training_loss
from ddpm_pipeline.diffusion.noise import normal, randint


class Block(nn.Module):
    """Two convolutions, with the time added between them."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.first, self.second = (
            nn.Conv2d(before, after, 3, padding=1),
            nn.Conv2d(after, after, 3, padding=1),
        )
        self.time, self.short = nn.Linear(64, after), nn.Conv2d(before, after, 1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = F.silu(self.first(x)) + self.time(time)[:, :, None, None]
        return self.short(x) + self.second(F.silu(h))


class SmallUNet(nn.Module):
    """Down once, up once, with one connection across."""

    def __init__(self, channels: int = 1, width: int = 32) -> None:
        super().__init__()
        self.down, self.low = Block(channels, width), Block(width, 2 * width)
        self.up, self.out = Block(3 * width, width), nn.Conv2d(width, channels, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        rates = torch.exp(-math.log(10_000) * torch.arange(32) / 32)
        angles = t.float()[:, None] * rates
        time = torch.cat([angles.sin(), angles.cos()], 1)  # (B, 64)
        across = self.down(x, time)
        low = self.low(F.avg_pool2d(across, 2), time)
        return self.out(self.up(torch.cat([F.interpolate(low, scale_factor=2), across], 1), time))


# %%
torch.manual_seed(0)
digits = torch.tensor(load_digits().images).float()[:, None] / 8 - 1  # (1797, 1, 8, 8), in [-1, 1]
net, schedule, objective = SmallUNet(), NoiseSchedule.cosine(), ObjectiveConfig(target="v")
optimizer, history = torch.optim.AdamW(net.parameters(), lr=2e-3), list[float]()
for step in range(100):
    names = torch.arange(step * 64, (step + 1) * 64)  # positions in an endless order name all random numbers
    x0 = digits[names % len(digits)]
    t = randint(0, Stream.TRAIN_TIMESTEP, names, schedule.T)
    noise = normal(0, Stream.TRAIN_NOISE, names, (1, 8, 8))
    loss = training_loss(schedule, objective, net, x0, t, noise).per_sample.mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    history.append(loss.item())
print(f"loss {sum(history[:20]) / 20:.3f}, then {sum(history[-20:]) / 20:.3f}")

# %%
sampler = SamplerConfig(kind="ddim", num_steps=20)
with torch.no_grad():
    images = to_uint8(
        sample(net, schedule, sampler, torch.arange(16), (1, 8, 8), seed=0, objective=objective)
    )
print(f"drew {tuple(images.shape)}")
