"""Kernels compile to machine code for GPUs that are not here, and keep every rounding that their references have."""

import math
import re
from pathlib import Path
from struct import pack
from typing import Any

import pytest

from tests.kernels.installed import needs_triton

pytestmark = needs_triton

QUICK = [90]
ALL = [75, 80, 89, 90, 100, 120]
INT = "i32"
NAMES = {"index": "*i64", "device_step": "*i64", "key0": INT, "key1": INT, "step": INT, "count": INT}
SIZES = {"rows": INT, "channels": INT, "groups": INT, "part_rows": INT, "parts": INT, "eps": "fp32"}
PARAMETERS = {
    "weight": "*fp32",
    "bias": "*fp32",
    "statistics": "*fp32",
    "moments": "*fp32",
    "sums": "*fp32",
}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile anew: kernels that this machine has compiled before are not found."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def compiled(kernel: Any, capability: int, types: dict[str, str], fuse: bool, **constants: Any) -> str:
    """PTX of a kernel; its machine code exists too."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    # As at a launch: torch aligns tensors to 16 bytes, and sizes are multiples of 16.
    aligned = {
        (kernel.arg_names.index(name),): [["tt.divisibility", 16]]
        for name, kind in signature.items()
        if kind.startswith("*") or name in ("channels", "count", "half")
    }
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={name: value for name, value in constants.items() if name in kernel.arg_names},
        attrs=aligned,
    )
    target = GPUTarget("cuda", capability, 32)
    made = triton.compile(source, target=target, options={"enable_fp_fusion": fuse, "num_warps": 4})
    assert made.asm["cubin"][:4] == b"\x7fELF"
    return made.asm["ptx"]


def check_normals(capability: int) -> None:
    from ddpm_pipeline.kernels import philox

    types = NAMES | {"out": "*fp32", "tiles": INT}
    ptx = compiled(philox.normal_kernel, capability, types, False, STEP_IN_MEMORY=False, BLOCK=philox.BLOCK)
    assert not re.search(r"\bfma\b|\.ftz|approx|div\.full", ptx)
    assert {"add.rn.f64", "mul.rn.f64", "div.rn.f64", "sqrt.rn.f64"} <= set(
        re.findall(r"\b\w+\.rn\.f64", ptx)
    )
    constants = {*(4.0 / (2 * k + 1) for k in range(8)), -2 * math.log(2), math.pi * 2.0**-31}
    constants |= {(-1.0) ** k / math.factorial(k) for k in range(2, 15)} - {1.0}
    signs = {abs(number) for number in constants}
    found = {number for number in signs for sign in (1, -1) if pack(">d", sign * number).hex().upper() in ptx}
    assert found == signs, "each coefficient keeps all its bits"
    assert "st.global.v4.b32" in ptx


def check_first_blocks(capability: int) -> None:
    from ddpm_pipeline.kernels import philox

    for kind, out in (("words", "*i64"), ("integer", "*i64"), ("uniform", "*fp32")):
        types = NAMES | {"out": out, "high": INT}
        constants = {"KIND": kind, "STEP_IN_MEMORY": True, "BLOCK": philox.BLOCK}
        ptx = compiled(philox.one_block_kernel, capability, types, False, **constants)
        assert not re.search(r"\bfma\b|\.ftz|approx", ptx)


def check_dropout(capability: int, dtypes: tuple[str, ...]) -> None:
    from ddpm_pipeline.kernels import dropout_kernel

    for dtype in dtypes:
        types = {"out": f"*{dtype}", "x": f"*{dtype}", "words": "*i32", "layer_word": INT, "threshold": INT}
        types |= {"scale": "fp32", "count": INT, "half": INT, "tiles": INT}
        ptx = compiled(
            dropout_kernel.keyed_dropout_kernel, capability, types, False, BLOCK=dropout_kernel.BLOCK
        )
        assert not re.search(r"\bfma\b|\.ftz|approx", ptx)
        assert "ld.global.v4.b32" in ptx
        if dtype == "bf16":
            assert "cvt.rn.bf16" in ptx or capability < 80


def check_group_norm(capability: int, channels: tuple[int, ...], dtypes: tuple[str, ...]) -> None:
    from ddpm_pipeline.kernels import group_norm_kernels
    from ddpm_pipeline.kernels.tiling import Tiling

    for count in channels:
        for dtype in dtypes:
            tile = Tiling(1024, count, 32).tile
            maps = {"x": f"*{dtype}", "grad": f"*{dtype}", "out": f"*{dtype}"}
            types = SIZES | PARAMETERS | maps
            for name in ("part_moments", "normalize", "part_gradients", "gradient"):
                kernel = getattr(group_norm_kernels, f"{name}_kernel")
                for whole in (True, False) if "WHOLE" in kernel.arg_names else (False,):
                    ptx = compiled(kernel, capability, types, True, SILU=True, WHOLE=whole, PARTS=4, **tile)
                    assert "atom" not in ptx, "an atomic sum has no fixed order"
                    assert "red.global" not in ptx


@pytest.mark.timeout(900)  # under load
@pytest.mark.parametrize("capability", QUICK)
def test_kernels_compile_and_keep_every_rounding(capability: int) -> None:
    check_normals(capability)
    check_first_blocks(capability)
    check_dropout(capability, ("bf16",))
    check_group_norm(capability, (128,), ("fp32",))


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("capability", ALL)
def test_kernels_compile_for_every_generation_of_gpus(capability: int) -> None:
    dtypes = ("fp32", "bf16", "fp16")
    check_normals(capability)
    check_first_blocks(capability)
    check_dropout(capability, dtypes)
    check_group_norm(capability, (128, 320, 384), dtypes)
