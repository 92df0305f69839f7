"""What images cost: network evaluations, device time, energy and, where the settings name a price, money."""

from typing import Annotated

from pydantic import Field

from ddpm_pipeline.config.base import Settings
from ddpm_pipeline.config.bounds import Count, Seconds
from ddpm_pipeline.config.cost import CostConfig
from ddpm_pipeline.generate.done_records import RecordAggregate
from ddpm_pipeline.generate.manifest import Manifest

PER_IMAGES = 1000
"""Device time, energy and money are reported for this many images."""


class Cost(Settings):
    """Cost of some finished images. The evaluations follow from the settings, the rest is measured."""

    evaluations_per_image: Annotated[int, Field(ge=1, lt=2**53)] | None
    """Evaluations of the network for an image; None in generations of versions that did not record it."""
    images: Count
    """Images that were made in `device_seconds`."""
    device_seconds: Seconds
    """Seconds of whole devices: GPUs or, without any, workers with their cores."""
    joules: Annotated[float, Field(ge=0, le=1e18)] | None = None
    """Energy of the GPUs in that time; None on CPUs, and where a GPU does not report it."""
    price: CostConfig = CostConfig()
    """Price of device time."""

    @property
    def images_per_device_second(self) -> float | None:
        """None where no device time was measured."""
        return self.images / self.device_seconds if self.device_seconds else None

    @property
    def device_seconds_per_1000(self) -> float | None:
        """Device seconds per 1,000 images; None without images."""
        return self._per_1000(self.device_seconds)

    @property
    def joules_per_1000(self) -> float | None:
        """Joules per 1,000 images; None where energy is not known."""
        return self._per_1000(self.joules)

    @property
    def money_per_1000(self) -> float | None:
        """Price of 1,000 images; None without a price."""
        return self._per_1000(self.price.of(self.device_seconds))

    def metrics(self) -> dict[str, float]:
        """Points of an MLflow run's charts."""
        points = {
            "cost/evaluations_per_image": self.evaluations_per_image,
            "cost/images_per_device_second": self.images_per_device_second,
            "cost/device_seconds_per_1000_images": self.device_seconds_per_1000,
            "cost/joules_per_1000_images": self.joules_per_1000,
            "cost/money_per_1000_images": self.money_per_1000,
        }
        return {name: float(value) for name, value in points.items() if value is not None}

    def measured(self) -> dict[str, str]:
        """What was measured, and what it cost, by its name; what is not known is left out."""
        rows = {
            "device seconds": self.device_seconds,
            "images per device second": self.images_per_device_second,
            "device seconds per 1,000 images": self.device_seconds_per_1000,
            "joules per 1,000 images": self.joules_per_1000,
            f"{self.price.currency} per 1,000 images": self.money_per_1000,
        }
        return {name: amount(value) for name, value in rows.items() if value is not None}

    def text(self) -> str:
        """In one line."""
        facts: list[str] = []
        if self.evaluations_per_image is not None:
            facts.append(f"{self.evaluations_per_image:,} network evaluations per image")
        facts += [f"{value} {name}" for name, value in self.measured().items() if name != "device seconds"]
        return ", ".join(facts)

    def _per_1000(self, total: float | None) -> float | None:
        return None if total is None or not self.images else PER_IMAGES * total / self.images


def cost_of_records(
    records: RecordAggregate, evaluations_per_image: int | None, price: CostConfig
) -> Cost | None:
    """Cost of the shards in `records`; None if there are none."""
    if not records.images:
        return None
    return Cost(
        evaluations_per_image=evaluations_per_image,
        images=records.images,
        device_seconds=records.seconds,
        joules=records.joules,
        price=price,
    )


def cost_of_generation(manifest: Manifest, price: CostConfig | None = None) -> Cost:
    """Cost of a complete generation, as its manifest states it."""
    return Cost(
        evaluations_per_image=manifest.evaluations_per_image,
        images=manifest.count,
        device_seconds=manifest.times.device_seconds,
        joules=manifest.times.joules,
        price=price or CostConfig(),
    )


def amount(value: float) -> str:
    """A number for people: three digits, all of those before the point."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
