"""A network's weights in the precision that autocast computes in."""

import torch
from torch import nn


def cast_products(net: nn.Module, dtype: torch.dtype) -> None:
    """Keep the weights of convolutions and linear layers of `net`, in place, in `dtype`: float16 or bfloat16.

    Under autocast to `dtype` the results are the same bits: it would cast these weights, frozen ones again in every
    call. Norms and embeddings stay as they are.
    """
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.to(dtype)
