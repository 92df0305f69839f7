"""What a device costs, so that reports can say what images cost."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from ddpm_pipeline.config.base import Settings, refuse_idle


class CostConfig(Settings):
    """The price of device time. It changes no image and no record, only what is reported."""

    per_device_hour: Annotated[float, Field(ge=0, le=1e9)] | None = None
    """Price of an hour of one device: a GPU or, without one, a worker with its cores. None = no prices are reported."""
    currency: str = Field(default="USD", pattern=r"^[A-Z]{3}$")
    """Currency of `per_device_hour`, three letters (ISO 4217)."""

    @model_validator(mode="after")
    def _has_no_idle_setting(self) -> Self:
        if self.per_device_hour is None:
            refuse_idle(self, ("currency",), "without per_device_hour")
        return self

    def of(self, device_seconds: float) -> float | None:
        """Price of device time, in `currency`; None where there is no price."""
        return None if self.per_device_hour is None else self.per_device_hour * device_seconds / 3600
