"""The engine: a function from sample indexes to uint8 images, made of a network, its diffusion process and a device."""

import os
import platform
from pathlib import Path

import numpy as np
import PIL
import torch
from torch import Tensor, nn

from ddpm_pipeline.config.model_card import ModelCard
from ddpm_pipeline.data.formats.npy import Pixels
from ddpm_pipeline.devices import driver_version, is_out_of_memory, set_up_arithmetic
from ddpm_pipeline.devices.emulated_precision import warn_if_emulated
from ddpm_pipeline.diffusion.image_scaling import nearest_levels
from ddpm_pipeline.diffusion.sampler_protocol import OnStep
from ddpm_pipeline.diffusion.samplers import sample
from ddpm_pipeline.diffusion.schedule import NoiseSchedule
from ddpm_pipeline.generate.captured_sampling import CapturedSampling, can_capture
from ddpm_pipeline.generate.class_labels import classes_of
from ddpm_pipeline.generate.device_check import require_kind
from ddpm_pipeline.generate.launched_images import HostCopier, LaunchedImages, MicroBatch, to_device
from ddpm_pipeline.generate.spec import Spec
from ddpm_pipeline.nets.low_precision import cast_products

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Engine:
    """Samples batches of one generation. Not thread-safe."""

    def __init__(self, spec: Spec, net: nn.Module, card: ModelCard) -> None:
        """`net` is on the spec's device and in eval mode."""
        self.spec = spec
        self.card = card
        self.micro_batch = spec.batch_size
        self._schedule = NoiseSchedule.from_config(card.schedule)
        self._device = torch.device(spec.device)
        self._copier = HostCopier()
        warn_if_emulated(DTYPES[spec.dtype], self._device)
        # Convolutions run in this layout without rearranging memory.
        net.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue] - torch's stub lacks this form
        self._net = _LowPrecision(net, spec) if spec.dtype != "float32" else net
        if spec.compile:
            self._net.compile(dynamic=False)
        self._captured: CapturedSampling | None = None
        if can_capture(spec.sampler, self._device, spec.compile):
            self._captured = CapturedSampling(self._sampled, self._device)

    @property
    def is_captured(self) -> bool:
        """Whether full micro-batches are sampled by replaying a CUDA graph."""
        return self._captured is not None and self._captured.is_captured

    @property
    def ahead(self) -> int:
        """Batches to launch before the first is waited for: on a GPU one, so that it always has work."""
        return 1 if self._device.type == "cuda" else 0

    def images(self, index: Tensor, on_step: OnStep | None = None) -> Pixels:
        """Images uint8 (B, H, W, C) of the samples `index` int64 (B,). GuardTripped at NaN or infinity."""
        return self.launch(index, on_step).wait()

    def launch(self, index: Tensor, on_step: OnStep | None = None) -> LaunchedImages:
        """Begin to sample `index` int64 (B,). On a GPU this returns before the images exist; a CPU makes them here.

        When the device runs out of memory the micro-batch is halved, for this call and all later ones, and the call
        starts over: its images follow from `index` and `micro_batch`. A sample's noise is a function of its index and
        does not change; only the network's rounding may. Memory runs out here, not in the result's `wait`: also on a
        GPU it is taken when work is launched.
        """
        while True:
            try:
                return LaunchedImages([self._sample(part, on_step) for part in index.split(self.micro_batch)])
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                # A CUDA graph keeps the memory of a micro-batch: without it there may be enough.
                if self._captured is None or not self._captured.release():
                    largest = min(self.micro_batch, len(index))
                    if largest == 1:
                        raise
                    self.micro_batch = largest // 2
            # Outside the handler: the exception's traceback holds the tensors that filled the memory.
            if self._device.type == "cuda":
                torch.cuda.empty_cache()

    def _sample(self, index: Tensor, on_step: OnStep | None) -> MicroBatch:
        spec = self.spec
        labels = classes_of(spec, index)
        if labels is None and self.card.net.null_label is not None:
            labels = torch.full_like(index, self.card.net.null_label)
        with torch.inference_mode():
            if self._captured is not None and on_step is None and len(index) == self.micro_batch:
                x0 = self._captured(index, labels)
            else:
                device = self._device
                device_labels = None if labels is None else to_device(labels, device)
                x0 = self._sampled(to_device(index, device), device_labels, on_step)
            finite = torch.isfinite(x0).flatten(1).all(1)
            return self._copier.begin(index, nearest_levels(x0), finite)

    def _sampled(self, index: Tensor, labels: Tensor | None, on_step: OnStep | None = None) -> Tensor:
        """Images float32 (B, C, H, W) of the samples `index`; both tensors are on the device."""
        spec = self.spec
        return sample(
            self._net,
            self._schedule,
            spec.sampler,
            index,
            (spec.channels, spec.size, spec.size),
            spec.seed,
            class_labels=labels,
            objective=self.card.objective,
            on_step=on_step,
            device=self._device,
        )


def set_up_torch(spec: Spec) -> None:
    """Configure torch in this process for reproducible sampling: fixed threads, no choice of algorithm by speed.

    Compiled code is cached in `compiled_code_folder`, so that only the first worker of a machine compiles. UnfitDevice
    if this process's GPU is not of the spec's kind.
    """
    if spec.compile:
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(compiled_code_folder()))
    if spec.cpu_threads is not None:
        torch.set_num_threads(spec.cpu_threads)
    if spec.device == "cuda":
        set_up_arithmetic(spec.matmul, deterministic=True)
        require_kind(spec)
    if spec.device == "cuda" and spec.compile:
        from torch._inductor import config as inductor  # takes seconds to import

        # Otherwise each worker times variants of a kernel on its GPU, and those add up in different orders.
        inductor.deterministic = True


def compiled_code_folder() -> Path:
    """Cache of compiled networks, unless TORCHINDUCTOR_CACHE_DIR names another folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ddpm-pipeline" / "compiled"


def software(spec: Spec) -> str:
    """Versions and hardware that a sample's bytes may depend on beside the spec, for the records."""
    versions = f"torch {torch.__version__}, numpy {np.__version__}, Pillow {PIL.__version__}"
    if spec.device == "cpu":
        return f"{versions}, {platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    libraries = (
        f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}, driver {driver_version()}"
    )
    return f"{versions}, {libraries}, {platform.machine()} {torch.cuda.get_device_name()}"


class _LowPrecision(nn.Module):
    """A network that computes in the spec's precision and returns float32."""

    def __init__(self, net: nn.Module, spec: Spec) -> None:
        super().__init__()
        cast_products(net, DTYPES[spec.dtype])
        self.net = net
        self.null_label = getattr(net, "null_label", None)
        self._device_type = spec.device
        self._dtype = DTYPES[spec.dtype]

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        with torch.autocast(self._device_type, self._dtype):
            return self.net(*args, **kwargs).float()
