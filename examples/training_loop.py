"""A training loop of your own on this project's data loader, diffusion functions and network; no server needed.

    python examples/training_loop.py ./work 200

Every random number is named by the position of its sample: run it again, and the loss is the same to the last bit.
"""

import sys
from pathlib import Path

import torch

from ddpm_pipeline.config.data import DataConfig, PackConfig
from ddpm_pipeline.config.diffusion import ObjectiveConfig, SamplerConfig
from ddpm_pipeline.data.index import load_index
from ddpm_pipeline.data.packing.pack_dataset import pack
from ddpm_pipeline.data.reading.loader import Loader
from ddpm_pipeline.diffusion import NoiseSchedule, Stream, from_uint8, sample, training_loss
from ddpm_pipeline.diffusion.noise import normal, randint
from ddpm_pipeline.nets import ConstantEMA, UNet, UNetConfig


def train(folder: Path, steps: int, seed: int = 0) -> tuple[float, torch.Tensor]:
    """Pack scikit-learn's digits, train on them, and draw eight; the last loss, and float (8, 1, 8, 8)."""
    uri = f"{folder.resolve().as_uri()}/digits"
    pack(PackConfig(source="digits", dest=uri, channels=1))  # does nothing the second time
    loader = Loader(DataConfig(uri=uri), load_index(uri), seed, global_batch=32)
    schedule, objective = NoiseSchedule.cosine(), ObjectiveConfig()
    torch.manual_seed(seed)  # for the first weights
    gray = {"in_channels": 1, "out_channels": 1, "attention_resolutions": ()}
    net = UNet(UNetConfig(image_size=8, base_channels=32, multipliers=(1, 2), num_res_blocks=1, **gray))
    optimizer, average, loss = torch.optim.AdamW(net.parameters(), lr=1e-3), ConstantEMA(net), torch.inf
    for batch in loader.batches(0, steps):
        x0, names = from_uint8(batch.images), batch.positions
        t = randint(seed, Stream.TRAIN_TIMESTEP, names, schedule.T)
        noise = normal(seed, Stream.TRAIN_NOISE, names, tuple(x0.shape[1:]))
        terms = training_loss(schedule, objective, net, x0, t, noise)
        optimizer.zero_grad()
        terms.per_sample.mean().backward()
        optimizer.step()
        average.update(net, batch.step + 1)
        loss = terms.per_sample.mean().item()
    average.copy_to(net)
    sampler = SamplerConfig(kind="dpm++2m", num_steps=10)
    with torch.no_grad():
        return loss, sample(net, schedule, sampler, torch.arange(8), (1, 8, 8), seed)


if __name__ == "__main__":
    final, images = train(Path(sys.argv[1]), int(sys.argv[2]))
    print(f"loss {final:.4f}, images {tuple(images.shape)}")
