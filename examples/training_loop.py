# %% [markdown]
# # A training loop of your own
#
# On this project's data loader, diffusion functions and network; no server is needed. Every random number is named by
# the position of its sample: run it again, and every loss is the same to the last bit.
#
# The cells open in Jupyter, VS Code and PyCharm; `python examples/training_loop.py` runs them all.

# %%
from collections.abc import Iterator
from pathlib import Path

import torch

from ddpm_pipeline.config.data import DataConfig, PackConfig
from ddpm_pipeline.config.diffusion import ObjectiveConfig, SamplerConfig
from ddpm_pipeline.data import Loader, load_index, pack
from ddpm_pipeline.diffusion import NoiseSchedule, Stream, from_uint8, sample, training_loss
from ddpm_pipeline.diffusion.noise import normal, randint
from ddpm_pipeline.nets import ConstantEMA, UNet, UNetConfig

uri = f"{Path('work').resolve().as_uri()}/digits"
pack(PackConfig(source="digits", dest=uri, channels=1))  # scikit-learn's digits; does nothing the second time


# %% [markdown]
# The loop is a generator: logging, checkpoints and evaluation stand where it is used, without hooks.


# %%
def losses(net: torch.nn.Module, average: ConstantEMA, schedule: NoiseSchedule, seed: int) -> Iterator[float]:
    """Train without end on the digits; the loss of each step."""
    loader = Loader(DataConfig(uri=uri), load_index(uri), seed, global_batch=32)
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3)
    for batch in loader.batches(0, 1_000_000):
        x0, names = from_uint8(batch.images), batch.positions
        t = randint(seed, Stream.TRAIN_TIMESTEP, names, schedule.T)
        noise = normal(seed, Stream.TRAIN_NOISE, names, tuple(x0.shape[1:]))
        loss = training_loss(schedule, ObjectiveConfig(), net, x0, t, noise).per_sample.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        average.update(net, batch.step + 1)
        yield loss.item()


# %%
torch.manual_seed(0)  # for the first weights
gray = {"in_channels": 1, "out_channels": 1, "attention_resolutions": (), "norm_groups": 8}
net = UNet(UNetConfig(image_size=8, base_channels=16, multipliers=(1, 2), num_res_blocks=1, **gray))
average, schedule, history = ConstantEMA(net), NoiseSchedule.cosine(), list[float]()
for step, loss in enumerate(losses(net, average, schedule, seed=0), 1):
    history.append(loss)
    if step % 50 == 0:
        print(f"step {step}: loss {sum(history[-50:]) / 50:.4f}")
    if step == 100:
        break

# %%
average.copy_to(net)
with torch.no_grad():  # float (8, 1, 8, 8) in [-1, 1]
    images = sample(
        net, schedule, SamplerConfig(kind="dpm++2m", num_steps=10), torch.arange(8), (1, 8, 8), seed=0
    )
print(f"drew {tuple(images.shape)}")
