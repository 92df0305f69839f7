"""Each fault that the check of a GPU can find is told in one line with its remedy. CUDA is played by the CPU."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ddpm_pipeline.devices import preflight
from ddpm_pipeline.devices.preflight import (
    GpuNeeds,
    GpuReport,
    can_run,
    check_gpus,
    compiler_fault,
    inspect_gpus,
)
from ddpm_pipeline.devices.remedies import fact_of, unfit_remedy

OLD_DRIVER = (
    "The NVIDIA driver on your system is too old (found version 12080). Please update your GPU driver by downloading "
    "and installing a new version from the URL: http://example Alternatively, go to: http://example to install"
)
FABRIC = (
    "Unexpected error from cudaGetDeviceCount(). Did you run some cuda functions before calling NumCudaDevices() that "
    "might have already set an error? Error 802: system not yet initialized"
)


def raises(error: Exception) -> Callable[..., Any]:
    def refuse(*_: object, **__: object) -> Any:
        raise error

    return refuse


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """One H100 that works: its tensors are the CPU's. A test puts one thing out of order."""
    real = torch.device
    monkeypatch.setattr(preflight.torch, "device", lambda *_: real("cpu"))
    monkeypatch.setattr(preflight, "set_up_arithmetic", lambda *_, **__: None)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91900)
    for name, value in {
        "init": None,
        "device_count": 1,
        "get_device_name": "NVIDIA H100",
        "get_device_capability": (9, 0),
        "get_arch_list": ["sm_75", "sm_80", "sm_90"],
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, found=value: found)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    monkeypatch.setattr(preflight, "read_device_kind", lambda _: None)
    return monkeypatch


def only(needs: GpuNeeds | None = None) -> GpuReport:
    (report,) = inspect_gpus(needs or GpuNeeds())
    assert "\n" not in f"{report.fault}{report.remedy}"
    return report


def test_a_gpu_that_computes_rightly_is_fit(gpu: pytest.MonkeyPatch) -> None:
    report = only(GpuNeeds(nccl=True))
    assert (report.gpu, report.fault, report.remedy) == ("GPU 0 (NVIDIA H100)", None, "")


@pytest.mark.parametrize(
    ("error", "fault", "remedy"),
    [
        (
            OLD_DRIVER,
            "driver on your system is too old (found version 12080)",
            "install a newer NVIDIA driver",
        ),
        ("Found no NVIDIA driver on your system. Please check", "no NVIDIA driver", "runtimeClassName"),
        ("No CUDA GPUs are available", "No CUDA GPUs are available", "CUDA_VISIBLE_DEVICES"),
        (FABRIC, "Error 802: system not yet initialized", "nvidia-fabricmanager"),
        ("Error 803: unsupported display driver / cuda driver combination", "Error 803", "reboot"),
        ("never seen before", "never seen before", "Xid"),
    ],
)
def test_a_driver_that_does_not_start_is_told_with_its_remedy(
    gpu: pytest.MonkeyPatch, error: str, fault: str, remedy: str
) -> None:
    gpu.setattr(torch.cuda, "init", raises(RuntimeError(error)))
    report = only()
    assert fault in str(report.fault)
    assert "http" not in str(report.fault)
    assert remedy in report.remedy


def test_a_torch_without_cuda_is_named(gpu: pytest.MonkeyPatch) -> None:
    gpu.setattr(torch.version, "cuda", None)
    report = only()
    assert report.fault == f"torch {torch.__version__} is a build without CUDA"
    assert "CUDA build" in report.remedy


@pytest.mark.parametrize(
    ("capability", "remedy"), [((7, 0), "for an older CUDA"), ((12, 0), "of a newer version")]
)
def test_a_gpu_that_torch_has_no_code_for_is_named_with_both(
    gpu: pytest.MonkeyPatch, capability: tuple[int, int], remedy: str
) -> None:
    gpu.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    report = only()
    assert f"compute capability {capability[0]}.{capability[1]}" in str(report.fault)
    assert "sm_75 sm_80 sm_90 only" in str(report.fault)
    assert remedy in report.remedy


@pytest.mark.parametrize(
    ("capability", "built_for", "runs"),
    [
        ((8, 9), ["sm_80"], True),  # binary code runs on later minor versions of its major version
        ((8, 0), ["sm_86"], False),
        ((9, 0), ["sm_80"], False),
        ((12, 1), ["sm_90", "compute_90"], True),  # intermediate code is compiled by the driver
        ((7, 0), ["compute_75"], False),
        ((9, 0), ["sm_90a"], True),
        ((12, 0), ["compute_90a"], False),
        ((10, 3), ["sm_100f"], True),
        ((12, 0), ["sm_100f"], False),
        ((12, 0), ["sm_120"], True),
        ((9, 0), ["gfx90a"], False),
    ],
)
def test_code_runs_where_cuda_says_that_it_does(
    capability: tuple[int, int], built_for: list[str], runs: bool
) -> None:
    assert can_run(capability, built_for) is runs


@pytest.mark.parametrize("wrong", ["__matmul__", "conv2d"])
def test_wrong_and_missing_numbers_are_found(gpu: pytest.MonkeyPatch, wrong: str) -> None:
    place: Any = torch.Tensor if wrong == "__matmul__" else torch
    right = getattr(place, wrong)
    for spoil in (lambda x: x * 1.01, lambda x: x * float("nan")):

        def computed(a: torch.Tensor, *rest: Any, spoil: Any = spoil, **more: Any) -> torch.Tensor:
            found = right(a, *rest, **more)
            return spoil(found) if a.dtype == torch.float32 else found

        gpu.setattr(place, wrong, computed)
        assert "is wrong by" in str(only().fault)


@pytest.mark.parametrize(
    ("error", "fault", "remedy"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "no free memory", "nvidia-smi"),
        (
            RuntimeError("CUDA error: no kernel image is available\nmore"),
            "no kernel image",
            "compute capability",
        ),
        (RuntimeError("CUDA error: uncorrectable ECC error encountered"), "ECC", "replace"),
    ],
)
def test_an_error_while_computing_is_told(
    gpu: pytest.MonkeyPatch, error: Exception, fault: str, remedy: str
) -> None:
    gpu.setattr(torch, "conv2d", raises(error))
    report = only()
    assert fault in str(report.fault)
    assert remedy in report.remedy


def test_nccl_is_required_where_several_workers_train(gpu: pytest.MonkeyPatch) -> None:
    gpu.setattr(torch.distributed, "is_nccl_available", lambda: False)
    assert only().fault is None
    assert "NCCL" in str(only(GpuNeeds(nccl=True)).fault)


def test_a_compiler_and_triton_are_required_where_the_network_is_compiled(
    gpu: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    gpu.setitem(sys.modules, "triton", None)
    report = only(GpuNeeds(compiler=True))
    assert "Triton cannot be imported" in str(report.fault)
    gpu.setitem(sys.modules, "triton", torch)
    gpu.setenv("PATH", str(tmp_path))
    gpu.delenv("CC", raising=False)
    assert only().fault is None
    report = only(GpuNeeds(compiler=True))
    assert report.fault == "compile is set, but there is no C compiler"
    assert "gcc" in report.remedy
    gpu.setattr(torch.cuda, "get_device_capability", lambda _: (6, 1))
    gpu.setattr(torch.cuda, "get_arch_list", lambda: ["sm_60"])
    assert "Triton needs compute capability 7.0, not 6.1" in str(only(GpuNeeds(compiler=True)).fault)


def test_a_compiler_without_headers_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = tmp_path / "cc"
    fake.write_text("#!/bin/sh\necho 'fatal error: stdint.h: No such file or directory' >&2\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setenv("CC", str(fake))
    fault, remedy = compiler_fault() or ("", "")
    assert "stdint.h: No such file or directory" in fault
    assert "headers" in remedy
    monkeypatch.setenv("CXX", str(tmp_path / "absent"))
    assert "cannot be run" in (compiler_fault("c++") or ("", ""))[0]


def test_every_gpu_is_checked_on_request(gpu: pytest.MonkeyPatch) -> None:
    gpu.setattr(torch.cuda, "device_count", lambda: 3)
    assert len(inspect_gpus(GpuNeeds())) == 1
    assert [report.gpu[:5] for report in inspect_gpus(GpuNeeds(every=True))] == ["GPU 0", "GPU 1", "GPU 2"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_the_process_of_the_check_reports_here() -> None:
    (report,) = check_gpus(GpuNeeds())
    assert report.fault is not None
    assert report.remedy


@pytest.mark.parametrize(
    ("script", "limit_seconds", "fault"),
    [
        ("import time; time.sleep(60)", 0.5, "no answer within"),
        ("import os; os.abort()", 60.0, "SIGABRT"),
        ("raise SystemExit('libcuda is broken')", 60.0, "exit code 1 (libcuda is broken)"),
    ],
)
def test_a_check_that_hangs_or_dies_is_a_fault(
    monkeypatch: pytest.MonkeyPatch, script: str, limit_seconds: float, fault: str
) -> None:
    begin = subprocess.Popen
    begun: list[Any] = []

    def instead(command: list[str], **more: Any) -> Any:
        begun.append(begin([command[0], "-c", script], **more))
        return begun[-1]

    monkeypatch.setattr(preflight.subprocess, "Popen", instead)
    (report,) = check_gpus(GpuNeeds(), limit_seconds)
    assert fault in str(report.fault)
    assert "Xid" in report.remedy
    assert begun[0].wait(30) != 0
    begun[0].stdout.close()
    begun[0].stderr.close()


def test_only_errors_of_the_installation_are_not_worth_another_attempt() -> None:
    assert unfit_remedy(AssertionError("Torch not compiled with CUDA enabled")) is not None
    assert unfit_remedy(RuntimeError(OLD_DRIVER)) is not None
    assert unfit_remedy(RuntimeError("backend='inductor' raised:\nFailed to find C compiler.")) is not None
    assert unfit_remedy(RuntimeError("CUDA error: uncorrectable ECC error encountered")) is None
    assert unfit_remedy(ConnectionError("peer went away")) is None


@pytest.mark.parametrize(
    ("text", "fact"),
    [
        (OLD_DRIVER, "The NVIDIA driver on your system is too old (found version 12080)"),
        (FABRIC, "Error 802: system not yet initialized"),
        (
            "backend='inductor' raised:\nInvalidCxxCompiler: No working C++ compiler found in None\n\nSet TORCHDYNAMO",
            "InvalidCxxCompiler: No working C++ compiler found in None",
        ),
        (
            "CUDA error: no kernel image is available for execution on the device\nFor debugging consider passing",
            "CUDA error: no kernel image is available for execution on the device",
        ),
        ("first\nsecond", "first"),
        ("", "RuntimeError"),
    ],
)
def test_the_fact_of_an_error_is_one_line_without_advice(text: str, fact: str) -> None:
    assert fact_of(RuntimeError(text)) == fact
