"""A sampler is said to evaluate the network as often as it does."""

import pytest
import torch

from ddpm_pipeline.config.diffusion import SamplerConfig
from ddpm_pipeline.diffusion import NoiseSchedule, sample
from ddpm_pipeline.diffusion.evaluations import network_calls, network_evaluations


@pytest.mark.parametrize(
    "settings",
    [
        {"kind": "ancestral", "num_steps": 50},
        {"kind": "ddim", "num_steps": 7},
        {"kind": "dpm++2m", "num_steps": 9, "guidance_scale": 2.0},
        {"kind": "heun", "num_steps": 8},
        {"kind": "heun", "num_steps": 8, "guidance_scale": 2.0, "guidance_interval": (0.3, 5.0)},
        {"kind": "ddim", "num_steps": 10, "guidance_scale": 2.0, "guidance_interval": (0.3, 5.0)},
    ],
)
def test_evaluations_are_counted_as_they_happen(settings: dict[str, object]) -> None:
    sampler = SamplerConfig(**settings)  # type: ignore[arg-type]
    schedule = NoiseSchedule.linear(50)

    class Counting(torch.nn.Module):
        null_label = 1
        images = calls = 0

        def forward(self, x: torch.Tensor, t: torch.Tensor, class_labels: torch.Tensor) -> torch.Tensor:
            self.images += len(x)
            self.calls += 1
            return torch.zeros_like(x)

    net = Counting()
    labels = torch.zeros(1, dtype=torch.int64)
    sample(net, schedule, sampler, torch.arange(1), (1, 2, 2), 0, class_labels=labels)
    assert network_evaluations(schedule, sampler) == net.images
    assert network_calls(sampler) == net.calls
