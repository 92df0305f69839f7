"""What a worker records of its GPU beside each shard."""

from collections.abc import Callable

from ddpm_pipeline.devices.energy import EnergyMeter
from ddpm_pipeline.devices.nvml import visible_gpus
from ddpm_pipeline.generate.done_records import GpuUse


class GpuMeter:
    """Measures the energy of this worker's GPU, the first visible one, from one shard to the next."""

    def __init__(self, name: str, share: float) -> None:
        """`name`: as torch reports it; `share`: the part of the GPU that this worker has."""
        self._name, self._share = name, min(1.0, share)
        self._meter = EnergyMeter(visible_gpus()[:1])

    def start(self) -> Callable[[], GpuUse]:
        """Begin a shard. The result, called between its batches and at its end, is the use until then."""
        before = self._meter.joules()

        def use() -> GpuUse:
            now = self._meter.joules()
            joules = None if now is None or before is None else (now - before) * self._share
            return GpuUse(name=self._name, share=self._share, joules=joules)

        return use
