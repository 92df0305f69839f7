"""Division that has one result on every device."""

import torch
from torch import Tensor


def divided(x: Tensor, by: Tensor | float) -> Tensor:
    """`x / by`, correctly rounded. Any shapes that broadcast.

    CUDA multiplies by the reciprocal when a tensor is divided by a Python number, and so rounds twice. It divides by a
    tensor without dimensions, which a fill makes on the device: nothing is copied from the host. On a CPU the two forms
    have equal bits.
    """
    if isinstance(by, Tensor):
        return x / by
    return x / torch.full((), by, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
