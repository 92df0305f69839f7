"""The price of device time in the settings."""

import pytest
from pydantic import ValidationError

from ddpm_pipeline.config.cost import CostConfig
from ddpm_pipeline.config.generation import GenerateConfig


def test_a_price_is_charged_by_the_second() -> None:
    assert CostConfig(per_device_hour=3.6).of(500.0) == pytest.approx(0.5)
    assert CostConfig().of(500.0) is None
    assert CostConfig(per_device_hour=0).of(500.0) == 0


def test_a_currency_without_a_price_is_refused() -> None:
    with pytest.raises(ValidationError, match="currency has no effect without per_device_hour; leave it out"):
        CostConfig(currency="EUR")


@pytest.mark.parametrize("currency", ["euro", "eur", "$", ""])
def test_a_currency_is_three_letters(currency: str) -> None:
    with pytest.raises(ValidationError, match="currency"):
        CostConfig(per_device_hour=1, currency=currency)


def test_a_generation_takes_a_price() -> None:
    config = GenerateConfig.model_validate(
        {"model": "m@a", "output": "o", "count": 1, "batch_size": 1, "cost": {"per_device_hour": 2}}
    )
    assert config.cost == CostConfig(per_device_hour=2)
