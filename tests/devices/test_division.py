"""Division has one result on every device: by a tensor, never by a Python number."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ddpm_pipeline.config.diffusion import ObjectiveConfig, SamplerConfig, ScheduleConfig
from ddpm_pipeline.devices import divided
from ddpm_pipeline.diffusion.bound import prior_term
from ddpm_pipeline.diffusion.image_scaling import from_uint8, to_uint8
from ddpm_pipeline.diffusion.samplers import sample
from ddpm_pipeline.diffusion.schedule import NoiseSchedule
from ddpm_pipeline.nets.layers import timestep_embedding

DIVISIONS = {"div", "div_", "true_divide", "__truediv__", "__itruediv__"}


class NoReciprocals(TorchFunctionMode):
    """Fails where a tensor of more than the schedule's float64 numbers is divided by a Python number."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__name__", "") in DIVISIONS and args[0].dtype == torch.float32:
            assert isinstance(args[1], Tensor), f"divided by the number {args[1]}"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("by", [127.5, 255, 1 / 3, 3.3e-4, 1e6])
def test_a_cpu_divides_by_either_form_alike(dtype: torch.dtype, by: float) -> None:
    x = torch.randn(20_001, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert torch.equal(divided(x, by), x / by)
    assert divided(x, by).dtype == dtype


def test_multiplying_by_the_reciprocal_would_give_other_bits() -> None:
    levels = torch.arange(256, dtype=torch.float32)
    assert not torch.equal(divided(levels, 127.5), levels * (1 / 127.5))


def pixels() -> None:
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(from_uint8(levels)), levels)


def embedding() -> None:
    timestep_embedding(torch.arange(4), 8)


def bits() -> None:
    schedule = NoiseSchedule.from_config(ScheduleConfig(num_steps=10))
    prior_term(schedule, torch.zeros(2, 1, 2, 2))


@pytest.mark.parametrize("work", [pixels, embedding, bits])
def test_nothing_is_divided_by_a_python_number(work: Callable[[], None]) -> None:
    with NoReciprocals():
        work()


@pytest.mark.parametrize("target", ["eps", "x0", "v"])
@pytest.mark.parametrize("kind", ["ancestral", "ddim", "dpm++2m", "heun"])
def test_no_sampler_divides_by_a_python_number(kind: str, target: str) -> None:
    schedule = NoiseSchedule.from_config(ScheduleConfig(num_steps=50))
    sampler = SamplerConfig.model_validate({"kind": kind, "num_steps": 4})
    objective = ObjectiveConfig.model_validate({"target": target})

    def net(x: Tensor, t: Tensor, *_: object) -> Tensor:
        return 0.1 * x

    with NoReciprocals():
        index = torch.arange(2)
        images = sample(net, schedule, sampler, index, (1, 4, 4), seed=0, objective=objective)  # type: ignore[arg-type]
    assert torch.isfinite(images).all()
