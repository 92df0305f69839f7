"""The compiled library that lets a CPU build of torch carry tensors of a CUDA device. Does not import torch."""

import ctypes
import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).with_name("guard.cpp")
FOLDER = Path(__file__).parents[2] / "build" / "tests"
"""Of compiled libraries, for all processes and sessions; `make clean` removes it."""
COMPILER = shutil.which(os.environ.get("CXX", "g++"))
"""The C++ compiler, or None where there is none."""


def load_guard() -> None:
    """Load the library, compiled at first use. Registrations are read while torch starts: call it before."""
    if "torch" in sys.modules:
        raise RuntimeError("the simulated device must be imported before torch")
    ctypes.CDLL(str(_compiled()))


def is_cpu_build() -> bool:
    """Whether torch here has no CUDA of its own, whose device would meet the simulated one."""
    return not (_torch_folder() / "lib" / "libtorch_cuda.so").exists()


def _compiled() -> Path:
    # The library finds torch's own by path: that of another environment may be gone.
    torch = _torch_folder()
    version = f"{importlib.metadata.version('torch')} {torch}"
    key = hashlib.sha256(SOURCE.read_bytes() + version.encode()).hexdigest()[:16]
    library = FOLDER / f"guard-{key}.so"
    if library.exists():
        return library
    FOLDER.mkdir(parents=True, exist_ok=True)
    unfinished = library.with_suffix(f".{os.getpid()}")
    words = ["-O1", "-std=c++20", "-fPIC", "-shared", f"-I{torch}/include", SOURCE, "-o", unfinished]
    libraries = [f"-L{torch}/lib", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{torch}/lib"]
    subprocess.run([COMPILER or "g++", *words, *libraries], check=True)
    unfinished.replace(library)  # several test processes may compile at a time
    return library


def _torch_folder() -> Path:
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent
