"""Whether a GPU can do the work, found out before work is placed on it by a few small computations.

The requests run in a process of their own: a driver that hangs, a crash or a broken CUDA context end with it, and the
caller's own first CUDA call still comes after its arithmetic is set up.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
from typing import Literal

import torch
from pydantic import TypeAdapter, ValidationError

from ddpm_pipeline.config.base import Settings
from ddpm_pipeline.config.device_kind import DeviceKind
from ddpm_pipeline.devices.arithmetic import set_up_arithmetic
from ddpm_pipeline.devices.cuda_device import read_device_kind
from ddpm_pipeline.devices.remedies import OTHER_REMEDY, fault_and_remedy
from ddpm_pipeline.telemetry.terminal import echo_json

ANSWER_SECONDS = 60.0
"""A check takes some seconds. Importing torch from a cold disk and waking eight GPUs whose driver was unloaded can take
half a minute, and a refusal in error is worse than a wait."""
_MODULE = "ddpm_pipeline.devices.preflight"
_OLDEST_FOR_TRITON = (7, 0)
_COMPILERS = {"c": ("CC", ("gcc", "clang"), "gcc"), "c++": ("CXX", ("g++",), "g++")}
"""The variable, the names in the order in which Triton and Inductor look for them, and what to install."""
_COMPILER_SECONDS = 20.0
_LARGEST_ERROR = 1e-3
"""Relative; arithmetic that only rounds is a hundred times closer, wrong arithmetic much further away."""


class GpuNeeds(Settings):
    """What the work that is to be placed requires of a GPU."""

    nccl: bool = False
    """Several workers train together."""
    compiler: bool = False
    """The network is compiled."""
    every: bool = False
    """Check every GPU that the process sees; otherwise the first, on which a worker computes."""


class GpuReport(Settings):
    """What the check of one GPU found."""

    gpu: str
    """Its number among those that the process sees, such as `GPU 0`, and its name, once that is known."""
    kind: DeviceKind | None = None
    """None if the GPU could not be used."""
    fault: str | None = None
    """What is wrong, in one line; None if all is well."""
    remedy: str = ""
    """What to do about it."""


class _FaultError(Exception):
    def __init__(self, fault: str, remedy: str) -> None:
        super().__init__(fault)
        self.fault, self.remedy = fault, remedy


def check_gpus(needs: GpuNeeds, answer_seconds: float = ANSWER_SECONDS) -> list[GpuReport]:
    """Check the GPU that this process would compute on, or every GPU that it sees. At least one report.

    Returns within `answer_seconds`, also when the driver hangs.
    """
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    process = subprocess.Popen(
        [sys.executable, "-m", _MODULE, needs.model_dump_json()],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env=environ,
    )
    try:
        out, errors = process.communicate(timeout=answer_seconds)
    except subprocess.TimeoutExpired:
        process.kill()  # and not waited for: a process that hangs inside the driver cannot be ended
        return [GpuReport(gpu="GPU", fault=f"no answer within {answer_seconds:.0f} s", remedy=OTHER_REMEDY)]
    try:
        return _REPORTS.validate_json(out)
    except ValidationError:
        return [GpuReport(gpu="GPU", fault=_death(process.returncode, errors), remedy=OTHER_REMEDY)]


def inspect_gpus(needs: GpuNeeds) -> list[GpuReport]:
    """The checks themselves, in this process. They start CUDA, and may leave it unusable."""
    try:
        _require_cuda()
    except _FaultError as found:
        return [GpuReport(gpu="GPU 0", fault=found.fault, remedy=found.remedy)]
    set_up_arithmetic("ieee", deterministic=True)
    count = torch.cuda.device_count() if needs.every else 1
    return [_inspect(number, needs) for number in range(count)]


def can_run(capability: tuple[int, int], built_for: list[str]) -> bool:
    """Whether a GPU of this compute capability runs code for the architectures that torch was built for.

    `built_for`: as torch.cuda.get_arch_list() names them. Binary code (sm_) runs on its own major version from its
    minor version on; intermediate code (compute_) on all later ones. The suffix `a` ties either to exactly its version,
    `f` to its major version.
    """
    for name in built_for:
        match = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", name)
        if match is None:
            continue
        version = (int(match[2]), int(match[3]))
        if match[4] == "a":
            runs = capability == version
        elif match[1] == "sm" or match[4] == "f":
            runs = capability[0] == version[0] and capability >= version
        else:
            runs = capability >= version
        if runs:
            return True
    return False


def compiler_fault(language: Literal["c", "c++"] = "c") -> tuple[str, str] | None:
    """What keeps this machine from compiling a network, and the remedy; None if nothing does.

    Triton compiles C for a GPU, Inductor C++ for the CPU; both include Python's headers.
    """
    variable, names, package = _COMPILERS[language]
    remedy = f"install {package}, the C library's headers and Python's, or set compile=false"
    compiler = os.environ.get(variable) or next(filter(None, map(shutil.which, names)), None)
    if compiler is None:
        return f"compile is set, but there is no {language.upper()} compiler", remedy
    headers = sysconfig.get_paths(scheme="posix_prefix")["include"]
    try:
        subprocess.run(
            [compiler, "-x", language, "-fsyntax-only", f"-I{headers}", "-"],
            input="#include <stdint.h>\n#include <Python.h>\n",
            text=True,
            capture_output=True,
            check=True,
            timeout=_COMPILER_SECONDS,
        )
    except subprocess.CalledProcessError as error:
        first = next(iter(str(error.stderr).splitlines()), "no reason given")
        return f"compile is set, but {compiler} fails ({first})", remedy
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"compile is set, but {compiler} cannot be run ({error})", remedy
    return None


def _require_cuda() -> None:
    if torch.version.cuda is None:
        raise _FaultError(
            f"torch {torch.__version__} is a build without CUDA",
            f"install the CUDA build of torch {torch.__version__.partition('+')[0]}",
        )
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        raise _FaultError(*fault_and_remedy(error)) from None


def _inspect(number: int, needs: GpuNeeds) -> GpuReport:
    device, gpu = torch.device("cuda", number), f"GPU {number}"
    try:
        gpu = f"GPU {number} ({torch.cuda.get_device_name(device)})"
        _require_code_for(device)
        _require_right_numbers(device)
        if needs.nccl:
            _require_nccl()
        if needs.compiler:
            _require_compiler(device)
        return GpuReport(gpu=gpu, kind=read_device_kind(device))
    except _FaultError as found:
        return GpuReport(gpu=gpu, fault=found.fault, remedy=found.remedy)
    except (RuntimeError, AssertionError) as error:
        fault, remedy = fault_and_remedy(error)
        return GpuReport(gpu=gpu, fault=fault, remedy=remedy)


def _require_code_for(device: torch.device) -> None:
    capability = torch.cuda.get_device_capability(device)
    built_for = torch.cuda.get_arch_list()
    if can_run(capability, built_for):
        return
    major, minor = capability
    oldest = min((int(found) for name in built_for for found in re.findall(r"_(\d+)", name)), default=0)
    older = 10 * major + minor < oldest
    raise _FaultError(
        f"compute capability {major}.{minor}, but torch {torch.__version__} has code for {' '.join(built_for)} only",
        f"install torch {'for an older CUDA' if older else 'of a newer version'}, or use other GPUs",
    )


def _require_right_numbers(device: torch.device) -> None:
    """A product and a convolution of float32 numbers against the CPU's in float64."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(256, 256, generator=generator) for _ in range(2))
    images = torch.randn(4, 16, 32, 32, generator=generator)
    weights = torch.randn(32, 16, 3, 3, generator=generator)
    pairs = {
        "a matrix product": ((a.to(device) @ b.to(device)), a.double() @ b.double()),
        "a convolution": (
            torch.conv2d(images.to(device), weights.to(device), padding=1),
            torch.conv2d(images.double(), weights.double(), padding=1),
        ),
    }
    for name, (found, right) in pairs.items():
        error = float((found.cpu().double() - right).norm() / right.norm())
        if not error < _LARGEST_ERROR:  # also true of NaN
            raise _FaultError(f"{name} is wrong by {error:.2g}", OTHER_REMEDY)


def _require_nccl() -> None:
    if not torch.distributed.is_nccl_available():
        raise _FaultError(
            f"torch {torch.__version__} was built without NCCL, by which several workers train on GPUs",
            "install torch's own CUDA build for Linux, or train with workers.num_workers=1",
        )


def _require_compiler(device: torch.device) -> None:
    capability = torch.cuda.get_device_capability(device)
    if capability < _OLDEST_FOR_TRITON:
        raise _FaultError(
            f"compile is set, but Triton needs compute capability 7.0, not {capability[0]}.{capability[1]}",
            "set compile=false, or use other GPUs",
        )
    try:
        import triton  # noqa: F401  # pyright: ignore[reportUnusedImport]
    except ImportError as error:
        raise _FaultError(
            f"compile is set, but Triton cannot be imported ({error})",
            "install the triton of torch's CUDA build, or set compile=false",
        ) from None
    fault = compiler_fault()
    if fault is not None:
        raise _FaultError(*fault)


def _death(code: int, errors: str) -> str:
    """What is known of a check that ended without a report."""
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    return f"the check ended with {how}" + (f" ({lines[-1][:300]})" if lines else "")


_REPORTS = TypeAdapter(list[GpuReport])


if __name__ == "__main__":
    reports = inspect_gpus(GpuNeeds.model_validate_json(sys.argv[1]))
    echo_json([report.model_dump(mode="json") for report in reports])
