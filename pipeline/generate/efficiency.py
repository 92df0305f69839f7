"""How well a generation uses its GPUs: images a second and a joule, and the share of their peak arithmetic."""

import functools
from dataclasses import dataclass

from ddpm_pipeline.config.model_card import ModelCard
from ddpm_pipeline.devices.peak_flops import peak_flops
from ddpm_pipeline.diffusion import NoiseSchedule
from ddpm_pipeline.diffusion.evaluations import network_evaluations
from ddpm_pipeline.generate.done_records import GpuTotals
from ddpm_pipeline.generate.spec import Spec
from ddpm_pipeline.nets.flops import forward_flops


@dataclass(frozen=True)
class Efficiency:
    """Means over finished shards."""

    gpu: str
    """Names of the GPUs."""
    images_per_gpu_second: float
    """Images a second of one GPU, in the time in which it samples."""
    images_per_joule: float | None
    """None where a GPU does not report its energy."""
    mfu: float | None
    """Operations of the network a second over the peak of the GPU; None for a GPU whose peak is not known."""

    def metrics(self) -> dict[str, float]:
        """Points of the run's charts."""
        points = {
            "perf/images_per_gpu_second": self.images_per_gpu_second,
            "perf/images_per_joule": self.images_per_joule,
            "perf/mfu": self.mfu,
        }
        return {name: value for name, value in points.items() if value is not None}

    def __str__(self) -> str:
        facts = [self.gpu, f"{self.images_per_gpu_second:,.3g} images/s per GPU"]
        if self.images_per_joule is not None:
            facts.append(f"{self.images_per_joule:.3g} images per joule")
        if self.mfu is not None:
            facts.append(f"MFU {self.mfu:.1%}")
        return ", ".join(facts)


class EfficiencyCalculator:
    """Efficiency of one generation, from sums over its shards."""

    def __init__(self, spec: Spec, card: ModelCard) -> None:
        self._spec, self._card = spec, card

    def of(self, totals: GpuTotals) -> Efficiency | None:
        """The means over the shards in `totals`; None if no GPU made any."""
        seconds = sum(totals.seconds.values())
        if not totals.images or not seconds:
            return None
        spec = self._spec
        arithmetic = "tf32" if spec.dtype == "float32" and spec.matmul == "tf32" else spec.dtype
        peaks = {name: peak_flops(name, arithmetic) for name in totals.seconds}
        possible = sum(totals.seconds[name] * peak for name, peak in peaks.items() if peak is not None)
        known = None not in peaks.values()
        return Efficiency(
            gpu=" and ".join(sorted(totals.seconds)),
            images_per_gpu_second=totals.images / seconds,
            images_per_joule=totals.images / totals.joules if totals.joules else None,
            mfu=totals.images * self.image_flops / possible if known else None,
        )

    @functools.cached_property
    def image_flops(self) -> int:
        """Floating-point operations of the network for an image: convolutions and matrix products."""
        return forward_flops(self._card.net) * self.evaluations_per_image

    @functools.cached_property
    def evaluations_per_image(self) -> int:
        """Evaluations of the network for an image."""
        schedule = NoiseSchedule.from_config(self._card.schedule)
        return network_evaluations(schedule, self._spec.sampler)
