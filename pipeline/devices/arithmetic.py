"""How a GPU computes: the precision of matrix products, and whether the same inputs always give the same bits."""

import os

import torch

from ddpm_pipeline.config.device_kind import Matmul


def set_up_arithmetic(matmul: Matmul, *, deterministic: bool) -> None:
    """Configure this process, before its first CUDA call. No effect on what a CPU computes.

    Unset, torch rounds the inputs of convolutions to TF32 and those of matrix products not, and picks algorithms whose
    sums run in no fixed order. Algorithms are never chosen by speed: two workers would choose differently.
    """
    # To the libraries this variable means more than what torch asks them for.
    os.environ.pop("NVIDIA_TF32_OVERRIDE", None)
    # Both of torch's interfaces, the older one first: where they disagree, reading the older one raises an error,
    # which cudnn.flags() and Inductor do. The older one alone would leave the precision of convolutions open.
    torch.set_float32_matmul_precision("high" if matmul == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = matmul == "tf32"
    torch.backends.cuda.matmul.fp32_precision = matmul
    torch.backends.cudnn.conv.fp32_precision = matmul  # pyright: ignore[reportAttributeAccessIssue]
    torch.backends.cudnn.rnn.fp32_precision = matmul  # pyright: ignore[reportAttributeAccessIssue]
    torch.backends.cudnn.benchmark = False
    if deterministic:
        # cuBLAS is deterministic only with a workspace of fixed size, and NCCL only with a fixed algorithm.
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
        os.environ["NCCL_ALGO"] = "Ring"
    torch.backends.cudnn.deterministic = deterministic
    if torch.cuda.is_available():
        # Only there: on a CPU the slower algorithms would change nothing but the time.
        torch.use_deterministic_algorithms(deterministic)
        # Filling every new tensor with NaN would show reads of memory that nothing wrote, which is a fault to find in
        # tests; in a training it costs a kernel for each tensor and changes no result.
        torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]
