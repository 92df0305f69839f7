"""Group normalization in float32, on a GPU with kernels of our own (`ddpm_pipeline.kernels.group_norm_kernels`)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpm_pipeline.kernels import define_operator, on_gpu


class GroupNorm32(nn.GroupNorm):
    """Group normalization computed in float32 whatever the precision around it, returned in that precision.

    On a GPU it works on channels-last maps and returns them, without a cast or a copy of the map.
    """

    def forward(self, input: Tensor, silu: bool = False) -> Tensor:
        """input (B, C, H, W). silu: apply SiLU to the result."""
        if on_gpu(input):
            arguments = (input, self.weight, self.bias, self.num_groups, self.eps, silu)
            return _GroupNorm.apply(*arguments) if torch.is_grad_enabled() else _operator(*arguments)[0]
        normal = self._normalize(input)
        return F.silu(normal) if silu else normal

    def _normalize(self, input: Tensor) -> Tensor:
        weight, bias = self.weight.float(), self.bias.float()
        if input.device.type == "cpu" and not torch.is_grad_enabled():
            # The CPU's kernel computes in float32 itself: the same bits, without two copies. Its backward is slow.
            return F.group_norm(input, self.num_groups, weight, bias, self.eps)
        return F.group_norm(input.float(), self.num_groups, weight, bias, self.eps).to(input.dtype)


def _reference(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor]:
    batch, channels, height, width = x.shape
    result, mean, scale = torch.native_group_norm(
        x.float().contiguous(), weight.float(), bias.float(), batch, channels, height * width, groups, eps
    )
    if silu:
        result = F.silu(result)
    result = result.to(x.dtype).contiguous(memory_format=torch.channels_last)
    return result, torch.stack((mean, scale), dim=-1)


def _reference_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, statistics: Tensor, silu: bool
) -> tuple[Tensor, Tensor]:
    batch, channels, height, width = x.shape
    groups = statistics.shape[1]
    mean, scale = (part.contiguous() for part in statistics.unbind(-1))
    x32, gradient, gain = x.float().contiguous(), grad.float(), weight.float()
    if silu:
        normal = (x32.view(batch, groups, -1) - mean[..., None]) * scale[..., None]
        z = normal.view(x.shape) * gain[:, None, None] + bias.float()[:, None, None]
        gradient = torch.ops.aten.silu_backward(gradient, z)
    of_x, of_weight, of_bias = torch.ops.aten.native_group_norm_backward(
        gradient.contiguous(), x32, mean, scale, gain, batch, channels, height * width, groups, [True] * 3
    )
    return of_x.to(x.dtype).contiguous(memory_format=torch.channels_last), torch.stack((of_weight, of_bias))


def _launch(*arguments: Any) -> tuple[Tensor, Tensor]:
    from ddpm_pipeline.kernels.group_norm_kernels import launch_group_norm

    return launch_group_norm(*arguments)


def _launch_backward(*arguments: Any) -> tuple[Tensor, Tensor]:
    from ddpm_pipeline.kernels.group_norm_kernels import launch_group_norm_backward

    return launch_group_norm_backward(*arguments)


def _shapes(x: Tensor, weight: Tensor, bias: Tensor, groups: int, *_: Any) -> tuple[Tensor, Tensor]:
    statistics = x.new_empty((len(x), groups, 2), dtype=torch.float32)
    return torch.empty_like(x, memory_format=torch.channels_last), statistics


def _shapes_backward(grad: Tensor, x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    parameters = x.new_empty((2, x.shape[1]), dtype=torch.float32)
    return torch.empty_like(x, memory_format=torch.channels_last), parameters


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool
    ) -> Tensor:
        result, statistics = _operator(x, weight, bias, groups, eps, silu)
        ctx.save_for_backward(x, weight, bias, statistics)
        ctx.silu = silu
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, statistics = ctx.saved_tensors
        of_x, parameters = _operator_backward(gradients[0], x, weight, bias, statistics, ctx.silu)
        of_weight, of_bias = parameters.unbind()
        return of_x, of_weight.to(weight.dtype), of_bias.to(bias.dtype), None, None, None


_operator = define_operator(
    "group_norm(Tensor x, Tensor weight, Tensor bias, int groups, float eps, bool silu) -> (Tensor, Tensor)",
    reference=_reference,
    launch=_launch,
    shapes=_shapes,
)
_operator_backward = define_operator(
    "group_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor bias, Tensor statistics, bool silu)"
    " -> (Tensor, Tensor)",
    reference=_reference_backward,
    launch=_launch_backward,
    shapes=_shapes_backward,
)
