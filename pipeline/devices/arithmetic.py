"""How a GPU computes: the precision of matrix products, and whether the same inputs always give the same bits."""

import os
from typing import Literal

import torch

Matmul = Literal["ieee", "tf32"]
"""Arithmetic of float32 products and convolutions on a GPU: full float32, or inputs rounded to TF32's 10 bits."""


def set_up_arithmetic(matmul: Matmul, *, deterministic: bool) -> None:
    """Configure this process, before its first CUDA call. No effect on what a CPU computes.

    Unset, torch rounds the inputs of convolutions to TF32 and those of matrix products not, and picks algorithms whose
    sums run in no fixed order. Algorithms are never chosen by speed: two workers would choose differently.
    """
    torch.backends.cuda.matmul.fp32_precision = matmul
    torch.backends.cudnn.conv.fp32_precision = matmul  # pyright: ignore[reportAttributeAccessIssue]
    torch.backends.cudnn.benchmark = False
    if deterministic:
        # cuBLAS is deterministic only with a workspace of fixed size, and NCCL only with a fixed algorithm.
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
        os.environ["NCCL_ALGO"] = "Ring"
    torch.backends.cudnn.deterministic = deterministic
    if torch.cuda.is_available():
        # Only there: on a CPU the slower algorithms would change nothing but the time.
        torch.use_deterministic_algorithms(deterministic)
