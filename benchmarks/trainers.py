"""Trainings that take turns: ours, diffusers' `train_unconditional`, denoising-diffusion-pytorch's Trainer.

`python -m benchmarks.trainers FOLDER` installs what the peers need beside this project's environment, never into it:
denoising-diffusion-pytorch asks for torchvision, which would bring another torch, so it comes without what it asks
for, and two empty modules stand for torchvision, which only its reader of picture files uses.

All train the same architecture on the same images. The peers get theirs as float tensors from memory; ours come
through the loader from a packed data set, as in any training.
"""

import subprocess
import sys
import tempfile
import types
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ddpm_pipeline.config.diffusion import SamplerConfig
from ddpm_pipeline.config.net import UNetConfig
from ddpm_pipeline.config.training import TrainConfig
from ddpm_pipeline.data.formats.png import encode_png
from ddpm_pipeline.data.formats.shards import write_shard
from ddpm_pipeline.data.index import load_index
from ddpm_pipeline.data.packing.build_index import build_index
from ddpm_pipeline.data.reading.loader import Loader
from ddpm_pipeline.diffusion import NoiseSchedule
from ddpm_pipeline.diffusion.image_scaling import from_uint8, to_uint8
from ddpm_pipeline.diffusion.samplers import sample
from ddpm_pipeline.nets.diffusers_config import net_to_diffusers
from ddpm_pipeline.store import open_store
from ddpm_pipeline.train.captured_gradients import captured_gradients
from ddpm_pipeline.train.loop import Trainer
from ddpm_pipeline.train.state import initial_state
from ddpm_pipeline.train.step_metrics import StepMetrics

CPU = torch.device("cpu")
PEERS = ("accelerate==1.15.0", "denoising-diffusion-pytorch==2.3.4", "ema-pytorch==0.8.3", "einops>=0.8")
SAMPLING_STEPS = 50
"""Of the peers' DDIM samplers; ours takes fewer."""


class Contender(Protocol):
    """A training in progress."""

    def steps(self, count: int) -> None:
        """Take `count` optimiser steps."""
        ...

    def sample(self, count: int) -> Tensor:
        """Images uint8 (count, C, H, W) by its averaged weights and its own sampler."""
        ...


@dataclass(frozen=True)
class Setting:
    """What the contenders share."""

    net: UNetConfig
    images: Tensor
    """uint8 (N, C, H, W)."""
    batch: int
    steps: int
    """Steps of the whole training, which schedules of the learning rate need to know."""
    seed: int
    device: torch.device = CPU
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the peers; ours is in its settings."""


class Ours:
    """ddpm_pipeline.train's own loop, alone in this process."""

    def __init__(self, config: TrainConfig, sampler: SamplerConfig, device: torch.device = CPU) -> None:
        """Trains and samples on the packed data set that `config` names."""
        self._config, self._sampler, self._device = config, sampler, device
        self.loader = Loader(config.data, load_index(config.data.uri), config.seed, config.global_batch)
        self.state = initial_state(config, device)
        if config.compile:
            self.state.net.compile()
        schedule = NoiseSchedule.from_config(config.schedule).to(device)
        self.trainer = Trainer(
            config,
            schedule,
            self.state.net,
            device,
            world=1,
            captured=captured_gradients(config, self.state.net, device, world=1),
        )
        self.window = StepMetrics(schedule.T, device)
        self._steps = self.trainer.steps(self.state, self.loader.batches(0, config.steps), self.window)

    def steps(self, count: int) -> None:
        for _ in islice(self._steps, count):
            pass

    def sample(self, count: int) -> Tensor:
        config = self._config
        shape = (config.net.in_channels, config.net.image_size, config.net.image_size)
        index = torch.arange(count)
        parts = [
            sample(
                self.state.averaged(),
                self.trainer.schedule,
                self._sampler,
                part,
                shape,
                config.seed,
                objective=config.objective,
                device=self._device,
            )
            for part in index.split(200)
        ]
        return to_uint8(torch.cat(parts))


class Diffusers:
    """The loop of diffusers' examples/unconditional_image_generation, with its defaults and --use_ema."""

    def __init__(self, setting: Setting, lr: float = 1e-4) -> None:
        """lr: by default the script's."""
        from accelerate import Accelerator
        from diffusers import DDPMScheduler
        from diffusers.optimization import get_scheduler
        from diffusers.training_utils import EMAModel

        _forget_precision()
        torch.manual_seed(setting.seed)
        self._net, self._size = their_network(setting.net), setting.net.image_size
        self._accelerator: Any = Accelerator(
            cpu=setting.device.type == "cpu", mixed_precision=_accelerate_precision(setting)
        )
        self._ema: Any = EMAModel(
            self._net.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75
        )
        self._ema.to(setting.device)
        self._noise_scheduler: Any = DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear")
        optimizer = torch.optim.AdamW(
            self._net.parameters(), lr=lr, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8
        )
        schedule = get_scheduler(
            "cosine", optimizer=optimizer, num_warmup_steps=min(500, setting.steps // 10),
            num_training_steps=setting.steps,
        )  # fmt: skip
        self._model, self._optimizer, self._lr = self._accelerator.prepare(self._net, optimizer, schedule)
        self._batches = _endless(setting, from_uint8(setting.images))

    def steps(self, count: int) -> None:
        accelerator, scheduler = self._accelerator, self._noise_scheduler
        self._model.train()
        for batch in islice(self._batches, count):
            clean = batch.to(accelerator.device)
            noise = torch.randn(clean.shape, device=clean.device)
            timesteps = torch.randint(
                0, scheduler.config.num_train_timesteps, (len(clean),), device=clean.device
            ).long()
            noisy = scheduler.add_noise(clean, noise, timesteps)
            with accelerator.accumulate(self._model):
                output = self._model(noisy, timesteps).sample
                loss = nn.functional.mse_loss(output.float(), noise.float())
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(self._model.parameters(), 1.0)
                self._optimizer.step()
                self._lr.step()
                self._optimizer.zero_grad()
            if accelerator.sync_gradients:
                self._ema.step(self._model.parameters())
            loss.detach().item()  # for its progress bar

    def sample(self, count: int) -> Tensor:
        from diffusers import DDIMPipeline, DDIMScheduler

        self._ema.store(self._net.parameters())
        self._ema.copy_to(self._net.parameters())
        scheduler = DDIMScheduler.from_config(self._noise_scheduler.config)
        pipeline: Any = DDIMPipeline(unet=self._net.eval(), scheduler=scheduler)
        pipeline.set_progress_bar_config(disable=True)
        parts = [
            torch.from_numpy(
                pipeline(batch_size=n, num_inference_steps=SAMPLING_STEPS, output_type="np").images
            )
            for n in _parts(count)
        ]
        self._ema.restore(self._net.parameters())
        return _levels(torch.cat(parts).permute(0, 3, 1, 2))


class DenoisingDiffusion:
    """denoising-diffusion-pytorch's Trainer with its defaults, around the same network as the others'."""

    def __init__(self, setting: Setting, lr: float = 1e-4) -> None:
        """lr: by default the Trainer's."""
        with torchvision_stood_in():
            from denoising_diffusion_pytorch import denoising_diffusion_pytorch as package

        _forget_precision()
        torch.manual_seed(setting.seed)
        process = package.GaussianDiffusion(
            Adapted(setting.net), image_size=setting.net.image_size, sampling_timesteps=SAMPLING_STEPS
        )
        package.tqdm = _silent(package.tqdm)
        images = from_uint8(setting.images) / 2 + 0.5
        package.Dataset = lambda *_, **__: TensorDataset(images)  # instead of a folder of pictures
        self._folder = tempfile.TemporaryDirectory(prefix="ddpm-bench-")
        self._trainer: Any = package.Trainer(
            process, "", train_batch_size=setting.batch, train_lr=lr, train_num_steps=0,
            save_and_sample_every=10**9, results_folder=self._folder.name, calculate_fid=False,
            amp=setting.precision != "float32", mixed_precision_type="bf16",
        )  # fmt: skip
        self._trainer.dl = _endless(setting, images)

    def steps(self, count: int) -> None:
        self._trainer.train_num_steps = self._trainer.step + count
        self._trainer.train()

    def sample(self, count: int) -> Tensor:
        model = self._trainer.ema.ema_model.eval()
        return _levels(torch.cat([model.sample(batch_size=n) for n in _parts(count)]))


class Adapted(nn.Module):
    """Diffusers' network under the names that denoising-diffusion-pytorch asks for."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.net = their_network(config)
        self.channels = self.out_dim = config.in_channels
        self.self_condition = False

    def forward(self, x: Tensor, time: Tensor, x_self_cond: Tensor | None = None) -> Tensor:
        return self.net(x, time, return_dict=False)[0]


def their_network(config: UNetConfig) -> Any:
    """The same architecture as diffusers builds it, with its own initial weights."""
    from diffusers import UNet2DModel

    return UNet2DModel.from_config(net_to_diffusers(config))


def pack_images(folder: Path, images: Tensor) -> str:
    """Images uint8 (N, C, H, W) as an indexed data set of one shard; its URI."""
    store = open_store(folder.as_uri())
    rows = images.permute(0, 2, 3, 1).numpy()
    store.write(
        "00000.tar", write_shard((f"{i:08d}", {"png": encode_png(row)}) for i, row in enumerate(rows))
    )
    build_index(store.uri)
    return store.uri


def use_peers(folder: Path | None) -> bool:
    """Whether the peers can be imported, from `folder` if it is given."""
    import importlib.util

    if folder is not None:
        sys.path.append(str(folder.resolve()))
    return all(map(importlib.util.find_spec, ("accelerate", "denoising_diffusion_pytorch", "ema_pytorch")))


def install_peers(folder: Path) -> None:
    """Into `folder`, without what they ask for. Raises CalledProcessError."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
    subprocess.run([*command, *PEERS], check=True, stdout=sys.stderr)


@contextmanager
def torchvision_stood_in() -> Generator[None]:
    """Empty modules under its name while something imports it, for nobody else to take for the real one."""
    module: Any = types.ModuleType("torchvision")
    module.transforms = types.ModuleType("torchvision.transforms")
    module.utils = types.ModuleType("torchvision.utils")
    sys.modules["torchvision"] = module
    try:
        yield
    finally:
        del sys.modules["torchvision"]


def _endless(setting: Setting, images: Tensor) -> Iterator[Tensor]:
    loader = DataLoader(
        TensorDataset(images),
        batch_size=setting.batch,
        shuffle=True,
        drop_last=True,  # of equal batches, as ours are
        pin_memory=setting.device.type == "cuda",
    )
    while True:
        for (batch,) in loader:
            yield batch


def _forget_precision() -> None:
    """Let the next Accelerator choose its precision, which accelerate keeps for the whole process.

    One without autocast stays as it is; make those before the others.
    """
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()


def _accelerate_precision(setting: Setting) -> str:
    return "no" if setting.precision == "float32" else "bf16"


def _parts(count: int, most: int = 200) -> list[int]:
    return [min(most, count - start) for start in range(0, count, most)]


def _levels(unit: Tensor) -> Tensor:
    """[0, 1] to uint8."""
    return (unit.clamp(0, 1) * 255).round().to(torch.uint8)


def _silent(bar: Any) -> Any:
    return lambda *given, **named: bar(*given, **{**named, "disable": True})


if __name__ == "__main__":
    install_peers(Path(sys.argv[1]))
